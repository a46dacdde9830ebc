"""``torch.optim.AdamW``'s groups, states and checkpoints, with refusals for what cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_replay.errors import ConfigError, few
from megatron_replay.optim.batch import Batch, Item, Place, Placement, place_alone
from megatron_replay.optim.momentum_step import OPTIMIZER

#: Steps are computed in float32, where larger numbers are infinite.
_LARGEST = torch.finfo(torch.float32).max


def _require_usable_numbers(group: Mapping[str, Any]) -> None:
    """Raise ValueError, as AdamW does, for a number of a group that is infinite in float32."""
    numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    numbers["lr * weight_decay"] = numbers["lr"] * numbers["weight_decay"]
    for name, value in numbers.items():
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"Invalid {name}: {value}, not from 0 to float32's {_LARGEST:.3g}")
    for index, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


class CheckedAdamW(torch.optim.AdamW):
    """AdamW's bookkeeping without its step; ``rule.UpdateRule`` adds the step.

    Subclasses set their own attributes before they call this constructor: these are what a copy or
    a pickle of the optimizer carries besides torch's.
    """

    backend: str

    def __init__(self, *args: Any, **options: Any) -> None:
        self._placement: Placement | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._own = (*vars(self), "_own")
        super().__init__(*args, **options)

    def distribute(self, placement: Placement, copies: dict[Tensor, Tensor]) -> None:
        """Set how the model is spread over processes, and where its bf16 weights are.

        The caller then reports skipped steps, once for all processes.

        Args:
            placement: of every tensor in the groups.
            copies: for a parameter, the bf16 tensor to which each step writes it as well.
        """
        self._placement, self._copies = placement, copies

    def create_states(self) -> None:
        """Create every parameter's missing state, so that a checkpoint can be loaded into it."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self._create_state(param, group)

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for key in self._state_keys(self._place(param, group, 0)):
            state[key] = torch.zeros_like(param, requires_grad=False)
        return state

    def _state_keys(self, place: Place) -> tuple[str, ...]:
        """The states of a parameter besides its count of steps."""
        return ("exp_avg", "exp_avg_sq")

    def _place(self, param: Tensor, group: dict[str, Any], row: int) -> Place:
        if self._placement is not None:
            return self._placement.places[param]
        return place_alone(param, row, orthogonal=group.get("orthogonalize", True))

    def _batches(self) -> list[Batch]:
        """Every parameter that has a gradient; missing states are created as AdamW creates them."""
        batches: dict[Any, Batch] = {}
        row = 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None:
                    continue
                dtype, layout = param.dtype, param.grad.layout
                usable, fix = dtype in (torch.float32, torch.float64), "Give it fp32 masters"
                self._require("parameter", usable, "float32 or float64", dtype, fix)
                self._require("gradient", layout == torch.strided, "a dense one", layout)
                state = self.state[param] or self._create_state(param, group)
                step = int(state["step"]) + 1
                kernels = OPTIMIZER.choose(self.backend, param)
                grad = param.grad.contiguous() if param.is_contiguous() else param.grad
                place = self._place(param, group, row)
                key = (number, step, kernels.name)
                batch = batches.setdefault(key, Batch(group, step, kernels, []))
                batch.items.append(Item(param, grad, state, place, self._copies.get(param)))
                row += 1
        return list(batches.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in AdamW.

        Raises:
            ConfigError: an option that a group cannot have.
            ValueError: a number with which no step can be taken.
        """
        self._require_no_variant(param_group)
        _require_usable_numbers(self.defaults | param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in AdamW.

        Raises:
            ConfigError: the state of another optimizer, or of another model.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        groups = state_dict.get("param_groups", ())
        numbered = [(number, group) for group in groups for number in group["params"]]
        for (number, group), param in zip(numbered, params, strict=False):  # torch counts them
            state = state_dict.get("state", {}).get(number, {})
            keys = self._state_keys(self._place(param, group, 0))
            if not state:
                continue
            self._require(
                "state of another optimizer",
                {"step", *keys} <= state.keys(),
                ", ".join(sorted({"step", *keys})),
                few(sorted(map(str, state))),
                "Load the weights alone and start the optimizer anew",
            )
            for key in keys:
                found = tuple(state[key].shape)
                same = found == tuple(param.shape)
                self._require(f"{key} of another model", same, tuple(param.shape), found)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        if self._placement is not None:
            raise ConfigError(
                f"{type(self).__name__} cannot be copied once it is spread over processes"
            )
        return {name: getattr(self, name) for name in self._own} | super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            self._require_no_variant(group)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _require_no_variant(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "maximize", "differentiable"):
            value = group.get(name)
            self._require(f"option {name} of a group", not value, "False", value)
        for name in sorted(group.keys() & {*getattr(self, "_own", ())}):
            expected = f"it to be given to {type(self).__name__}"
            self._require(f"option {name} of a group", False, expected, group[name])

    def _require(
        self, name: str, condition: bool, expected: object, found: object, fix: str | None = None
    ) -> None:
        """Raise ConfigError for an unusable setting unless ``condition`` holds."""
        if not condition:
            where = type(self).__name__
            raise ConfigError(
                f"unusable {name}", where=where, expected=expected, found=repr(found), fix=fix
            )
