"""Compares the stand-in's functions with wheels of torch_npu, which are read and not run.

    pip download --no-deps --python-version 3.11 --only-binary :all: torch_npu==2.13.0
    python -m tests.npu_stub.check_wheels torch_npu-*.whl

Last run on the wheels of 2.9.0.post6, 2.12.0 and 2.13.0. Earlier ones have operators with fewer
optional arguments, none of which is given here, and no ``mm.dtype``. Needs neither CANN nor an NPU:
a wheel has its Python sources, and schemas in a list of operators.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from pathlib import Path

from tests.npu_stub import fusion_attention, layers

STUB = Path(__file__).parent / "path" / "torch_npu" / "npu.py"
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
OURS = {"device_was_set"}
#: torch's own operator, which ``loss.blocks`` calls where the device has it.
PRODUCT = "mm.dtype(Tensor self, Tensor mat2, ScalarType output_dtype) -> Tensor"


def definitions(source: str) -> dict[str, str]:
    """Parameters without annotations of a module's functions, and of its classes' methods."""
    found = {}
    for node in ast.parse(source).body:
        inner = [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                for argument in ast.walk(function.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None
                found[prefix + function.name] = ast.unparse(function.args)
    return found


def differences(wheel: Path) -> list[str]:
    """Each function of the stand-in that the wheel does not have with these parameters."""
    theirs: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"torch_npu/npu/\w+\.py", name):
                theirs |= definitions(archive.read(name).decode())
        schemas = archive.read(SCHEMAS).decode()
    ours = definitions(STUB.read_text())
    found = [
        f"{wheel.name}: torch.npu.{name}({theirs.get(name)}), here ({parameters})"
        for name, parameters in ours.items()
        if name not in OURS and theirs.get(name) != parameters
    ]
    theirs_by_name = {x.partition("(")[0]: x for x in re.findall(r"func: ([\w.]+\(.*)", schemas)}
    for schema in (fusion_attention.SCHEMA, *layers.SCHEMAS, PRODUCT):
        schema_there = theirs_by_name.get(schema.partition("(")[0])
        if schema_there != schema:
            found.append(f"{wheel.name}: {schema_there}, here {schema}")
    return found


if __name__ == "__main__":
    wrong = [line for wheel in sys.argv[1:] for line in differences(Path(wheel))]
    print("\n".join(wrong) or f"{len(sys.argv) - 1} wheels agree")
    sys.exit(bool(wrong))
