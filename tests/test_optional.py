"""A module that is not installed is None; one that is installed and broken is an error."""

from __future__ import annotations

import sys
import sysconfig

import pytest
import torch

from megatron_replay import kernels
from megatron_replay.errors import ConfigError
from megatron_replay.kernels import ATTENTION, HEAD, SELECTION
from megatron_replay.optim.momentum_step import OPTIMIZER
from megatron_replay.optional import optional_module
from megatron_replay.store.reader import compiled_records

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FINE = torch.zeros(4, 4)
KERNELS = "megatron_replay.kernels"


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """An empty package with a name of its own."""
    name = f"package_of_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / name


def test_what_is_not_there_is_none(package):
    assert optional_module("no_such_package", install="") is None
    assert optional_module(f"{package.name}.part", install="") is None
    (package / "part.py").write_text("x = 1")
    assert optional_module(f"{package.name}.part", install="").x == 1


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (f"part{SUFFIX}", "not a library", r"part\..*\.so: (file too short|invalid ELF header)"),
        ("part.cpython-27-x86_64-linux-gnu.so", "", r"part\.cpython-27.* for another Python"),
        ("part.py", "raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("part.py", "raise OSError('libhccl.so: no such file')", "libhccl.so: no such file"),
        ("part.py", "import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_what_is_broken_is_an_error(package, file, content, reason):
    (package / file).write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        optional_module(f"{package.name}.part", install="pip install part")
    assert str(caught.value).startswith(f"{package.name}.part: ")
    assert "pip install part" in str(caught.value)


class Broken:
    """Finds a module whose library is missing."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ImportError("libthis.so: cannot open shared object file")


@pytest.mark.parametrize(
    ("module", "use"),
    [
        (f"{KERNELS}._cpu", lambda: HEAD.resolve("auto", FINE)),
        (f"{KERNELS}._cpu", lambda: HEAD.describe("auto", FINE)),
        (f"{KERNELS}._cpu", lambda: OPTIMIZER.choose("auto", FINE)),
        (f"{KERNELS}._cpu", lambda: SELECTION.choose("cpu", FINE)),
        (f"{KERNELS}._ascend", lambda: HEAD.why_not("ascend")),
        ("torch_npu", lambda: ATTENTION.why_not("ascend")),
        ("triton", lambda: OPTIMIZER.why_not("triton")),
        ("megatron_replay.store._records", compiled_records),
    ],
)
def test_no_broken_backend_is_replaced_by_another(monkeypatch, module, use):
    caches = (kernels.load, compiled_records)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(module), *sys.meta_path])
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(ConfigError, match=rf"^{module}: .*libthis\.so"):
            use()
    finally:
        for cache in caches:
            cache.cache_clear()
