"""The tests' own processes: forks without threads, and none that outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from tests import pool, processes


def look_around(found: Path) -> None:
    threads = len(os.listdir("/proc/self/task"))
    found.write_text(f"{threads} {os.getcwd()} {os.environ['GIVEN']} {os.getsid(0) == os.getpid()}")
    print("printed")
    warnings.warn("an error here too", UserWarning, stacklevel=1)


def test_a_fork_copies_everything_but_the_threads(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "there")
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert processes.wait(processes.fork(look_around, tmp_path / "found")) == 1
    finally:
        done.set()
        thread.join()
    assert (tmp_path / "found").read_text() == f"1 {tmp_path} there True"
    printed = capfd.readouterr()
    assert printed.out == "printed\n"
    assert "UserWarning: an error here too" in printed.err


def test_exit_codes(tmp_path):
    assert processes.wait(processes.fork(os._exit, 7)) == 7
    sleeper = processes.fork(signal.pause)
    assert processes.wait(sleeper, 0.01) is None
    os.kill(sleeper, signal.SIGKILL)
    with pytest.raises(AssertionError, match="ended before"):
        processes.until((tmp_path / "never").exists, sleeper)
    assert processes.wait(sleeper) == -signal.SIGKILL


#: A launcher like torchrun: its worker has a session of its own, and does not die with it.
LAUNCHER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"],
                          start_new_session=True)
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.parametrize("dead", [False, True])
def test_remaining_processes_are_ended_with_their_children(dead):
    with processes.ended() as left:
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE)
        worker = int(launcher.stdout.readline())
        if dead:
            launcher.kill()
            launcher.wait()
    assert left == ([worker] if dead else [launcher.pid, worker])
    launcher.wait()
    launcher.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def fail_or_hang(rank: int, world_size: int, death: bool) -> None:
    if rank == 1:
        if death:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank is broken")
    signal.pause()


@pytest.mark.parametrize("death", [False, True])
def test_a_failing_rank_ends_the_pool_and_the_others(death):
    before = processes.children()
    expected = "rank 1 died, exit code -9" if death else "rank 1 failed:.*this rank is broken"
    with pytest.raises(AssertionError, match=f"(?s){expected}"):
        pool.run(2, fail_or_hang, death)
    assert processes.children() == before


LEAVING = """
import os, signal, subprocess

left = []  # not of the test: what it drops would be a warning, which is an error

def test_that_leaves_a_process():
    left.append(subprocess.Popen(["sleep", "1000000"], start_new_session=True))
    with open("pid", "w") as file:
        file.write(str(left[0].pid))
"""
INTERRUPTED = f"{LEAVING}    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()\n"


def run_suite(folder: Path) -> None:
    os.chdir(folder)
    os._exit(pytest.main(["-q", "-p", "tests.conftest", "test_it.py"]))


def test_no_test_leaves_a_process_behind(tmp_path):
    for test, code in (
        (LEAVING, pytest.ExitCode.TESTS_FAILED),
        (INTERRUPTED, pytest.ExitCode.INTERRUPTED),
    ):
        (tmp_path / "test_it.py").write_text(test)
        assert processes.wait(processes.fork(run_suite, tmp_path)) == code
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
