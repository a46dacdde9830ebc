"""The loss: cross-entropy over candidate sets, with the vocabulary sharded over TP ranks.

Read ``definition`` (the equation), ``candidate_sets`` (what is summed over), ``sharded`` (what
runs, and what ranks exchange). torch and explicit process groups; nothing of Megatron.
"""
