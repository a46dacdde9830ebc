"""What models are measured on, and how: checked before anything is loaded."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megatron_replay.config import flag_name, option
from megatron_replay.data.corpus import corpus_file
from megatron_replay.data.prompts import PromptStyle
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.evaluation.sql.sets import sql_set_files
from megatron_replay.files import read_text, require_regular
from megatron_replay.platform import select

#: What an input is given as on a command line, and what it is.
FLAGS = {
    "sql": ("NAME=DIR", "questions and databases, in the layout of Spider, of BIRD, or plain"),
    "choices": ("NAME=FILE", "multiple-choice rows of the domain"),
    "general_choices": ("NAME=FILE", "multiple-choice rows of general abilities, for retention"),
    "lm_eval_tasks": ("TASK,…", "lm-eval tasks of general abilities, for retention"),
    "lm_eval_domain_tasks": ("TASK,…", "lm-eval tasks of the domain"),
    "lm_eval_include_path": ("PATH", "directory of these tasks' YAML files"),
    "general_text": ("PATH", '{"text"} rows, whose perplexity shows what is forgotten'),
    "data": ("PATH", "held-out rows of the domain, of any format"),
    "data_path": ("PATH", "prefix of a corpus: with --store, measures the mass outside its sets"),
    "store": ("PATH", "candidate store of that corpus"),
}
#: What may name local data in a task's YAML file.
_DATA_KEYS = ("data_files", "data_dir", "dataset_path")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What models are measured on (`FLAGS`); what is None or empty is not measured."""

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
        if not any(vars(self).values()):
            flags = ", ".join(map(flag_name, FLAGS))
            raise ConfigError("nothing to measure", expected=f"at least one of {flags}")
        if bool(self.tasks) != (self.lm_eval_include_path is not None):
            raise ConfigError(
                "--lm-eval-tasks and --lm-eval-include-path are given together or not"
            )
        names = [*self.sql, *self.choices, *self.general_choices, *self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            flags = "--sql, --choices, --general-choices, --lm-eval-tasks, --lm-eval-domain-tasks"
            raise ConfigError("two benchmarks have one name", where=flags, found=twice[0])

    @property
    def tasks(self) -> tuple[str, ...]:
        """All lm-eval tasks."""
        return (*self.lm_eval_tasks, *self.lm_eval_domain_tasks)

    def paths(self) -> dict[str, Path]:
        """Every input by its name; ``sql/NAME`` where it has a name of its own."""
        found: dict[str, Path] = {}
        for kind, value in vars(self).items():
            if isinstance(value, Mapping):
                found |= {f"{kind}/{name}": path for name, path in value.items()}
            elif isinstance(value, Path):
                found[kind] = value
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
                    raise DataError(f"no such file, given as {flag_name(kind)}", where=file)
                require_regular(file, DataError)
            found[name] = files
        return found


def task_files(include_path: Path) -> list[Path]:
    """Every file of the directory, and the local data that its YAML files name.

    Raises:
        DataError: there is no YAML file, one is not YAML, or something is not a regular file.
    """
    files = {path for path in _inside(include_path) if "__pycache__" not in path.parts}
    tasks = [path for path in files if path.name.endswith(("yaml", "yml"))]
    if not tasks:
        raise DataError("no task's YAML file here", where=include_path)
    for path in tasks:
        try:
            names = set(_named_data(yaml.compose(read_text(path, DataError))))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"not YAML: {error}", where=path) from error
        for name in names:
            for found in map(Path, glob.glob(name)):
                files.update(_inside(found))
    return sorted(files)


def _inside(path: Path) -> Iterator[Path]:
    """The file, or every file in the directory; lm-eval would wait for a pipe for ever."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if not file.is_dir():
            require_regular(file, DataError)
            yield file


def _named_data(tree: yaml.Node | None) -> Iterator[str]:
    """Strings under ``_DATA_KEYS``; tags such as ``!function`` are left alone."""
    nodes, seen = [(tree, False)], set()
    while nodes:
        node, below = nodes.pop()
        if (id(node), below) in seen:  # an alias: the whole of it may be beyond counting
            continue
        seen.add((id(node), below))
        if isinstance(node, yaml.MappingNode):
            nodes += [(value, below or key.value in _DATA_KEYS) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(value, below) for value in node.value]
        elif isinstance(node, yaml.ScalarNode) and below:
            yield node.value


@dataclass(frozen=True, kw_only=True)
class Settings(PromptStyle):
    """How models are measured; part of every result's key.

    The prompts' style is that of what belongs to the domain. General multiple-choice rows and texts
    are plain, as harnesses read them; lm-eval has a chat template only if it is requested by flag.
    """

    device: str = option("torch device; auto: this machine's accelerator, or its CPU", "auto")
    # float32 everywhere: bfloat16 rounds away part of what a small learning rate changed.
    dtype: str = option("the number format of the models", "float32", ("float32", "bfloat16"))
    batch_size: int = option(
        "prompts answered together; 32 times as many tokens pass through the model at once",
        16,
        within="[1, 1048576]",
    )
    max_new_tokens: int = option("most tokens of a generated query", 128, within="[1, 1048576]")
    unwrap: bool = option("run the query inside a code fence, or behind 'SQL:'", True)
    query_seconds: float = option(
        "time limit of a generated query, up to a day", 2.0, within="(0, 86400]"
    )
    gold_seconds: float = option(
        "time limit of a gold query, up to a day", 30.0, within="(0, 86400]"
    )
    leave_out: str | None = option(
        "SQL questions to leave out: NAME:NUMBER,… as errors print them", None
    )

    def resolved(self) -> Settings:
        """These settings with the device that "auto" is here: two devices give two results."""
        if self.device != "auto":
            return self
        try:
            return replace(self, device=select("auto").name)
        except ConfigError as error:  # an accelerator that cannot be used
            raise ConfigError(str(error).replace("--platform", "--device")) from error


def named_paths(pairs: list[str], *, flag: str, metavar: str = "NAME=DIR") -> dict[str, Path]:
    """``NAME=PATH`` arguments as a dictionary.

    Raises:
        ConfigError: one is malformed, a name is given twice, or is not UTF-8 as the JSON must be.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise ConfigError("not a name and a path", where=flag, expected=metavar, found=pair)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("this name is not UTF-8", where=flag, found=ascii(name)) from error
        if name in found:
            raise ConfigError(f"{name} is given twice", where=flag)
        found[name] = Path(path)
    return found
