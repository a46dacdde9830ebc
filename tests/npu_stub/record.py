"""Record names and signatures of ``torch_npu.npu`` from wheels of torch_npu, without running them.

    pip download --no-deps torch_npu==2.12.0
    pip download --no-deps torch_npu==2.13.0
    python -m tests.npu_stub.record torch_npu-*.whl > tests/npu_stub/signatures.json

A wheel is read as text: neither CANN nor an NPU is needed. Kept are the names in ``__all__``, the
parameters of functions written in Python, and those of the methods of its classes. What comes from
the compiled extension has no text, and is recorded as null: it exists, its parameters are unknown.
Operators that we call, ``torch_npu.NAME``, are kept with the schema that torch_npu registers them
by, which the wheel has in npu_native_functions_by_codegen.yaml.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "torch_npu/npu"
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
OPERATORS = ("npu_fusion_attention",)


def signature(function: ast.FunctionDef) -> str:
    """Its parameters with their defaults and without annotations."""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if "property" in decorators:
        return "property"
    return f"({ast.unparse(function.args)})"


def definitions(source: str) -> dict[str, str]:
    """Of one module: name, or class.method, to signature."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = "class"
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": signature(method) for method in methods}
    return found


def exported(source: str) -> set[str]:
    """The names in a module's ``__all__``, which is written or added to as a list."""
    names = set()
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            names |= set(ast.literal_eval(node.value))
    return names


def recorded(wheel: Path) -> dict[str, str | None]:
    """The public names of ``torch_npu.npu`` in one wheel."""
    with zipfile.ZipFile(wheel) as archive:
        sources = {
            name: archive.read(name).decode()
            for name in archive.namelist()
            if re.fullmatch(rf"{PACKAGE}/\w+\.py", name)
        }
    top = sources[f"{PACKAGE}/__init__.py"]
    known = {}
    for name in sorted(sources, key=lambda name: name.endswith("__init__.py")):  # it has the say
        known |= definitions(sources[name])
    public = exported(top)
    kept = {name: known.get(name) for name in public}
    kept |= {name: known[name] for name in known if name.partition(".")[0] in public}
    return dict(sorted(kept.items()))


def schemas(wheel: Path) -> dict[str, str]:
    """Of OPERATORS, parameters and results as torch's dispatcher is told them."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(SCHEMAS).decode()
    return {name: re.findall(rf"func: {name}(\(.*)", text)[0] for name in OPERATORS}


def main() -> None:
    """Print JSON."""
    wheels = sorted(map(Path, sys.argv[1:]))
    operators = {wheel.name.split("-")[1]: schemas(wheel) for wheel in wheels}
    versions: dict[str, Any] = {wheel.name.split("-")[1]: recorded(wheel) for wheel in wheels}
    names = sorted(set().union(*versions.values()))
    print(
        json.dumps(
            {
                "made_by": "python -m tests.npu_stub.record " + " ".join(w.name for w in wheels),
                "of": "torch_npu.npu",
                "versions": list(versions),
                "signatures": {
                    name: {v: kept[name] for v, kept in versions.items() if name in kept}
                    for name in names
                },
                "operators": {
                    name: {v: kept[name] for v, kept in operators.items()} for name in OPERATORS
                },
            },
            indent=0,
        )
    )


if __name__ == "__main__":
    main()
