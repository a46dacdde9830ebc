"""The process that runs queries: no query outlasts its bound, and no process its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_replay.errors import DataError
from megatron_replay.evaluation.sql import execution
from megatron_replay.evaluation.sql.execution import QueryProcess
from megatron_replay.evaluation.sql.server import Limits, QueryError
from tests.evaluation.site import write_database

#: Nothing here is that slow; a test that hangs ends.
HANG_SECONDS = 600.0
#: One instruction of 8 · 10¹⁰ comparisons: SQLite can neither be interrupted nor look at a clock.
MINUTES = "select trim(hex(zeroblob(499999)), replace(hex(zeroblob(40000)), '0', 'x') || '0')"
#: 50,625 rows that Python's hash cannot tell apart: a power of 2⁶¹ has that of one.
COLLIDING = (
    "with recursive t(i) as (select 0 union all select i + 1 from t where i < 14) "
    "select pow(2.0, 61 * a.i), pow(2.0, 61 * b.i), pow(2.0, 61 * c.i), pow(2.0, 61 * d.i) "
    "from t a, t b, t c, t d"
)


@pytest.fixture
def database(tmp_path) -> Path:
    rows = "insert into book values ('b', 20), ('a', 10)"
    create = "create table book (title text, pages integer)"
    return write_database(tmp_path / "shop.sqlite", create, rows)


def children(pid: int) -> set[int]:
    """Processes that ``pid`` started and that have not ended."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split() if is_alive(child)}


def is_alive(pid: str | int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def outcome(process: QueryProcess, sql: str) -> str:
    with pytest.raises(QueryError) as caught:
        process.compare(sql)
    return caught.value.reason


@pytest.mark.parametrize("sql", [MINUTES, COLLIDING])
def test_what_cannot_be_interrupted_is_killed(database, sql, monkeypatch):
    before = children(os.getpid())
    with QueryProcess(Limits(seconds=HANG_SECONDS, gold_seconds=HANG_SECONDS)) as process:
        assert process.gold(database, COLLIDING if sql == COLLIDING else "select 1")
        [first] = children(os.getpid()) - before
        with monkeypatch.context() as patch:  # the query may take minutes, its process must not
            patch.setattr(execution, "ALLOWANCE_SECONDS", 0.2 - HANG_SECONDS)
            assert outcome(process, sql) == "timeout"
        assert not is_alive(first)
        assert process.gold(database, "select title from book")
        assert process.compare("select title from book order by 1") == (True, True)
        assert len(children(os.getpid()) - before) == 1
    assert children(os.getpid()) == before


def test_memory_and_temporary_files_are_bounded(database):
    wide = "select " + ", ".join(["hex(zeroblob(499999))"] * 200)
    sorted_ = (
        "with recursive t(i) as (select 1 union all select i + 1 from t where i < 1000) "
        "select count(distinct i || hex(zeroblob(5000))) from t"
    )
    limits = Limits(
        seconds=HANG_SECONDS,
        gold_seconds=HANG_SECONDS,
        max_memory_bytes=150_000_000,
        max_temporary_bytes=1_000_000,
    )
    with QueryProcess(limits) as process:
        # Python 3.10 cannot tell a temporary file that is too large from a damaged disk.
        for sql in (wide, sorted_) if sys.version_info >= (3, 11) else (wide,):
            assert process.gold(database, "select 1")
            assert outcome(process, sql) == "too large"
        for length in (100_000, 100_000_000):  # the second is beyond the process's memory
            with pytest.raises(QueryError, match=r"more than 100000 characters|ended with"):
                process.gold(database, "select " + "1" * length)
    with QueryProcess(Limits(seconds=HANG_SECONDS, gold_seconds=HANG_SECONDS)) as process:
        assert process.gold(database, sorted_)


def test_a_process_that_is_killed_is_said_and_replaced(database):
    before = children(os.getpid())
    with QueryProcess(Limits(seconds=HANG_SECONDS, gold_seconds=HANG_SECONDS)) as process:
        assert process.gold(database, "select 1")
        [child] = children(os.getpid()) - before
        os.kill(child, signal.SIGKILL)
        with pytest.raises(QueryError, match="its process ended with exit code -9") as caught:
            process.compare("select 1")
        assert caught.value.reason == "crash"
        assert process.gold(database, "select 1")
        assert process.compare("select 1")


def test_a_process_that_cannot_start(database, monkeypatch):
    for program in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        message = r"shop\.sqlite: cannot start a process"
        with QueryProcess() as process, pytest.raises(DataError, match=message):
            process.gold(database, "select 1")


PARENT = """
import sys
from pathlib import Path
from megatron_replay.evaluation.sql.execution import QueryProcess
from megatron_replay.evaluation.sql.server import Limits
with QueryProcess(Limits(seconds=600, gold_seconds=600)) as process:
    process.gold(Path(sys.argv[1]), "select 1")
    print("ready", flush=True)
    process.compare(sys.argv[2]) if sys.argv[2] else sys.stdin.read()
"""


@pytest.mark.parametrize("sql", [MINUTES, ""])
def test_no_process_outlives_its_parent(database, sql):
    """Neither in the middle of a query nor between two."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(database), sql],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        [child] = children(parent.pid)
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + HANG_SECONDS
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not is_alive(child)
    finally:
        parent.kill()
        parent.communicate()


def test_the_process_imports_nothing_heavy():
    code = "import sys, megatron_replay.evaluation.sql.server as _; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "transformers", "tqdm"} & set(found.stdout.split())
