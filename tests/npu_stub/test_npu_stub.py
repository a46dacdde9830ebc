"""Both stages on a stand-in for torch_npu: our calls exist, tensors lie where they must, and no
operator or collective is one that NPUs refuse.

What this cannot show: that an NPU computes what a CPU does, that CANN accepts the shapes, any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.npu_stub import rules

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Left as they are, see docs/ascend-ops.md; the list may only shrink. torch sends objects with
#: their sizes as int64.
KNOWN = {
    "allgather_ of torch.int64": (" by all_gather_object", " by gather_object"),
}


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """What tests.npu_stub.journey found."""
    folder = tmp_path_factory.mktemp("npu")
    tiny.save_corpus(folder / "corpus", num_documents=24)
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2)
    path = os.pathsep.join([str(ROOT), str(HERE / "path")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.npu_stub.journey", folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()) | {"said": done.stdout + done.stderr}


@pytest.mark.distributed
def test_both_stages_run_to_the_end(journey):
    assert set(journey["codes"]) == {0}, journey["said"]
    assert "restricted head: ascend kernels" in journey["said"]
    assert "resuming" in journey["said"]
    assert "Warning" not in journey["said"]  # transfer_to_npu would show them all


@pytest.mark.distributed
def test_nothing_an_npu_refuses_beyond_what_is_listed(journey):
    unknown = [
        (rule, place)
        for rule, place, _ in journey["found"]
        if not any(place.endswith(known) for known in KNOWN.get(rule, ()))
    ]
    assert not unknown, unknown
    gone = KNOWN.keys() - {rule for rule, _, _ in journey["found"]}
    assert not gone, f"take it out of the list, and of docs/ascend-ops.md: {gone}"


@pytest.mark.distributed
def test_what_we_call_is_the_same_in_every_recorded_release(journey):
    record = json.loads((HERE / "signatures.json").read_text())
    expected = {"set_device", "get_rng_state", "current_stream", "npu_fusion_attention"}
    assert expected <= journey["calls"].keys()
    for name in journey["calls"]:
        found = (record["signatures"] | record["operators"])[name]
        assert list(found) == record["versions"], name
        assert len(set(found.values())) == 1, (name, found)


@pytest.mark.distributed
def test_the_doctor_examines_npus(journey):
    (two, added), (head, compared) = journey["doctor"]
    assert (two, head) == ("ok", "ok"), journey["doctor"]
    assert added.startswith("1 + 2 = 3")
    assert compared.startswith("ascend form on npu")


@pytest.mark.distributed
def test_the_guard_sees_what_it_must(journey):
    """Misdeeds done on purpose, in the same interpreter."""
    assert journey["misdeeds"] == [
        "numpy() of a tensor on the device",
        "aten::add of tensors on the device and on the host",
        "aten::topk(sorted=False)",
        "aten::mul of tensors on the device and on the host",
    ]
    assert journey["wrong_calls"] == ["AttributeError", "TypeError", "TypeError"]
    assert journey["modules"] == [], "MindSpeed is not ours to import"


X = torch.zeros(4, 4)
BOOL = X.bool()


@pytest.mark.parametrize(
    ("name", "args", "broken"),
    [
        ("aten::topk", (X, 2, 1, True, False), True),
        ("aten::topk", (X, 2), False),
        ("aten::sort", (X.double(),), True),
        ("aten::sort", (X.int(),), True),
        ("aten::sort", (X,), False),
        ("aten::argsort", (X.bfloat16(),), True),
        ("aten::index_select", (X.double(), 0, torch.zeros(1)), True),
        ("aten::logsumexp", (X.bfloat16(), [1]), True),
        ("aten::searchsorted", (X.bfloat16(), X), True),
        ("aten::atan2", (X.double(), X.double()), True),
        ("aten::atan2", (X, X), False),
        ("aten::scatter_add_", (X.long(), 0, X.long(), X.long()), True),
        ("aten::scatter_add_", (X.int(), 0, X.long(), X.int()), False),
        ("aten::index_put_", (X, [BOOL], X), True),
        ("aten::index_put_", (X, [X.long()], X), False),
        ("c10d::allreduce_", ([X.double()],), True),
        ("c10d::allreduce_", ([X.long()],), False),
        ("c10d::allreduce_", ([X[:, 0]],), True),
        ("c10d::allgather_", ([[X.long()]], [X.long()]), True),
        ("c10d::_reduce_scatter_base_", (X.double(), X.double()), True),
        ("c10d::_allgather_base_", (X, X), False),
    ],
)
def test_rules(name, args, broken):
    assert (rules.of_operator(name, args, {}) is not None) is broken


def test_take_along_dim_is_for_fp32():
    assert rules.of_function("take_along_dim", (X.bfloat16(),))
    assert not rules.of_function("take_along_dim", (X,))
