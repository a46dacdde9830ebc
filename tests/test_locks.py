"""One writer a directory: of this machine, of another, and on file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from megatron_replay import locks
from megatron_replay.errors import OutputError
from megatron_replay.locks import LOCK_FILE, DirectoryLock, is_ours

HOLD = "import sys, time; from megatron_replay.locks import DirectoryLock; \
lock = DirectoryLock(sys.argv[1], purpose='it'); print('held', flush=True); sys.stdin.read()"


def take(directory):
    return DirectoryLock(directory, purpose="it")


@pytest.mark.parametrize("death", ["end", "kill"])
def test_another_process_is_kept_out_and_named(tmp_path, capfd, death):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"another run is writing it .*process {holder.pid} "):
            take(tmp_path)
        holder.stdin.close() if death == "end" else holder.send_signal(signal.SIGKILL)
    take(tmp_path).release()
    assert capfd.readouterr().err == ""  # the kernel has released the lock: no need to wait


def test_it_is_released_with_its_object_and_can_be_taken_again(tmp_path):
    lock = take(tmp_path)
    assert is_ours(tmp_path)
    del lock
    again = take(tmp_path)
    again.release()
    again.release()
    assert is_ours(tmp_path, "it")
    assert not is_ours(tmp_path, "another thing")


def test_a_live_owner_on_another_machine_is_found_by_its_beat(tmp_path, monkeypatch):
    """As under Lustre's localflock, where this machine's kernel sees no lock."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    owner = take(tmp_path)
    monkeypatch.setattr(locks, "this_machine", lambda: "another")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(OutputError, match="another run"):
        take(tmp_path)
    owner.release()


def test_a_dead_owner_on_another_machine_is_waited_for_then_replaced(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)
    take(tmp_path).release()
    record = json.loads((tmp_path / LOCK_FILE).read_text())
    record |= {"machine": "another", "host": "node7", "pid": 12, "beat": 3}
    (tmp_path / LOCK_FILE).write_text(json.dumps(record))
    take(tmp_path).release()
    assert "process 12 on node7" in capfd.readouterr().err


def test_an_owner_that_released_is_not_waited_for(tmp_path, capfd, monkeypatch):
    take(tmp_path).release()
    monkeypatch.setattr(locks, "this_machine", lambda: "another")
    take(tmp_path).release()
    assert capfd.readouterr().err == ""


def test_a_file_system_without_locks_is_reported_and_the_record_serves(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)

    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    owner = take(tmp_path)
    assert "this file system has no locks" in capfd.readouterr().err
    with pytest.raises(OutputError, match="another run"):
        take(tmp_path)
    owner.release()


@pytest.mark.parametrize("content", [b"", b"{", b'{"program": "megatron_replay", "ho', bytes(200)])
def test_a_damaged_record_is_replaced(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    assert not is_ours(tmp_path)
    take(tmp_path).release()
    assert is_ours(tmp_path)


@pytest.mark.parametrize("content", [b"mine", b"[]", b"\xff", b'{"program": "another"}'])
def test_another_programs_file_is_not_replaced(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    with pytest.raises(OutputError, match="another program's file is there"):
        take(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == content
    with pytest.raises(OutputError, match="cannot write"):
        take(tmp_path / "absent")
