"""Files of rows: one JSON object a line, plain or compressed by gzip.

``row_formats.py`` turns a row into a document.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_replay.errors import DataError
from megatron_replay.files import MAX_TEXT_BYTES, open_regular

_GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
#: First bytes of files that people take for rows.
_OTHER_FILES = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a file compressed by bzip2",
    b"\xfd7zXZ": "a file compressed by xz",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_EXPECTED = "one JSON object per line"
_CONVERT = (
    'Convert it: python -c "import json, sys; [print(json.dumps(row)) for row in '
    'json.load(open(sys.argv[1]))]" FILE > FILE.jsonl'
)
_TYPES: dict[type[Any], str] = {str: "a string", list: "a list", dict: "an object"}
#: Fields that describe a row and are not trained on; letter case does not matter.
METADATA = frozenset(
    "__index_level_0__ _id author category conversation_id created_at dataset dataset_name date"
    " difficulty domain hash id idx index lang language level license meta metadata model"
    " num_tokens num_turns prompt_id quality question_id row_id score sha256 source sources split"
    " subset tags task_id task_name task_type timestamp topic type uid url uuid version".split()
)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(FILE:LINE, bytes)`` for every line of ``path``, plain or compressed by gzip.

    A byte order mark and blank lines at the end are left out.

    Raises:
        DataError: the file cannot be read, or is of a known other kind.
    """
    blank = 0
    with open_regular(path, DataError) as raw:
        try:
            for number, line in enumerate(_text_lines(raw, path), start=1):
                if not line.strip():
                    blank += 1
                    continue
                for before in range(number - blank, number):
                    yield f"{path}:{before}", b"\n"
                blank = 0
                yield f"{path}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read: {error}", where=path) from error


def _text_lines(raw: IO[bytes], path: Path) -> Iterator[bytes]:
    is_gzip = raw.read(len(_GZIP)) == _GZIP
    raw.seek(0)
    handle: Any = gzip.GzipFile(fileobj=raw) if is_gzip else raw
    start = handle.read(8)
    for magic, kind in _OTHER_FILES.items():
        if start.startswith(magic):
            raise DataError(
                "not lines of JSON",
                where=path,
                expected="one JSON object per line, as text or compressed by gzip",
                found=kind,
                fix="Unpack it, or write its rows as JSON lines",
            )
    handle.seek(len(_BOM) if start.startswith(_BOM) else 0)
    for number in itertools.count(1):
        line = handle.readline(MAX_TEXT_BYTES + 1)
        if len(line) > MAX_TEXT_BYTES:
            raise DataError(
                "the line is too long",
                where=f"{path}:{number}",
                expected=f"at most {MAX_TEXT_BYTES} bytes",
            )
        if not line:
            return
        yield line


def is_empty(value: Any) -> bool:
    """Whether ``value`` has no content: null, "", [], {}, these as a string, or a list of such."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, list):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None


@dataclass(frozen=True)
class Row:
    """One line of a file, parsed.

    Attributes:
        where: ``FILE:LINE``, for errors.
        ignored: names of fields that are left out, of the row and of its messages.
    """

    where: str
    fields: dict[str, Any]
    ignored: frozenset[str] = frozenset()

    def text(self, name: str) -> str:
        """The string under ``name``.

        Raises:
            DataError: it is missing, no string, or no valid Unicode.
        """
        return str(self.checked(self.fields, name, str))

    def checked(self, fields: Any, name: str, kind: type[Any], inside: str = "") -> Any:
        """``fields[name]``, checked to be a ``kind``; ``inside`` is the path of ``fields``."""
        at = f"{inside}{name}"
        if not isinstance(fields, dict):
            raise self.error(f"{inside.rstrip('.')} is not an object", found=_json_type(fields))
        if name not in fields:
            keys = ", ".join(map(repr, fields)) or "no keys"
            raise self.error("missing key", expected=repr(at), found=keys)
        value = fields[name]
        if not isinstance(value, kind):
            raise self.error(
                f"{at!r} has the wrong type", expected=_TYPES[kind], found=_json_type(value)
            )
        if kind is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # "\ud800" is JSON, but half a character
                raise self.error(f"{at!r} is not valid Unicode: {error.reason}") from error
        return value

    def refuse_unread(self, row_format: str, read: Sequence[str]) -> None:
        """Raise DataError if fields other than ``read`` have content that would be lost.

        All content of a row is trained on, is ``METADATA``, or was left out with --ignore-fields.
        """
        names = [
            name
            for name, value in self.fields.items()
            if name not in read and name.lower() not in METADATA and not is_empty(value)
        ]
        if names:
            raise self.error(
                f"{', '.join(map(repr, names))} would be lost: {row_format} rows do not carry "
                f"{'it' if len(names) == 1 else 'them'}",
                fix="Put it into the text of the row, or drop it: tools/preprocess_data.py "
                f"--ignore-fields {','.join(names)}",
            )

    def error(self, what: str, **facts: Any) -> DataError:
        """A DataError about this row."""
        return DataError(what, where=self.where, **facts)


def parse_row(where: str, line: bytes, ignored: frozenset[str] = frozenset()) -> Row:
    """Parse one line; fields whose names are ``ignored`` are left out.

    Raises:
        DataError: it is empty, not UTF-8, not JSON, not an object, or has two values for one key.
    """
    if not line.strip():
        raise DataError("empty line", where=where, expected=_EXPECTED)
    is_array = line.lstrip().startswith(b"[")  # on one line, or on many
    try:
        fields = None if is_array else _DECODER.decode(line.decode())
    except _DuplicateKeyError as error:
        raise DataError(str(error), where=where, expected=_EXPECTED) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, expected=_EXPECTED) from error
    if not isinstance(fields, dict):
        found = "a JSON array" if is_array else _json_type(fields)
        fix = _CONVERT if is_array else None
        raise DataError("not a row", where=where, expected=_EXPECTED, found=found, fix=fix)
    return Row(where, {k: v for k, v in fields.items() if k not in ignored}, ignored)


class _DuplicateKeyError(ValueError):
    """An object has two values under one key; json would silently keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateKeyError(f"the key {counts.most_common(1)[0][0]!r} is there twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _TYPES.get(type(value), "a number")
