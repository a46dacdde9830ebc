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
SELECT_CANDIDATES = CSRC / "select_candidates" / "select_candidates_kernel.cpp"
KERNELS = (GATHER_DOT, SEGMENT_AXPY, SELECT_CANDIDATES)
HOST = (
    CSRC / "bindings.cpp",
    CSRC / "gather_dot" / "gather_dot.cpp",
    CSRC / "segment_axpy" / "segment_axpy.cpp",
    CSRC / "select_candidates" / "select_candidates.cpp",
    HERE / "launches.cpp",
)
# make mutation loads many modules at once, which must not share the emulator's state: symbols are
# hidden, and none of those that g++ makes unique in a process.
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-fvisibility=hidden", "-fno-gnu-unique"]
#: Cases of usual size need g++'s optimizer; a mutant runs once, on small cases.
OPTIMIZED, QUICK = "-O1", "-O0"


class CompileError(Exception):
    """The compiler's message."""


class Compiler:
    """g++ with the emulator's header precompiled, and the objects of the unchanged sources.

    What is in ``folder`` was made by another one from the same sources, and is used again.
    """

    def __init__(self, folder: Path) -> None:
        self.gxx = shutil.which(os.environ.get("CXX", "g++"))
        assert self.gxx, "the emulated NPU needs g++; on Debian: apt-get install g++"
        self.folder = folder
        self.precompile(OPTIMIZED)
        with ThreadPoolExecutor(2) as pool:
            host = pool.map(lambda source: self._compile(source, source.stem, []), HOST)
            kernels = pool.map(self.kernel, KERNELS)
            self.host, self.kernels = list(host), dict(zip(KERNELS, kernels, strict=True))

    def kernel(
        self, source: Path, *, name: str = "", first: Path | None = None, level: str = OPTIMIZED
    ) -> Path:
        """Compile a kernel to an object file; headers in ``first`` come before all others."""
        folders = [first, self.folder / level, INCLUDE, CSRC / "common"]
        options = [level, *(f"-I{folder}" for folder in folders if folder)]
        # On a device a kernel is a program of its own: the linker must not merge inline functions.
        options.append(f"-Dreplay=replay_{source.stem}")
        return self._compile(source, name or source.stem, options)

    def module(self, name: str, kernels: dict[Path, Path] | None = None) -> ModuleType:
        """Link and load the operators, with some of the kernels' objects replaced."""
        library = self.folder / name / "_ascend.so"
        library.parent.mkdir(exist_ok=True)
        objects = [*self.host, *(self.kernels | (kernels or {})).values()]
        if not library.exists():
            self._run(["-shared", *map(str, objects), "-o", str(library)])
        # pybind11 keeps one module for each full name.
        full_name = f"{name}._ascend"
        loader = importlib.machinery.ExtensionFileLoader(full_name, str(library))
        spec = importlib.util.spec_from_loader(full_name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def precompile(self, level: str) -> None:
        """The emulator's header, for kernels that are compiled at ``level``."""
        header = self.folder / level / "kernel_operator.h"
        if header.exists():
            return
        header.parent.mkdir(parents=True)
        # g++ uses header.gch where the options are the same, and needs the header as well.
        header.write_text(f'#include "{INCLUDE / header.name}"\n')
        self._run([*FLAGS, level, f"-I{INCLUDE}", "-x", "c++-header", str(header)])

    def _compile(self, source: Path, name: str, options: list[str]) -> Path:
        target = self.folder / f"{name}.o"
        if not options:
            python = [pybind11.get_include(), sysconfig.get_paths()["include"]]
            folders = [INCLUDE, CSRC / "common", *(kernel.parent for kernel in KERNELS)]
            options = [OPTIMIZED, *(f"-I{folder}" for folder in folders)]
            options += [f"-isystem{folder}" for folder in python]
        if not target.exists():
            self._run([*FLAGS, *options, "-c", str(source), "-o", str(target)])
        return target

    def _run(self, arguments: list[str]) -> None:
        run = subprocess.run([str(self.gxx), *arguments], capture_output=True, text=True)
        if run.returncode:
            raise CompileError(run.stderr)
