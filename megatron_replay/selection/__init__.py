"""Which tokens are candidates (arXiv 2510.09152, Eq. 1 and 2), and at which positions.

Read ``candidates`` (the rule), then ``shard_selection`` (the same over tensor-parallel ranks).
It uses torch and explicit process groups, not Megatron.
"""
