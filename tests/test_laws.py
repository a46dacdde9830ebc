"""The four laws of the house (CONTRIBUTING.md), read off the source of every module."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_replay", "tools", "examples")
STAGES = {"stage0": 0, "collection": 0, "stage1": 1, "training": 1}
#: A module imports from its own row or one above. "" is the package's __init__.
LAYERS = [
    {"errors", "files", "locks", "optional", "progress", ""},
    {"config", "flags", "cli"},
    {"selection", "loss", "store", "platform"},
    {"parallel", "kernels", "optim", "data", "model", "checkpoint", "forward", "run_log"},
    {"functional", "estimate", "collection", "training"},
    {"stage0", "stage1", "evaluation"},
    {"tools", "examples"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FORBIDDEN = {
    "functional": {"megatron"},
    "selection": {"megatron"},
    "loss": {"megatron"},
    "store": {"torch", "megatron"},
}
DEVICES = re.compile(r"\b(cuda|npu|hccl|nccl|torch_npu)\b")


def part_of(module: str) -> str:
    """megatron_replay.optim.moclip -> optim; tools.report -> tools."""
    first, *rest = module.split(".")
    return first if first != "megatron_replay" else (rest or [""])[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import, wherever it stands; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def words(tree: ast.AST) -> Iterator[str]:
    """Identifiers, attributes, modules and strings; a bare string is documentation."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


def broken_laws(module: str, source: str) -> list[str]:
    """The laws that ``module``, with this source, breaks: number and reason."""
    tree, part, broken = ast.parse(source), part_of(module), []
    for name in imported(tree):
        top, target = name.split(".")[0], part_of(name)
        if top in FORBIDDEN.get(part, ()):
            broken.append(f"2: {module} imports {top}")
        if top not in FOLDERS or (top, part) == ("examples", "examples"):
            continue
        if part in STAGES and STAGES.get(target, STAGES[part]) != STAGES[part]:
            broken.append(f"1: {module} imports {target} of the other stage")
        # ``from megatron_replay import __version__`` names the package itself.
        if LEVEL[part] < LEVEL.get(target, LEVEL[""]):
            broken.append(f"4: {module} imports {target} from a layer below")
    if part not in ("platform", "kernels"):
        found = sorted({match[0] for word in words(tree) for match in DEVICES.finditer(word)})
        broken += [f"3: {module} names {device}" for device in found]
    return broken


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_module_keeps_the_laws():
    found = list(modules())
    assert len(found) > 50
    assert {part_of(name) for name, _ in found} <= LEVEL.keys(), "a part without a layer"
    broken = [law for name, path in found for law in broken_laws(name, path.read_text("utf-8"))]
    assert not broken, "\n".join(broken)


def test_no_two_parts_import_each_other():
    """Within a row of the table, too, there is an order."""
    above: dict[str, set[str]] = {}
    for name, path in modules():
        ours = (i for i in imported(ast.parse(path.read_text("utf-8"))) if i.startswith(FOLDERS))
        targets = {part_of(target) for target in ours} & LEVEL.keys()
        above.setdefault(part_of(name), set()).update(targets - {part_of(name)})
    graphlib.TopologicalSorter(above).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("module", "source", "law"),
    [
        ("collection.run", "from megatron_replay.training import train", 1),
        ("stage1", "def f():\n    from megatron_replay import stage0", 1),
        ("selection.candidates", "import megatron.core", 2),
        ("store.reader", "from torch import Tensor", 2),
        ("model.gpt", "x = tensor.cuda()", 3),
        ("parallel", "backend = 'cpu:gloo,cuda:nccl'", 3),
        ("training.train", "import torch_npu", 3),
        ("data.rows", "def f(npu): ...", 3),
        ("optim.moclip", "from megatron_replay.training.step import train_step", 4),
        ("errors", "import megatron_replay.config", 4),
        ("training.monitor", "from megatron_replay.evaluation import report", 4),
        ("data.corpus", "import tools.report", 4),
        ("stage0", "from examples.quickstart import network", 4),
    ],
)
def test_a_broken_law_is_seen(module, source, law):
    broken = broken_laws(f"megatron_replay.{module}", source)
    assert broken
    assert {line[0] for line in broken} == {str(law)}


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("store", "torch"),
        ("selection.candidates", "megatron"),
        ("loss.divergence", "megatron"),
        ("optim", "megatron"),
    ],
)
def test_a_package_loads_without(package, absent):
    """What the imports of its imports bring along counts too."""
    code = f"import sys, megatron_replay.{package}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
