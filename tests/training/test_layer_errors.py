"""The comparison of a device's layers with the CPU's: what counts as an error.

tests/npu_stub runs the passes themselves.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_replay.training.layer_errors import Errors, Pass, errors_of, judge


def test_the_worst_parameter_of_a_part_counts():
    one = torch.ones(4)
    reference = Pass({"head": one}, {"head": [one, one]})
    found = Pass({"head": one * 1.25}, {"head": [one, one * 0.5]})
    assert errors_of(found, reference) == {"head": Errors(0.25, 0.5)}


@pytest.mark.parametrize(
    ("activation", "gradient", "status"),
    [(0.02, 0.2, "ok"), (0.02, 0.9, "error"), (0.09, 0.2, "error"), (0.02, math.nan, "error")],
)
def test_a_device_may_err_as_rounding_does_and_no_more(activation, gradient, status):
    usual = {"layer 0": Errors(0.0, 0.1), "layer 1": Errors(0.01, 0.1)}
    device = {"layer 0": Errors(0.0, 0.1), "layer 1": Errors(activation, gradient)}
    first, second = judge(usual, device, device="npu")
    assert (first.subject, first.status) == ("layer 0", "ok")
    assert (second.subject, second.status) == ("layer 1", status)
    assert bool(second.advice) == (status == "error")
