"""Both stages on a stand-in for torch_npu: the functions we call exist, tensors are on the right
device, and no operator or collective is one that NPUs refuse.

This cannot show that an NPU computes what a CPU does, that CANN accepts the shapes, or any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Findings that stay, with their reason in docs/ascend.md; the list may only shrink. torch sends
#: the sizes of objects as int64.
KNOWN = {"allgather_ of torch.int64": (" by all_gather_object", " by gather_object")}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The findings of tests.npu_stub.journey."""
    folder = tmp_path_factory.mktemp("npu")
    tiny.save_corpus(folder / "corpus", num_documents=24)
    # More blocks of ids than candidates on each of two ranks.
    tiny.save_qwen3(folder / "model", tied=True, num_hidden_layers=2, vocab_size=1 << 15)
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


def test_both_stages_run_to_the_end(journey):
    assert set(journey["codes"]) == {0}, journey["said"]
    assert "restricted head: ascend kernels" in journey["said"]
    assert "candidate selection: ascend kernels" in journey["said"]
    assert "selection: the bits of torch" in journey["said"]
    fused = {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"}
    assert journey["calls"].keys() == fused
    assert "full softmax: products of torch.bfloat16, summed in fp32" in journey["said"]
    assert "resuming" in journey["said"]
    assert "Warning" not in journey["said"]  # transfer_to_npu would show them all
    assert journey["mindspeed"] == [], "MindSpeed was imported"


def test_no_finding_beyond_the_known_ones(journey):
    unknown = [
        (rule, place)
        for rule, place in journey["found"]
        if not any(place.endswith(known) for known in KNOWN.get(rule, ()))
    ]
    assert not unknown, unknown
    gone = KNOWN.keys() - {rule for rule, _ in journey["found"]}
    assert not gone, f"remove from the list and from docs/ascend.md: {gone}"


def test_the_doctor_examines_npus(journey):
    (two, added, _), (head, compared, _), *kernels = journey["doctor"]
    assert (two, head) == ("ok", "ok"), journey["doctor"]
    assert added.startswith("1 + 2 = 3")
    assert compared.startswith("ascend ")
    assert "kernels of norm, activation and rotation" in [subject for *_, subject in kernels]
    assert {(status, found) for status, found, _ in kernels} == {("ok", "ascend")}


def test_the_doctor_compares_each_layer_with_the_cpu(journey):
    subjects = [subject for subject, *_ in journey["layers"]]
    assert subjects == ["embedding", "layer 0", "layer 1", "head"], journey["layers"]
    for _, status, found in journey["layers"]:
        assert status == "ok", found
        assert found.startswith("npu in bf16: activations ")
    assert "activations 0.0e+00" not in journey["layers"][-1][2]  # it did round


def test_the_guard_finds_mistakes(journey):
    assert journey["misdeeds"] == [
        "numpy() of a tensor on the device",
        "aten::add of tensors on the device and on the host",
        "aten::topk(sorted=False)",
        "aten::sort of torch.int32: AICPU",
        "aten::topk of torch.int64: AICPU",
        "aten::__lshift__ of torch.int32: AICPU",
        "aten::bitwise_right_shift_ of torch.int32: AICPU",
        "aten::cumsum of torch.int64: AICPU",
        "aten::searchsorted of torch.float32: AICPU",
        "aten::_unique2 of torch.float32: AICPU",
        "aten::_to_copy of torch.float64: AICPU",
        "aten::mul of tensors on the device and on the host",
    ]
