"""English text and code that is wherever the benchmarks run, in Qwen's own tokens.

Three kinds: prose (the language reference inside ``pydoc``, the READMEs that installed packages
carry), docstrings (of a module, one after another), code (the standard library's files). Tokens by
Qwen's ranks, from the dashscope wheel, of which nothing is imported.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np
import numpy.typing as npt
import tiktoken

#: Rows of Qwen3's embedding; the tokenizer has 151,643 ranks and a few special tokens.
VOCAB_SIZE = 151_936
#: How Qwen cuts text before it merges: words, single digits, punctuation, white space
#: (dashscope/tokenizers/qwen_tokenizer.py, PAT_STR).
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Whose docstrings are read, beside the standard library's.
PACKAGES = ("numpy", "networkx", "matplotlib", "sympy", "torch/nn", "torch/optim")
KINDS = ("prose", "docstrings", "code")
#: Shorter texts are left out, longer ones cut.
SHORTEST, LONGEST = 600, 20_000


@dataclass(frozen=True, eq=False)
class Text:
    """A document; held-out ones are told by a hash of their name."""

    kind: str
    name: str
    content: str

    @property
    def draw(self) -> int:
        """A number that decides what the document is for."""
        return int.from_bytes(hashlib.sha256(f"{self.kind} {self.name}".encode()).digest()[:4])


def texts() -> Iterator[Text]:
    """Every document, in an order that does not depend on the file system."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    seen: set[str] = set()
    for text in _texts(library, packages):
        if len(text.content) >= SHORTEST and text.content not in seen:
            seen.add(text.content)
            yield Text(text.kind, text.name, text.content[:LONGEST])


def _texts(library: Path, packages: Path) -> Iterator[Text]:
    for name, content in sorted(topics.topics.items()):
        yield Text("prose", name, content)
    for path in sorted(packages.glob("*.dist-info/METADATA")):
        readme = path.read_text(errors="replace").partition("\n\n")[2]
        yield Text("prose", path.parent.name.partition("-")[0], readme)
    for path in _modules(library):
        source = path.read_text(errors="replace")
        yield Text("code", str(path.relative_to(library)), source)
        yield Text("docstrings", str(path.relative_to(library)), _docstrings(source))
    for package in PACKAGES:
        for path in _modules(packages / package):
            source = path.read_text(errors="replace")
            yield Text("docstrings", str(path.relative_to(packages)), _docstrings(source))


def _modules(root: Path) -> list[Path]:
    excluded = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not excluded.intersection(path.relative_to(root).parts)
    ]


def _docstrings(source: str) -> str:
    """Of a module, its classes and functions; empty if it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def tokenizer() -> tiktoken.Encoding:
    """Qwen's byte-level BPE, without special tokens."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "requirements/bench.txt has it"
    assert spec.origin is not None
    lines = (Path(spec.origin).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return tiktoken.Encoding("qwen", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={})


def tokens(documents: list[Text]) -> list[npt.NDArray[np.int64]]:
    encoded = tokenizer().encode_ordinary_batch([text.content for text in documents])
    return [np.array(ids, np.int64) for ids in encoded]
