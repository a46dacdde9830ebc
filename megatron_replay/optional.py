"""Modules that an installation may lack: compiled ones, and packages for some devices."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

from megatron_replay.errors import ConfigError

#: What builds and installs the compiled modules.
BUILD = "pip install -e . --no-build-isolation"


def optional_module(name: str, *, install: str) -> ModuleType | None:
    """The module; None if it is not installed.

    A module that is installed and does not work is no reason to run a slower backend unnoticed.

    Args:
        install: the command that installs it.

    Raises:
        ConfigError: it is installed and cannot be imported, or is compiled for another Python.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        found: object = error
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            found = _built_for_another_python(name)
            if found is None:
                return None
        raise ConfigError(
            "installed, but it cannot be imported",
            where=name,
            found=found,
            fix=f"Install it again: {install}; or remove it to run without",
        ) from error


def _built_for_another_python(name: str) -> str | None:
    """The first compiled file of that name, none of which this Python can import; or None."""
    package, _, stem = name.rpartition(".")
    spec = importlib.util.find_spec(package) if package else None
    ours = {stem + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob(f"{stem}.*.so")):
            if file.name not in ours:
                return f"{file}, which is built for another Python"
    return None
