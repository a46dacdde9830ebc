"""Before any test module is imported: one thread, and megatron-core made importable on the CPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Children are forked: an OpenMP pool started here would not survive in them.
torch.set_num_threads(1)

from megatron_replay import platform  # noqa: E402

platform.select("cpu").prepare()


def pytest_collection_modifyitems(items):
    """Tests of one process first: a mistake shows in seconds, not after minutes of ranks."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)
