"""What models are measured on, and how: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_replay.data.corpus import corpus_file
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.lm_eval_tasks import LmEvalTasks, task_files
from megatron_replay.evaluation.sql.sets import sql_set_files
from megatron_replay.files import require_regular
from megatron_replay.platform import select

#: The most that a setting may be; a query may take a day.
_MOST = {"batch_size": 1 << 20, "max_new_tokens": 1 << 20, "query_seconds": 86_400}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What models are measured on; what is None or empty is not measured.

    Attributes:
        sql: directories of SQL questions by name, in a layout of ``sql/sets.py``.
        choices: multiple-choice rows of the domain by name.
        general_choices: those of general abilities, for retention.
        lm_eval_tasks: lm-eval tasks of general abilities.
        lm_eval_domain_tasks: lm-eval tasks of the domain.
        lm_eval_include_path: directory of these tasks' YAML files.
        general_text: text rows that show what is forgotten.
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
        if not any(getattr(self, one.name) for one in fields(self)):
            flags = ", ".join(flag_of(one.name) for one in fields(self))
            raise ConfigError("nothing to measure", expected=f"at least one of {flags}")
        tasks = (*self.lm_eval_tasks, *self.lm_eval_domain_tasks)
        if bool(tasks) != (self.lm_eval_include_path is not None):
            raise ConfigError(
                "--lm-eval-tasks and --lm-eval-include-path are given together or not"
            )
        names = [*self.sql, *self.choices, *self.general_choices, *tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                "two benchmarks have one name",
                where="--sql, --choices, --general-choices, --lm-eval-tasks, "
                "--lm-eval-domain-tasks",
                found=twice[0],
            )

    def lm_eval(self) -> LmEvalTasks | None:
        """The lm-eval tasks, if any."""
        if self.lm_eval_include_path is None:
            return None
        return LmEvalTasks(
            general=self.lm_eval_tasks,
            domain=self.lm_eval_domain_tasks,
            include_path=self.lm_eval_include_path,
        )

    def paths(self) -> dict[str, Path]:
        """Every input by its name; ``sql/NAME`` where it has a name of its own."""
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
            kind = name.split("/")[0]
            if kind == "sql":
                files = sql_set_files(path)
            elif kind == "lm_eval_include_path":
                files = task_files(path)
            elif kind == "data_path":  # the description holds the content's fingerprint
                files = [corpus_file(path, "json")]
            elif kind == "store":  # the manifest holds every shard's size and crc
                files = [path / "store.json", path / "manifest.json"]
            else:
                files = [path]
            for file in files:
                if not file.exists():
                    raise DataError(f"no such file, given as {flag_of(kind)}", where=file)
                require_regular(file, DataError)
            found[name] = files
        return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are measured; part of every result's key.

    Attributes:
        device: where the models run; "auto" is this machine's accelerator, or its CPU.
        dtype: their number format. float32 everywhere by default: bfloat16 rounds away part of
            what a small learning rate changed.
        batch_size: documents or prompts in a batch.
        max_new_tokens: most tokens of a generated query.
        query_seconds: time limit of a query.
    """

    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16
    max_new_tokens: int = 128
    query_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                "no such dtype", where="--dtype", expected="float32 or bfloat16", found=self.dtype
            )
        for name, most in _MOST.items():
            if not 0 < (value := getattr(self, name)) <= most:
                expected = f"above 0, at most {most}"
                raise ConfigError(
                    "out of range", where=flag_of(name), expected=expected, found=value
                )

    def resolved(self) -> Settings:
        """These settings with the device that "auto" is here: two devices give two results."""
        if self.device != "auto":
            return self
        try:
            return replace(self, device=select("auto").name)
        except ConfigError as error:  # an accelerator that cannot be used
            raise ConfigError(str(error).replace("--platform", "--device")) from error


def flag_of(name: str) -> str:
    """``--general-text`` of ``general_text``."""
    return f"--{name.replace('_', '-')}"


def named_paths(pairs: list[str], *, flag: str, kind: str = "DIR") -> dict[str, Path]:
    """``NAME=PATH`` arguments as a dictionary; ``kind`` stands for PATH in messages.

    Raises:
        ConfigError: one is malformed, a name is given twice, or is not UTF-8 as the JSON must be.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                "not a name and a path", where=flag, expected=f"NAME={kind}", found=pair
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("this name is not UTF-8", where=flag, found=ascii(name)) from error
        if name in found:
            raise ConfigError(f"{name} is given twice", where=flag)
        found[name] = Path(path)
    return found
