"""From JSON lines to micro-batches, in the order in which data flows.

``rows`` reads files, ``row_formats`` and ``chat`` make documents of rows with a ``tokenizer``,
``corpus`` freezes them, ``packing`` and ``sampler`` make batches of them, ``replay`` joins a batch
with the candidate store, ``loader`` makes batches ahead. Import from the modules: only the last
four need torch.
"""
