"""Builds ``megatron_replay.kernels._ascend`` for setup.py, where ASCEND_HOME_PATH names CANN."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAME = "megatron_replay.kernels._ascend"
#: The kernels: a library that the module loads from its own folder.
KERNELS = "libmegatron_replay_ascend.so"
#: Where the build works. Not in setuptools' folder: an editable install deletes that, with the log.
FOLDER = HERE.parents[1] / "build" / "ascend"


def for_npu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``setup`` that build the kernels for the CPU, with those for NPUs added."""
    from setuptools import Extension

    class Build(arguments["cmdclass"]["build_ext"]):  # type: ignore[misc]
        def build_extension(self, extension: Any) -> None:
            if extension.name != NAME:
                return super().build_extension(extension)
            folder = Path(self.get_ext_fullpath(NAME)).parent
            if failure := build(folder, FOLDER):
                sys.exit(failure)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            # Of an editable install: setuptools copies the module alone.
            package = NAME.rpartition(".")[0]
            source = Path(self.get_finalized_command("build_py").get_package_dir(package))
            shutil.copy2(Path(self.build_lib, *package.split("."), KERNELS), source / KERNELS)

    modules = [*arguments["ext_modules"], Extension(NAME, sources=[])]
    return {**arguments, "ext_modules": modules, "cmdclass": {"build_ext": Build}}


def build(output: Path, folder: Path) -> str | None:
    """Build the module and the kernels' library into ``output``, by way of ``folder``.

    Returns:
        None, or one line with what failed and what to do. The compilers' output goes to build.log
        in ``folder``, which is emptied first: it may be of another CANN.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    output.mkdir(parents=True, exist_ok=True)
    log = (folder / "build.log").resolve()
    settings = {
        "OUTPUT": output.resolve(),
        "MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "Python3_EXECUTABLE": sys.executable,
        "SOC_VERSION": os.environ.get("SOC_VERSION", "Ascend910B3"),
    }
    configure = [f"-D{name}={value}" for name, value in settings.items()]
    cmake = shutil.which("cmake")
    found = "no cmake"
    if cmake is not None:
        # CANN reads the link.txt that only this generator writes: not CMAKE_GENERATOR's.
        source = ["-G", "Unix Makefiles", "-S", str(HERE), "-B", str(folder)]
        steps = [[*source, *configure], ["--build", str(folder)]]
        with log.open("w") as output_log:
            for step in steps:
                if subprocess.run([cmake, *step], stdout=output_log, stderr=output_log).returncode:
                    break
            else:
                return None
        found = _first_error(log.read_text(errors="replace"))
    return (
        "error: csrc/ascend: the kernels for NPUs cannot be built (expected CANN's toolkit in "
        f"ASCEND_HOME_PATH={os.environ.get('ASCEND_HOME_PATH')}, a C++17 compiler and cmake; found "
        f"{found}). {log} has the rest; unset ASCEND_HOME_PATH to install without"
    )


def _first_error(log: str) -> str:
    """What says most: the paragraph below CMake's first line of an error, or a compiler's line."""
    lines = [line.strip() for line in log.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            message, _, _ = "\n".join(lines[i + 1 :]).strip().partition("\n\n")
            return " ".join(message.partition("Call Stack")[0].split()) or line
        if "error:" in line:
            return line
    return "no message"
