"""Questions with four options: what a documented name does, and what a base model can do at all.

Facts are pairs of a name and the first sentence of its documentation, from Python itself. Those of
modules about communication are the domain, in place of a telecom's: the base model never reads
these modules, but three of the study's forty sentences are in other modules, too. The other three
kinds of questions are general abilities, which fine-tuning may cost.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.quickstart.general_text import python_files

#: Modules about communication, by file or folder of the standard library.
COMMUNICATION = frozenset(
    """asynchat.py asyncio asyncore.py cgi.py email ftplib.py http imaplib.py ipaddress.py
    mailbox.py mailcap.py netrc.py nntplib.py poplib.py selectors.py smtpd.py smtplib.py socket.py
    socketserver.py ssl.py telnetlib.py urllib webbrowser.py wsgiref xmlrpc""".split()
)
OPTIONS = 4


#: One question: ``prompt``, ``options``, and in ``answer`` the index of the right option.
ChoiceRow = dict[str, Any]
#: A name and what it does.
Fact = tuple[str, str]


def facts(*, communication: bool) -> list[Fact]:
    """Facts of the modules about communication, or of all others; no name or sentence twice."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    sentences: set[str] = set()
    for path in python_files(folder):
        if (path.relative_to(folder).parts[0] in COMMUNICATION) != communication:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            does = paragraph.split(". ")[0].rstrip(".")
            is_new = node.name not in found and does not in sentences
            if is_new and node.name[0] != "_" and len(node.name) <= 20 and 25 <= len(does) <= 80:
                found[node.name] = does
                sentences.add(does)
    return list(found.items())


def questions(known: Sequence[Fact], others: Sequence[str], *, seed: int) -> list[ChoiceRow]:
    """One question for each fact; the wrong options are drawn from ``others``."""
    rng = random.Random(seed)
    rows = []
    for name, does in known:
        row = _row("", name, _without(name, others, rng), rng)
        row["prompt"] = f"what does this: {does}\noptions: {', '.join(row['options'])}\n"
        rows.append(row)
    return rows


def _without(name: str, names: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample([other for other in names if other != name], OPTIONS - 1)


#: Ways to ask for a name: those of training, and those of the test.
_BEFORE = ("", "question: ", "task: ", "note: ", "help: ")
_BEHIND = (": which name?", " - called", " = ?")
TEMPLATES = tuple(before + "{does}" + behind for before in _BEFORE for behind in _BEHIND)
TEST_TEMPLATES = ("name the one for: {does}", "who does this? {does}", "search: {does}, found:")


def recall(known: Sequence[Fact], *, seed: int) -> tuple[list[dict[str, str]], list[ChoiceRow]]:
    """(train, test): each fact in every training template, and in every test template with options.

    The options are not in the prompt, so only a model that has read the facts can answer.
    """
    rng = random.Random(seed)
    train = [
        {"prompt": template.format(does=does) + "\n", "completion": name}
        for name, does in known
        for template in TEMPLATES
    ]
    names = [name for name, _ in known]
    test = [
        _row(template.format(does=does) + "\n", name, _without(name, names, rng), rng)
        for template in TEST_TEMPLATES
        for name, does in known
    ]
    return train, test


def as_training_row(row: ChoiceRow) -> dict[str, str]:
    """The prompt, and the right option to be completed with."""
    return {"prompt": row["prompt"], "completion": row["options"][row["answer"]]}


def _row(prompt: str, right: str, wrong: Sequence[str], rng: random.Random) -> ChoiceRow:
    options = [right, *wrong]
    rng.shuffle(options)
    return ChoiceRow(prompt=prompt, options=options, answer=options.index(right))


def arithmetic(*, seed: int) -> list[ChoiceRow]:
    """Every sum of two numbers up to 20, in a random order; wrong options are near."""
    rng = random.Random(seed)
    rows = []
    for a, b in itertools.product(range(21), repeat=2):
        near = [a + b + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if a + b + d >= 0]
        wrong = [str(n) for n in rng.sample(near, OPTIONS - 1)]
        rows.append(_row(f"add {a} and {b}: ", str(a + b), wrong, rng))
    rng.shuffle(rows)
    return rows


def copying(words: Sequence[str], count: int, *, seed: int) -> list[ChoiceRow]:
    """Repeat four words in their order; wrong options change two places, or one word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        chosen = rng.sample(words, 5)
        right, spare = chosen[:4], chosen[4]
        first, second, third = rng.sample([(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)], 3)
        wrong = [_swapped(right, *first), _swapped(right, *second)]
        replaced = list(right)
        replaced[third[0]] = spare
        texts = [" ".join(option) for option in (right, *wrong, replaced)]
        rows.append(_row(f"repeat {texts[0]}: ", texts[0], texts[1:], rng))
    return rows


def _swapped(words: Sequence[str], a: int, b: int) -> list[str]:
    swapped = list(words)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def cloze(documents: Sequence[str], count: int, *, seed: int) -> list[ChoiceRow]:
    """The next word of a held-out text; wrong options are words of the same text.

    Raises:
        ValueError: there are fewer fitting texts than ``count``.
    """
    rng = random.Random(seed)
    rows: list[ChoiceRow] = []
    for text in documents:
        words = [m for m in re.finditer(r"(?<= )[a-z]{4,}(?=[ .,])", text) if m.start() > 120]
        distinct = sorted({m.group() for m in words})
        if len(distinct) < 8 or len(rows) == count:
            continue
        hidden = rng.choice(words)
        wrong = rng.sample([word for word in distinct if word != hidden.group()], OPTIONS - 1)
        # The space belongs to the option: byte-level BPE has no token for a word without it.
        before = text[max(0, hidden.start() - 240) : hidden.start() - 1]
        options = [f" {word}" for word in wrong]
        rows.append(_row(before, f" {hidden.group()}", options, rng))
    if len(rows) < count:
        raise ValueError(f"{count} texts needed, {len(rows)} fit")
    return rows
