"""From JSON lines to micro-batches, in the order in which data flows.

``rows`` reads files, ``row_formats`` and ``chat`` make documents of rows with a ``tokenizer``,
``corpus`` freezes them, ``forest`` finds what they begin with in common, ``packing`` makes tensors
of them, ``loader`` the batches of a run, ``replay`` joins a batch with the candidate store. Import
from the modules: only the last three need torch.
"""
