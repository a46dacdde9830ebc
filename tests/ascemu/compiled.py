"""Compiles csrc/ascend for an emulated NPU: the project's own kernels, host code and bindings."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
CSRC = HERE.parents[1] / "csrc" / "ascend"
GATHER_DOT = CSRC / "gather_dot" / "gather_dot_kernel.cpp"
SEGMENT_AXPY = CSRC / "segment_axpy" / "segment_axpy_kernel.cpp"
KERNELS = (GATHER_DOT, SEGMENT_AXPY)
HOST = (
    CSRC / "bindings.cpp",
    CSRC / "gather_dot" / "gather_dot.cpp",
    CSRC / "segment_axpy" / "segment_axpy.cpp",
    HERE / "launches.cpp",
)
# Modules of many mutants are loaded at once, and must not share the emulator's state: hidden,
# and none of g++'s symbols that are unique in a process.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-fvisibility=hidden", "-fno-gnu-unique"]


class CompileError(Exception):
    """What the compiler says."""


class Compiler:
    """g++ with the emulator's header precompiled, and the objects that no mutant changes."""

    def __init__(self, folder: Path) -> None:
        self.gxx = shutil.which(os.environ.get("CXX", "g++"))
        assert self.gxx, "the emulated NPU needs g++; on Debian: apt-get install g++"
        self.folder = folder
        header = folder / "kernel_operator.h"
        header.write_text("#include_next <kernel_operator.h>\n")
        self._run([*FLAGS, f"-I{folder}", f"-I{INCLUDE}", "-x", "c++-header", str(header)])
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(self.object, (*HOST, *KERNELS)))
        self.host = objects[: len(HOST)]
        self.kernels = dict(zip(KERNELS, objects[len(HOST) :], strict=True))

    def object(self, source: Path, name: str | None = None, *first: Path) -> Path:
        """Compile one source; headers in ``first`` are taken before all others."""
        target = self.folder / f"{name or source.name}.o"
        python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        ours = [self.folder, INCLUDE, CSRC / "common", *(p.parent for p in KERNELS)]
        include = [f"-I{folder}" for folder in (*first, *ours)]
        system = [f"-isystem{folder}" for folder in python]
        self._run([*FLAGS, *include, *system, "-c", str(source), "-o", str(target)])
        return target

    def module(self, name: str, kernels: dict[Path, Path] | None = None) -> ModuleType:
        """The operators, with some of the kernels' objects replaced."""
        library = self.folder / name / "_ascend.so"
        library.parent.mkdir()
        objects = [*self.host, *(self.kernels | (kernels or {})).values()]
        self._run(["-shared", *map(str, objects), "-o", str(library)])
        loader = importlib.machinery.ExtensionFileLoader("_ascend", str(library))
        spec = importlib.util.spec_from_loader("_ascend", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def _run(self, arguments: list[str]) -> None:
        run = subprocess.run([str(self.gxx), *arguments], capture_output=True, text=True)
        if run.returncode:
            raise CompileError(run.stderr)
