"""What models are measured on, and how: checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_replay.data.corpus_format import corpus_file
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.lm_eval_tasks import LmEvalTasks, task_files
from megatron_replay.evaluation.sql.sets import sql_set_files
from megatron_replay.files import require_regular
from megatron_replay.platform import select


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What models are measured on; what is None or empty is not measured.

    Attributes:
        sql: directories of SQL questions by name, in a layout of ``evaluation/sql/sets.py``.
        choices: multiple-choice rows of the domain by name.
        general_choices: those of general abilities: what is kept of them is retention.
        lm_eval_tasks: lm-eval tasks of general abilities.
        lm_eval_domain_tasks: lm-eval tasks of the domain.
        lm_eval_include_path: directory of these tasks' YAML files.
        general_text: text rows; forgetting is measured here.
        data: rows of any format that ``tools/preprocess_data.py`` reads.
        data_path: prefix of the corpus that ``store`` was made for.
        store: directory of a candidate store.
    """

    sql: Mapping[str, Path] = field(default_factory=dict)
    choices: Mapping[str, Path] = field(default_factory=dict)
    general_choices: Mapping[str, Path] = field(default_factory=dict)
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_domain_tasks: tuple[str, ...] = ()
    lm_eval_include_path: Path | None = None
    general_text: Path | None = None
    data: Path | None = None
    data_path: Path | None = None
    store: Path | None = None

    def __post_init__(self) -> None:
        if (self.data_path is None) != (self.store is None):
            raise ConfigError("--data-path and --store are given together or not")
        if not any(getattr(self, f.name) for f in fields(self)):
            flags = ", ".join(flag_of(f.name) for f in fields(self))
            raise ConfigError("nothing to measure", expected=f"at least one of {flags}")
        if bool(self.lm_eval()) != (self.lm_eval_include_path is not None):
            raise ConfigError(
                "--lm-eval-tasks and --lm-eval-include-path are given together or not"
            )
        names = [
            *self.sql, *self.choices, *self.general_choices,
            *self.lm_eval_tasks, *self.lm_eval_domain_tasks,
        ]  # fmt: skip
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    "two benchmarks have one name",
                    where="--sql, --choices, --general-choices, --lm-eval-tasks, "
                    "--lm-eval-domain-tasks",
                    found=name,
                )

    def lm_eval(self) -> LmEvalTasks | None:
        """The lm-eval tasks, if any."""
        if not (self.lm_eval_tasks or self.lm_eval_domain_tasks):
            return None
        return LmEvalTasks(
            general=self.lm_eval_tasks,
            domain=self.lm_eval_domain_tasks,
            include_path=self.lm_eval_include_path or Path(),
        )

    def paths(self) -> dict[str, Path]:
        """Every input by its name; of those with names of their own, ``sql/NAME``."""
        found: dict[str, Path] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Mapping):
                found |= {f"{one.name}/{name}": path for name, path in value.items()}
            elif isinstance(value, Path):
                found[one.name] = value
        return found

    def files(self) -> dict[str, list[Path]]:
        """The files that decide the measurements, by the input they belong to.

        Raises:
            DataError: a file is missing or not regular, or a directory has no known layout.
        """
        found = {}
        for name, path in self.paths().items():
            found[name] = _files(name, path)
            for file in found[name]:
                if not file.exists():
                    flag = flag_of(name.split("/")[0])
                    raise DataError(f"no such file, given as {flag}", where=file)
                require_regular(file, DataError)
        return found


def _files(name: str, path: Path) -> list[Path]:
    if name.startswith("sql/"):
        return sql_set_files(path)
    if name == "lm_eval_include_path":
        return task_files(path)
    if name == "data_path":  # the description holds the content's fingerprint
        return [corpus_file(path, "json")]
    if name == "store":  # the manifest holds every shard's size and crc
        return [path / "store.json", path / "manifest.json"]
    return [path]


#: A day.
_MAX_QUERY_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How it is measured; part of every result's key.

    Attributes:
        device: where the models run; "auto" is this machine's accelerator, or its CPU.
        dtype: their number format. float32 everywhere: weights that training moved by less than
            bfloat16 resolves would otherwise count as unmoved.
        batch_size: documents or prompts at once.
        max_new_tokens: length limit of a generated query.
        query_seconds: time limit of one query.
    """

    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16
    max_new_tokens: int = 128
    query_seconds: float = 2.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                raise ConfigError("must be positive", where=flag_of(one.name), found=value)
        if self.query_seconds > _MAX_QUERY_SECONDS:
            raise ConfigError(
                "too long for one query",
                where="--query-seconds",
                expected=f"at most {_MAX_QUERY_SECONDS}",
                found=self.query_seconds,
            )

    def resolved(self) -> Settings:
        """These settings with the device that "auto" is here: two devices give two results."""
        if self.device != "auto":
            return self
        try:
            return replace(self, device=select("auto").name)
        except ConfigError as error:  # an accelerator that cannot be used
            message = str(error).replace("--platform", "--device")
            raise ConfigError(message) from error


def flag_of(name: str) -> str:
    """``--general-text`` of ``general_text``."""
    return f"--{name.replace('_', '-')}"


def named_paths(pairs: list[str], *, flag: str, kind: str = "DIR") -> dict[str, Path]:
    """``NAME=PATH`` arguments as a dictionary; ``kind`` stands for PATH in messages.

    Raises:
        ConfigError: one is malformed, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                "not a name and a path", where=flag, expected=f"NAME={kind}", found=pair
            )
        require_utf8(name, where=flag)
        if name in found:
            raise ConfigError(f"{name} is given twice", where=flag)
        found[name] = Path(path)
    return found


def require_utf8(name: str, *, where: object) -> None:
    """Raise ConfigError where a name, unlike a path, cannot be written and drawn."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("this name is not UTF-8", where=where, found=ascii(name)) from error
