"""Before any test module is imported: one thread, and megatron-core made importable on the CPU."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests start interpreters: without bytecode on the disk, each compiles torch and megatron-core
# anew, 6 of its 10 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
import torch  # noqa: E402

# Children are forked: an OpenMP pool started here would not survive in them.
torch.set_num_threads(1)

from megatron_replay import platform  # noqa: E402

platform.select("cpu").prepare()


def pytest_collection_modifyitems(items):
    """Tests of one process first: a mistake shows in seconds, not after minutes of ranks."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """Of csrc/ascend for an emulated NPU."""
    from tests.ascemu.compiled import Compiler

    return Compiler(tmp_path_factory.mktemp("ascemu"))


@pytest.fixture(scope="session")
def operators(compiler):
    """The emulated module, of the kernels as they are."""
    return compiler.module("unchanged")
