"""What guards against a tokenizer's files: they come with a model, from anywhere.

Files are checked to be regular, of a size that can be read and with ids that fit, before a library
opens them. A chat template is a program: it can loop for ever or build a string of any length, and
jinja2's sandbox, which keeps it from files and processes, bounds neither. So CPU time and memory
are limited while one is rendered.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np

from megatron_replay.errors import DataError
from megatron_replay.files import MAX_TEXT_BYTES, require_regular

# Everything in a Hugging Face directory that decides which ids a text becomes.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)
_MAX_TEMPLATE_BYTES = 4 << 20  # published ones have up to 50,000
_FILES_WITH_IDS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
_MAX_ID = np.iinfo(np.int32).max - 1  # so that the size of the vocabulary fits, too
#: Seconds of CPU time for one rendering: a busy machine cannot use them up. A rendering of a
#: thousand messages takes some milliseconds.
SECONDS = 10.0
#: Characters of one rendered conversation: some ten million tokens.
MAX_TEXT = 64 << 20
#: Bytes that a rendering may add to the process's address space: several such texts.
_MAX_BYTES = 2 << 30


def tokenizer_files(path: Path) -> list[Path]:
    """The files that decide the ids, checked to be regular and of a size that can be read."""
    if os.path.isdir(path):
        files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)})
    elif path.suffix == ".model" and os.path.exists(path):
        files = [path]
    else:
        raise DataError(
            "no tokenizer here",
            where=path,
            expected="a Hugging Face directory or a sentencepiece .model file",
            found="another kind of file" if os.path.exists(path) else "nothing",
        )
    for file in files:
        size = require_regular(file, DataError)
        limit = _MAX_TEMPLATE_BYTES if file.suffix == ".jinja" else MAX_TEXT_BYTES
        if size > limit:
            raise DataError(
                "too large for a tokenizer's file",
                where=file,
                expected=f"at most {limit} bytes",
                found=f"{size} bytes",
            )
    return files


def require_declared_ids(file: Path) -> None:
    """Raise DataError where a file of a tokenizer declares an id that does not fit into int32.

    The tokenizers library silently gives an added token of such an id another one.
    """
    if file.name not in _FILES_WITH_IDS:
        return
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        return
    if file.name == "tokenizer_config.json":
        ids = [int(id_) for id_ in content.get("added_tokens_decoder") or ()]
    elif file.name == "tokenizer.json":
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        ids = list(vocab.values()) if isinstance(vocab, dict) else []  # a unigram model has a list
        ids += [token["id"] for token in content.get("added_tokens") or ()]
    else:
        ids = [id_ for id_ in content.values() if type(id_) is int]
    require_ids(ids, file)


def require_ids(ids: Sequence[int], where: Path) -> None:
    """Raise DataError where an id does not fit into int32."""
    if ids and not 0 <= min(ids) <= max(ids) <= _MAX_ID:
        raise DataError(
            "a token's id does not fit",
            where=where,
            expected=f"ids from 0 to {_MAX_ID}",
            found=f"{min(ids)} to {max(ids)}",
        )


class RenderLimitError(Exception):
    """A rendering exceeded a limit, which its text names."""


@contextmanager
def render_limits() -> Iterator[None]:
    """Bound CPU time and memory inside the block; costs some 50 us.

    CPU time is bounded in the main thread only: Python runs signal handlers nowhere else.

    Raises:
        RenderLimitError: the block took more than ``SECONDS``, or 2 GiB.
    """
    is_running, is_main = True, threading.current_thread() is threading.main_thread()

    def stop(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise RenderLimitError(f"it took more than {SECONDS:g} s of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as handle:
        limit = int(handle.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    previous = signal.signal(signal.SIGPROF, stop) if is_main else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if is_main:
            # Repeated each second: an exception that is raised in a destructor is lost.
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)
        try:
            yield
        except MemoryError:
            raise RenderLimitError(f"it needed more than {_MAX_BYTES >> 30} GiB") from None
        finally:
            is_running = False
    finally:
        is_running = False  # for a signal that arrived in the line above
        if is_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous or signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
