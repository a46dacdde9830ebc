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
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-fvisibility=hidden", "-fno-gnu-unique"]
#: Cases of a usual size need the optimizer; what runs once, on a small case, is compiled faster.
OPTIMIZED, QUICK = "-O1", "-O0"


class CompileError(Exception):
    """What the compiler says."""


class Compiler:
    """g++ with the emulator's header precompiled, and the objects that no mutant changes."""

    def __init__(self, folder: Path) -> None:
        self.gxx = shutil.which(os.environ.get("CXX", "g++"))
        assert self.gxx, "the emulated NPU needs g++; on Debian: apt-get install g++"
        self.folder = folder
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._precompile, (OPTIMIZED, QUICK)))
            host = pool.map(lambda source: self._compile(source, source.stem, []), HOST)
            kernels = pool.map(self.kernel, KERNELS)
            self.host, self.kernels = list(host), dict(zip(KERNELS, kernels, strict=True))

    def kernel(
        self, source: Path, *, name: str = "", first: Path | None = None, level: str = OPTIMIZED
    ) -> Path:
        """The object of a kernel; headers in ``first`` are taken before all others."""
        folders = [first, self.folder / level, INCLUDE, CSRC / "common"]
        options = [level, *(f"-I{folder}" for folder in folders if folder)]
        # On a device a kernel is a program of its own: it must not use another's inline functions.
        options.append(f"-Dreplay=replay_{source.stem}")
        return self._compile(source, name or source.stem, options)

    def module(self, name: str, kernels: dict[Path, Path] | None = None) -> ModuleType:
        """The operators, with some of the kernels' objects replaced."""
        library = self.folder / name / "_ascend.so"
        library.parent.mkdir()
        objects = [*self.host, *(self.kernels | (kernels or {})).values()]
        self._run(["-shared", *map(str, objects), "-o", str(library)])
        # pybind11 gives out one module for one full name.
        full_name = f"{name}._ascend"
        loader = importlib.machinery.ExtensionFileLoader(full_name, str(library))
        spec = importlib.util.spec_from_loader(full_name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def _precompile(self, level: str) -> None:
        header = self.folder / level / "kernel_operator.h"
        header.parent.mkdir()
        # g++ takes header.gch for it where the options are the same, and needs the header as well.
        header.write_text(f'#include "{INCLUDE / header.name}"\n')
        self._run([*FLAGS, level, f"-I{INCLUDE}", "-x", "c++-header", str(header)])

    def _compile(self, source: Path, name: str, options: list[str]) -> Path:
        target = self.folder / f"{name}.o"
        if not options:
            python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
            folders = [INCLUDE, CSRC / "common", *(kernel.parent for kernel in KERNELS)]
            options = [OPTIMIZED, *(f"-I{folder}" for folder in folders)]
            options += [f"-isystem{folder}" for folder in python]
        self._run([*FLAGS, *options, "-c", str(source), "-o", str(target)])
        return target

    def _run(self, arguments: list[str]) -> None:
        run = subprocess.run([str(self.gxx), *arguments], capture_output=True, text=True)
        if run.returncode:
            raise CompileError(run.stderr)
