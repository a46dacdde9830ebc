"""Builds the configuration tree from flags and YAML, and prints it as YAML.

Precedence: defaults < ``--config run.yaml`` < flags. The YAML has one mapping per section of the
tree, with the same names as the flags (underscores for dashes); ``--config`` reads what
``--print-config`` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from megatron_replay.config import flag_name
from megatron_replay.errors import ConfigError
from megatron_replay.files import read_text

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Invocation(typing.Generic[Config]):
    """A resolved configuration, and whether to run it, print it or estimate it."""

    config: Config
    print_config: bool
    dry_run: bool


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors, so that main prints one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's; an unknown flag is named also where a required one is missing."""
        argv = list(sys.argv[1:] if args is None else args)
        known = [option for action in self._actions for option in action.option_strings]
        for word in (argument.split("=")[0] for argument in argv):
            if word.startswith("--") and not any(option.startswith(word) for option in known):
                self.error(f"unknown flag {word}{_nearest(word, known)}")
        return super().parse_args(argv, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError; argparse would print its usage and exit."""
        raise ConfigError(message, fix=f"See {self.prog} --help")


def parse(root: type[Config], argv: Sequence[str], *, program: str) -> Invocation[Config]:
    """Build ``root`` from command-line flags and an optional ``--config`` file.

    Raises:
        ConfigError: unknown flag or key (the nearest name is shown), missing or unusable value.
    """
    parser = Parser(prog=program, description=root.__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with one mapping per section")
    control = parser.add_mutually_exclusive_group()
    control.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    control.add_argument(
        "--dry-run", action="store_true", help="check the layout, predict memory, and exit"
    )
    sections = typing.get_type_hints(root)
    for name, section in sections.items():
        add_flags(parser.add_argument_group(name, section.__doc__), section)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        hint = _nearest(unknown[0].split("=")[0], known)
        raise ConfigError(f"unknown flag {unknown[0]}{hint}", fix=f"See {program} --help")
    flags = vars(given)
    file, shown, dry_run = (flags.pop(key) for key in ("config", "print_config", "dry_run"))
    from_file = {} if file is None else _read_yaml(Path(file), sections)
    branches = {}
    for name, section in sections.items():
        kinds = _fields(section)
        values = from_file.get(name, {}) | {key: flags[key] for key in kinds if key in flags}
        for key, (field, _) in kinds.items():
            if field.default is dataclasses.MISSING and values.get(key) is None:
                wanted = field.metadata["help"].capitalize()
                raise ConfigError(f"{flag_name(key)} is required", fix=wanted)
        branches[name] = section(**values)
    return Invocation(root(**branches), shown, dry_run)


def to_yaml(config: Any) -> str:
    """The configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` when some known name is close to ``word``, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _fields(section: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], type[Any]]]:
    """A section's fields by name, with their types; ``int | None`` counts as int."""
    hints = typing.get_type_hints(section)
    return {
        field.name: (field, (typing.get_args(hints[field.name]) or (hints[field.name],))[0])
        for field in dataclasses.fields(section)
    }


def add_flags(group: argparse._ActionsContainer, section: type[Any]) -> None:
    """A flag for each field of ``section``; `from_flags` reads them."""
    for field, kind in _fields(section).values():
        _add_flag(group, field, kind)


def from_flags(section: type[Config], given: Mapping[str, Any]) -> Config:
    """``section`` with those of its fields that were ``given``; the others keep their defaults."""
    return section(**{name: given[name] for name in _fields(section) if name in given})


def _add_flag(
    group: argparse._ActionsContainer, field: dataclasses.Field[Any], kind: type[Any]
) -> None:
    required = field.default is dataclasses.MISSING
    text = field.metadata["help"] + (" (required)" if required else f" (default {field.default})")
    text = text.replace("%", "%%")
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": field.name}
    if kind is bool:
        group.add_argument(flag_name(field.name), action=argparse.BooleanOptionalAction, **common)
    else:
        metavar = "|".join(field.metadata["choices"] or ()) or kind.__name__.upper()
        group.add_argument(flag_name(field.name), type=kind, metavar=metavar, **common)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice; PyYAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the key {twice!r} is there twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, sections: dict[str, type[Any]]) -> dict[str, dict[str, Any]]:
    try:
        tree = yaml.load(read_text(path, ConfigError), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML: {error}", where=path) from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError("not a mapping of sections", where=path, found=type(tree).__name__)
    for name, values in tree.items():
        if name not in sections:
            owners = [section for section in sections if name in _fields(sections[section])]
            hint = f"; it belongs under {owners[0]}:" if owners else _nearest(str(name), sections)
            raise ConfigError(f"unknown section {name!r}{hint}", where=path)
        if not isinstance(values, dict):
            raise ConfigError(f"section {name!r} is not a mapping", where=path)
        fields = _fields(sections[name])
        for key, value in values.items():
            if key not in fields:
                hint = _nearest(str(key), fields)
                raise ConfigError(f"unknown key {key!r} under {name!r}{hint}", where=path)
            field, kind = fields[key]
            if value is not None or field.default is not None:
                values[key] = _coerce(value, kind, where=f"{path}: {name}.{key}")
    return tree


def _coerce(value: Any, kind: type[Any], *, where: str) -> Any:
    """``value`` as ``kind``. YAML reads 1e-5 as a string and 1 as an int: a float accepts both."""
    if type(value) is kind:
        return value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError("unusable value", where=where, expected=kind.__name__, found=repr(value))
