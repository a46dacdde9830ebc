"""Processes that share shards: started afresh, and none outlives what it works with."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.errors import EXIT_INTERRUPTED, StoreError
from megatron_replay.store.workers import each_shard
from tests import processes


def look(shard: int) -> dict[str, Any]:
    """How a process is made that works on a shard."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {
        "parent": os.getppid(),
        "ends at Ctrl-C": signal.getsignal(signal.SIGINT) == signal.SIG_DFL and not blocked,
        "inherited": "tests.conftest" in sys.modules,
    }


def test_processes_start_afresh_whatever_locks_the_threads_of_this_one_hold() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found = dict(each_shard(look, range(5), workers=2))
    expected = {"parent": os.getpid(), "ends at Ctrl-C": True, "inherited": False}
    assert found == dict.fromkeys(range(5), expected)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert dict(each_shard(look, range(2), workers=1))[0]["parent"] == os.getppid()


def killed(shard: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_work() -> None:
    with pytest.raises(StoreError, match="was killed"):
        list(each_shard(killed, range(4), workers=2))


def fails_at_5(shard: int) -> int:
    if shard == 5:
        raise StoreError("damaged", where="here", expected=1, found=2)
    return shard


def test_an_error_of_a_process_comes_as_it_is() -> None:
    with pytest.raises(StoreError, match=r"^here: damaged \(expected 1; found 2\)$"):
        list(each_shard(fails_at_5, range(40), workers=2))


def stay(folder: Path, shard: int) -> None:
    (folder / f"{shard}-{os.getpid()}").touch()
    signal.pause()


def stay_everywhere(folder: Path) -> None:
    try:
        list(each_shard(partial(stay, folder), range(2), workers=2))
    except KeyboardInterrupt:
        os._exit(EXIT_INTERRUPTED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_all_end_with_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """A terminal sends Ctrl-C to all of them, and the first one alone tells of it."""
    first = processes.fork(stay_everywhere, tmp_path)
    processes.until(lambda: len(list(tmp_path.iterdir())) == 2, first)
    others = [int(path.name.split("-")[1]) for path in tmp_path.iterdir()]
    if number == signal.SIGINT:
        os.killpg(first, number)
        assert processes.wait(first) == EXIT_INTERRUPTED
        assert capfd.readouterr().err == ""
    else:
        os.kill(first, number)
        assert processes.wait(first) == -number
        assert [processes.wait(pid) for pid in others] == [1, 1]
