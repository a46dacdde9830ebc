"""From JSON lines to micro-batches.

``tokenizer`` and ``rows`` (with ``chat``) make documents of rows, ``corpus`` freezes them,
``packing`` and ``sampler`` lay them into batches, ``replay`` joins a batch with the candidate
store. Import from the modules: only the last three need torch.
"""
