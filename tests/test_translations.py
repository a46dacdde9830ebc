"""A translated page says what the English page says: same commands, tables, numbers and links.

Below each heading it has the hash of the English section it was made from, so that a change in
English fails here until somebody has looked at the translation.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.markdown import cells

ROOT = Path(__file__).parents[1]
TRANSLATIONS = {"README.md": "README.zh-CN.md", "docs/ascend.md": "docs/ascend.zh-CN.md"}
ORIGINALS = {translation: page for page, translation in TRANSLATIONS.items()}
MADE_FROM = re.compile(r"^<!-- \S+: (\w+) -->\n", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
NAME = re.compile(r"[\w./-]*[_./][\w./-]*\w/?", re.ASCII)  # of a file, in a diagram
NUMBER = re.compile(r"[+−-]?\d+(?:[.,]\d+)*(?:e-?\d+)?")


class Section(NamedTuple):
    level: int
    title: str
    blocks: list[str]  # paragraphs, lists, tables and fenced code

    @property
    def fingerprint(self) -> str:
        words = " ".join([self.title, *self.blocks]).split()  # line breaks do not count
        return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def sections(text: str) -> list[Section]:
    found: list[Section] = []
    for block in re.split(r"^(```.*?^```)$|\n\n+", text, flags=re.MULTILINE | re.DOTALL):
        if heading := re.match(r"(#+) (.*)", block or ""):
            found.append(Section(len(heading[1]), heading[2], []))
            block = block[heading.end() :]
        if block and block.strip():
            found[-1].blocks.append(block.strip())
    return found


def kind(block: str) -> str:
    if block.startswith("```"):
        return block.partition("\n")[0]
    if block.startswith("|"):
        return "table"
    items = re.findall(r"^(?:- |\d+\. )", block, re.MULTILINE)
    return f"list of {len(items)}" if items else "paragraph"


def commands(block: str) -> list[str]:
    """The lines of fenced code without their comments; of a diagram, the names of files."""
    if block.startswith("```\n"):
        return sorted(NAME.findall(block))
    return [re.sub(r"(^|\s+)# .*", "", line) for line in block.splitlines()]


def facts(cell: str) -> list[str]:
    return sorted(CODE.findall(cell) + NUMBER.findall(CODE.sub("", cell)))


def target(link: str, page: str, titles: list[str]) -> str:
    """Where a link leads: a translation counts as its page, an anchor as its heading's number."""
    if "://" in link:
        return link
    file, _, anchor = link.partition("#")
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    if not file and anchor in anchors:
        return f"#{anchors.index(anchor)}"
    file = posixpath.normpath(posixpath.join(posixpath.dirname(page), file))
    if file in TRANSLATIONS or file in ORIGINALS:
        return ORIGINALS.get(file, file)
    return f"{file}#{anchor}"


def said(section: Section, page: str, titles: list[str]) -> dict[str, list[object]]:
    """What a translation must not change."""
    fenced = [block for block in section.blocks if block.startswith("```")]
    tables = [block for block in section.blocks if block.startswith("|")]
    prose = prose_of(section)
    return {
        "blocks": [*map(kind, section.blocks)],
        "commands": [line for block in fenced for line in commands(block)],
        "cells": [[*map(facts, row)] for table in tables for row in cells(table)],
        "code": sorted({" ".join(span.split()) for span in CODE.findall(prose)}),
        "links": sorted({target(link, page, titles) for link in LINK.findall(prose)}),
    }


def prose_of(section: Section) -> str:
    return "\n".join(block for block in section.blocks if not block.startswith("```"))


def numbers(section: Section) -> set[str]:
    return set(NUMBER.findall(LINK.sub("", CODE.sub("", prose_of(section)))))


def differences(page: str, english: str, chinese: str) -> Iterator[str]:
    translation, hashes = TRANSLATIONS[page], MADE_FROM.findall(chinese)
    ours, theirs = sections(english), sections(MADE_FROM.sub("", chinese))
    levels, found_levels = ([section.level for section in s] for s in (ours, theirs))
    if levels != found_levels or len(hashes) != len(levels):
        yield (
            f"{translation}: headings differ from {page} (expected levels {levels}, a hash below "
            f"each; found {found_levels}, {len(hashes)} hashes). Translate the new sections."
        )
        return
    titles, found_titles = ([section.title for section in s] for s in (ours, theirs))
    for one, other, made_from in zip(ours, theirs, hashes, strict=True):
        where = f"{translation}, section {other.title!r}"
        if made_from != one.fingerprint:
            yield (
                f"{where}: its original changed ({page}, section {one.title!r}: expected "
                f"{made_from}; found {one.fingerprint}). Translate the change, then write "
                f"<!-- {page}: {one.fingerprint} --> below the heading."
            )
        wanted, found = said(one, page, titles), said(other, translation, found_titles)
        for what, items in wanted.items():
            if items != found[what]:
                missing = [item for item in items if item not in found[what]]
                extra = [item for item in found[what] if item not in items]
                yield f"{where}: {what} differ in number or order, missing {missing}, extra {extra}"
        if missing := numbers(one) - numbers(other):  # what English spells may be a numeral
            yield f"{where}: numbers in the text are missing: {missing}"


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_a_translation_says_what_its_page_says(page: str) -> None:
    english, chinese = ((ROOT / name).read_text() for name in (page, TRANSLATIONS[page]))
    assert not [*differences(page, english, chinese)]


ENGLISH = """# Title

English | [简体中文](README.zh-CN.md)

## Run it

It takes `--lr 1` and
7 minutes, see [below](#values). Not run on an NPU.

```bash
run --lr 1   # once
```

### Values

| | Δ |
|---|---|
| base | +1.5 |
| tuned, `--tail` | −2.5 |

- one
- two
"""
CHINESE = """# 标题
<!-- README.md: {} -->

[English](README.md) | 简体中文

## 运行
<!-- README.md: {} -->

它接受 `--lr 1`，需 7 分钟，见[下文](#数值)。未在 NPU 上运行。

```bash
run --lr 1   # 一次
```

### 数值
<!-- README.md: {} -->

| | Δ |
|---|---|
| 基座 | +1.5 |
| 微调，`--tail` | −2.5 |

- 一
- 二
""".format(*(section.fingerprint for section in sections(ENGLISH)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("run --lr 1", "run --lr 2"),
        ("run --lr 1   # 一次\n", ""),
        ("`--lr 1`", "`--rl 1`"),
        ("`--lr 1`", "一个参数"),
        ("7 分钟", "8 分钟"),
        ("#数值", "#运行"),
        ("[English](README.md) | ", ""),
        ("+1.5", "−1.5"),
        ("`--tail`", ""),
        ("| 基座 | +1.5 |\n", ""),
        ("`--tail` | −2.5", "−2.5 | `--tail`"),
        ("- 二\n", ""),
        ("### 数值", "## 数值"),
    ],
)
def test_a_changed_translation_is_found(old: str, new: str) -> None:
    assert CHINESE.count(old) == 1
    assert [*differences("README.md", ENGLISH, CHINESE.replace(old, new))]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Not run on an NPU.", "Run on an NPU.", True),
        ("# once", "# twice", True),
        ("- two\n", "- two\n\nMore.\n", True),
        ("and\n7 minutes", "and 7\nminutes", False),
    ],
)
def test_a_changed_original_is_found(old: str, new: str, found: bool) -> None:
    assert ENGLISH.count(old) == 1
    assert bool([*differences("README.md", ENGLISH.replace(old, new), CHINESE)]) == found
