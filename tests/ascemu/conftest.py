from __future__ import annotations

import pytest

from tests.ascemu.compiled import Compiler


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    return Compiler(tmp_path_factory.mktemp("ascemu"))


@pytest.fixture(scope="session")
def operators(compiler):
    """The emulated module, of the kernels as they are."""
    return compiler.module("unchanged")
