"""Before any test module is imported: one thread, and megatron-core made importable on the CPU."""

from __future__ import annotations

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Many tests start interpreters: without bytecode on the disk, each compiles torch and megatron-core
# anew, 6 of its 10 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

from megatron_replay import platform  # noqa: E402
from tests import processes  # noqa: E402

platform.select("cpu").prepare()
processes.adopt_orphans()
# A busy machine is slow, and nothing is wrong with it.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
# Like Ctrl-C it ends what tests have started.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests of one process first: a mistake shows in seconds, not after minutes of ranks."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is not None)
    if any(item.get_closest_marker("distributed") for item in items):
        processes.start_server()  # comes up meanwhile


@pytest.fixture(autouse=True, scope="session")
def _no_process_outlives_the_session():
    with processes.ended():
        yield


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request):
    with processes.ended() as request.node.left_running:
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """A test that left processes running fails; not one that was interrupted."""
    result = yield
    left = getattr(item, "left_running", [])
    assert not left, f"processes that the test left running, now killed: {left}"
    return result


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """Of csrc/ascend for an emulated NPU; one process of the session compiles for all."""
    from tests.ascemu.compiled import Compiler

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "ascemu.lock"):
        return Compiler(folder / "ascemu")


@pytest.fixture(scope="session")
def operators(compiler):
    """The emulated module, of the kernels as they are."""
    with FileLock(f"{compiler.folder}.lock"):
        return compiler.module("unchanged")
