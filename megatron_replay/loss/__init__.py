"""The loss: cross-entropy over candidate sets, with the vocabulary sharded over TP ranks.

Read ``definition`` (the equation), ``candidate_sets`` (the sets that it sums over), ``sharded``
(what runs, and what ranks exchange). It uses torch and explicit process groups, not Megatron.
"""
