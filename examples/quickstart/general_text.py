"""General English text that every Python installation already holds: its documentation."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from pydoc_data import topics

import numpy

#: Folders of the standard library that hold tests or vendored code, not documentation.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
#: One-line docstrings ("Return the name.") teach a language model nothing: leave them out.
MIN_CHARACTERS = 80
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_files(folder: Path) -> Iterator[Path]:
    """Every Python file under ``folder`` that documents something for users."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in SKIPPED_FOLDERS:
            yield from python_files(entry)
        elif entry.suffix == ".py":
            yield entry


def docstrings(folder: Path, without: Container[str] = ()) -> Iterator[str]:
    """The docstrings of all Python files under ``folder``, in the order of their paths."""
    for path in python_files(folder):
        if path.relative_to(folder).parts[0] in without:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escapes
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and len(text) >= MIN_CHARACTERS:
                yield text


def general_documents(*, seed: int, without: Container[str] = ()) -> list[str]:
    """Docstrings of the standard library and numpy, and pydoc's topics: distinct, shuffled.

    About 3.5 million characters with CPython 3.11; the content depends on the versions of Python
    and numpy, which ``make_data.py`` therefore records. ``without``: files and folders of the
    standard library to leave out.
    """
    library = docstrings(Path(sysconfig.get_path("stdlib")), without)
    of_numpy = docstrings(Path(numpy.__file__).parent)
    ordered = list(dict.fromkeys([*library, *topics.topics.values(), *of_numpy]))
    random.Random(seed).shuffle(ordered)
    return ordered
