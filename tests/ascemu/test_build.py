"""The build of csrc/ascend against a stand-in for CANN, and its one-line error without CANN."""

from __future__ import annotations

import importlib.util
import runpy
import shutil

import pytest
import torch

from megatron_replay.kernels.ascend_head import PairOperators
from tests.ascemu import cases
from tests.ascemu.compiled import CSRC, HERE, INCLUDE

#: What the build needs of CANN: the setting that it leaves, and its CMake functions, which here
#: compile the kernels for the emulator.
ASCENDC = f"""
set(CMAKE_SKIP_RPATH TRUE)
if(NOT CMAKE_GENERATOR STREQUAL "Unix Makefiles")
  message(FATAL_ERROR "no link.txt of ${{CMAKE_GENERATOR}}")
endif()
function(ascendc_library name kind)
  add_library(${{name}} ${{kind}} ${{ARGN}} {HERE}/launches.cpp)
  target_include_directories(${{name}} PRIVATE {INCLUDE})
  target_compile_options(${{name}} PRIVATE -O0 -fno-gnu-unique)
endfunction()
function(ascendc_include_directories name)
  target_include_directories(${{name}} ${{ARGN}})
endfunction()
"""
PLACES = (
    "tools/tikcpp/ascendc_kernel_cmake",
    "compiler/tikcpp/ascendc_kernel_cmake",
    "tools/tikcpp/ascendc_kernel_cmake/legacy_modules",
)
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def build(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    module = runpy.run_path(str(CSRC / "build.py"))
    return module["build"](tmp_path / "output", tmp_path / "temp")


def put_ascendc(tmp_path, where: str, text: str):
    folder = tmp_path / "cann" / where
    folder.mkdir(parents=True)
    (folder / "ascendc.cmake").write_text(text)


@needs_cmake
@pytest.mark.parametrize("where", PLACES)
def test_cann_is_found_where_its_releases_put_it(tmp_path, monkeypatch, where):
    put_ascendc(tmp_path, where, 'message(FATAL_ERROR "taken from ${CMAKE_CURRENT_LIST_DIR}")')
    assert f"found taken from {tmp_path}/cann/{where})" in one_line(build(tmp_path, monkeypatch))


@needs_cmake
def test_the_built_module_computes(tmp_path, monkeypatch):
    put_ascendc(tmp_path, PLACES[1], ASCENDC)
    monkeypatch.setenv("CMAKE_GENERATOR", "Ninja")
    shutil.copytree(INCLUDE / "acl", tmp_path / "cann" / "include" / "acl")
    libraries = tmp_path / "cann" / "lib64"
    libraries.mkdir()
    (libraries / "libascendcl.so").write_text("")  # an empty linker script
    assert build(tmp_path, monkeypatch) is None, (tmp_path / "temp/build.log").read_text()
    (path,) = (tmp_path / "output").glob("_ascend.*.so")
    assert (tmp_path / "output" / "libmegatron_replay_ascend.so").exists()
    spec = importlib.util.spec_from_file_location("built._ascend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = cases.make([3, 0, 2], 7, 40).to(torch.bfloat16)
    cases.require_right(cases.run(case, PairOperators(module)), case)
    cases.require_same_selection(case.weight_VH, module)


def one_line(failure: str) -> str:
    (line,) = failure.splitlines()
    assert line.startswith("error: csrc/ascend: the kernels for NPUs cannot be built (expected")
    assert "unset ASCEND_HOME_PATH to install without" in line
    return line


@needs_cmake
def test_without_cann(tmp_path, monkeypatch):
    line = one_line(build(tmp_path, monkeypatch))
    assert f"found no ascendc.cmake in {tmp_path}/cann" in line
    assert f"{tmp_path}/temp/build.log has the rest" in line


def test_without_cmake(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "found no cmake" in one_line(build(tmp_path, monkeypatch))
