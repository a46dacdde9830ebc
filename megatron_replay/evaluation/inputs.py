"""What models are measured on, and how: checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_replay.data.corpus import corpus_file
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.files import sha256_of_files


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What models are measured on; what is None is not measured.

    Attributes:
        sql_questions: prompt/completion rows; the completion is the gold query.
        database: the SQLite file that ``sql_questions`` are asked of.
        general_text: text rows; forgetting is measured here.
        task_data: prompt/completion rows of the domain.
        data: rows of any format that ``tools/preprocess_data.py`` reads.
        data_path: prefix of the corpus that ``store`` was made for.
        store: directory of a candidate store.
    """

    sql_questions: Path | None = None
    database: Path | None = None
    general_text: Path | None = None
    task_data: Path | None = None
    data: Path | None = None
    data_path: Path | None = None
    store: Path | None = None

    def __post_init__(self) -> None:
        for one, other in (("sql_questions", "database"), ("data_path", "store")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ConfigError(f"{_flag(one)} and {_flag(other)} are given together or not")
        if not any(getattr(self, f.name) for f in fields(self)):
            names = ", ".join(_flag(f.name) for f in fields(self))
            raise ConfigError("nothing to measure", expected=f"at least one of {names}")

    def files(self) -> dict[str, list[Path]]:
        """The files that decide the measurements, by the input they belong to."""
        found: dict[str, list[Path]] = {}
        for field in fields(self):
            path = getattr(self, field.name)
            if path is None:
                continue
            if field.name == "data_path":  # the description holds the content's fingerprint
                found[field.name] = [corpus_file(path, "json")]
            elif field.name == "store":  # the manifest holds every shard's size and crc
                found[field.name] = [path / "store.json", path / "manifest.json"]
            else:
                found[field.name] = [path]
        return found

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each input.

        Raises:
            DataError: a file is missing.
        """
        for name, paths in self.files().items():
            for path in paths:
                if not path.is_file():
                    raise DataError(f"no such file, given as {_flag(name)}", where=path)
        return {name: sha256_of_files(paths) for name, paths in self.files().items()}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How it is measured; part of every result's key.

    Attributes:
        device: where the models run.
        dtype: their number format.
        batch_size: documents or prompts at once.
        window: general text is cut into pieces of this many predicted tokens.
        max_new_tokens: length limit of a generated query.
        max_documents: documents of the corpus whose outside mass is measured.
        query_seconds: time limit of one query.
        bird_compatible: compare answers as BIRD does, as sets without order.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16
    window: int = 128
    max_new_tokens: int = 128
    max_documents: int = 200
    query_seconds: float = 2.0
    bird_compatible: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (str, bool)) and value <= 0:
                raise ConfigError("must be positive", where=_flag(field.name), found=value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def named_directories(pairs: list[str], *, flag: str) -> dict[str, Path]:
    """``NAME=DIR`` arguments as a dictionary.

    Raises:
        ConfigError: one is malformed, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, directory = pair.partition("=")
        if not (name and equals and directory):
            raise ConfigError(
                "not a name and a directory", where=flag, expected="NAME=DIR", found=pair
            )
        if name in found:
            raise ConfigError(f"{name} is given twice", where=flag)
        found[name] = Path(directory)
    return found
