"""The loop that all update rules share.

    1. one pass over gradients (and momenta) adds up their squares and products
    2. one all-reduce makes them the whole model's; from it come norm, clipping and angle
    3. one pass moves the weights
    4. one read of the device: was the gradient finite?

A rule says what its coefficients are (``_move``); what is summed, counted, clipped, skipped and
logged is the same for all. Gradients are never rewritten: clipping is a factor of the second pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from megatron_replay.errors import ConfigError, few
from megatron_replay.optim.angle import Angle
from megatron_replay.optim.batch import Batch, Scalars
from megatron_replay.optim.momentum_step import OPTIMIZER
from megatron_replay.optim.placement import Place, Placement, place_alone

#: Steps are computed in float32, in which larger numbers are infinite.
LARGEST = torch.finfo(torch.float32).max


def require_usable_numbers(group: Mapping[str, Any]) -> None:
    """Raise ValueError, as AdamW does, for a number of a group that is infinite in float32."""
    numbers = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    numbers["lr * weight_decay"] = numbers["lr"] * numbers["weight_decay"]
    for name, value in numbers.items():
        if not 0 <= value <= LARGEST:
            raise ValueError(f"Invalid {name}: {value}, not from 0 to float32's {LARGEST:.3g}")
    for index, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


class UpdateRule(torch.optim.AdamW):
    """Base of the update rules: ``torch.optim.AdamW``'s groups, state keys and checkpoints.

    Args:
        params, lr, betas, eps, weight_decay: as in AdamW, also per group.
        clip_grad: norm of the whole gradient to clip at; 0: never.
        backend: backend of the two passes; see ``kernels.Backends``.

    A step whose gradient is not finite changes nothing, warns, and counts in ``skipped_steps``.

    Attributes:
        grad_norm: of the last step's gradient before clipping; None before the first.
        last_angle: the angle the last step saw; None for rules that do not look at one, before the
            first step and after a skipped one.
        skipped_steps: steps left out.

    Raises:
        ConfigError: a setting that cannot work; in ``step``, a parameter that is not fp32 or fp64
            (a step of 1e-6 is lost in bf16: keep fp32 masters) or has a sparse gradient.
        ValueError: a setting that AdamW refuses as well, or that is infinite in float32.
    """

    #: Whether pass 1 also needs the products with the momentum.
    looks_at_angle: ClassVar[bool] = False
    #: Attributes that a copy needs beyond what torch copies.
    own: ClassVar[tuple[str, ...]] = (
        *"clip_grad backend grad_norm last_angle skipped_steps angle_scope".split(),
        *"_placement _copies _update_sq _counted".split(),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_grad: float = 0.0,
        backend: str = "auto",
    ) -> None:
        self._require("clip_grad", 0 <= clip_grad < math.inf, "a norm from 0", clip_grad)
        self.clip_grad, self.backend = clip_grad, backend
        self.angle_scope = "model"
        self.grad_norm: float | None = None
        self.last_angle: Angle | None = None
        self.skipped_steps = 0
        self._placement: Placement | None = None
        self._copies: dict[Tensor, Tensor] = {}
        self._update_sq: Tensor | None = None
        self._counted: float | None = None
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def distribute(self, placement: Placement, copies: dict[Tensor, Tensor]) -> None:
        """Say how the model is spread over processes, and where its weights in bf16 are.

        Skipped steps are then the caller's to tell of, once for all processes.

        Args:
            placement: of every tensor in the groups.
            copies: for a parameter, the bf16 tensor that each step shall write it to as well.
        """
        self._placement, self._copies = placement, copies

    @_disable_dynamo  # under torch.compile(optimizer.step), too, the compiled form is ours
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Communication: one all-reduce over the model's processes, if any, of three fp32 numbers (one
        where the rule does not look at the angle; three for each tensor in its scope), and what the
        rule's own docstring adds. One read of the device, when all its work is queued.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        # Of several processes one may have nothing to add, and must still answer the others.
        if not batches and self._placement is None:
            return loss
        scalars = self._scalars(self._reduced(self._sums(batches)))
        self._prepare(scalars)
        moved = [self._counted_sum(batch, self._move(batch, scalars)) for batch in batches]
        moved.append(self._complete(batches, scalars))
        self._update_sq = torch.stack([x.to(scalars.grad_sq) for x in moved]).sum()
        self._finish(batches, scalars)
        return loss

    def _prepare(self, scalars: Scalars) -> None:
        """What a rule works out once for all batches."""

    def _move(self, batch: Batch, scalars: Scalars) -> Tensor:
        """Move the batch; returns the sum of squares of (move / lr) of each tensor."""
        raise NotImplementedError

    def _complete(self, batches: Sequence[Batch], scalars: Scalars) -> Tensor:
        """What a rule does when all batches have moved; returns what to add to the sum of squares.

        Called on every process, also on one without a batch.
        """
        return torch.zeros(())

    def _kind(self, place: Place) -> object:
        """Parameters of different kinds come in different batches."""
        return None

    def _memory(self) -> dict[str, Tensor]:
        """Numbers that a rule carries from step to step on the device; kept with the groups."""
        return {}

    def _batches(self) -> list[Batch]:
        """What has a gradient; state is created as AdamW creates it."""
        batches: dict[Any, Batch] = {}
        row = 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None:
                    continue
                self._require_usable(param, param.grad)
                state = self.state[param] or self.create_state(param, group)
                step = int(state["step"]) + 1
                kernels = OPTIMIZER.choose(self.backend, param)
                grad = param.grad.contiguous() if param.is_contiguous() else param.grad
                place = self._place(param, group, row)
                key = (number, step, kernels.name, self._kind(place))
                batch = batches.setdefault(key, Batch(group, step, kernels))
                batch.params.append(param)
                batch.grads.append(grad)
                batch.states.append(state)
                batch.places.append(place)
                row += 1
        for batch in batches.values():
            if self._copies:
                batch.copies = [self._copies[param] for param in batch.params]
        return list(batches.values())

    def create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state before its first step: zeros."""
        state = self.state[param]
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for key in self._state_keys(self._place(param, group, 0)):
            state[key] = torch.zeros_like(param, requires_grad=False)
        return state

    def _state_keys(self, place: Place) -> tuple[str, ...]:
        """The states that a parameter has beside its count of steps."""
        return ("exp_avg", "exp_avg_sq")

    def _place(self, param: Tensor, group: dict[str, Any], row: int) -> Place:
        if self._placement is not None:
            return self._placement.places[param]
        return place_alone(param, row, orthogonal=group.get("orthogonalize", True))

    def _sums(self, batches: Sequence[Batch]) -> Tensor:
        """This process's part of the sums: [3] or [1], or [tensors, 3]."""
        values, places = self._counted_values(batches)
        if self.angle_scope == "model":
            return values.sum(0)
        tensors = self._placement.num_tensors if self._placement else len(places)
        sums = values.new_zeros(tensors, values.shape[1])
        sums[[place.row for place in places]] = values
        return sums

    def _counted_values(self, batches: Sequence[Batch]) -> tuple[Tensor, list[Place]]:
        """Pass 1: what each tensor that counts here contributes, [counted, 3] or [counted, 1]."""
        # Megatron gives every rank the same list of groups: on some ranks the first may be empty.
        device = next(p.device for group in self.param_groups for p in group["params"])
        rows = [torch.zeros(0, 3 if self.looks_at_angle else 1, device=device)]
        places = []
        for batch in batches:
            # A rank may hold nothing but copies of what others count.
            counted = batch.only(lambda place: place.counts)
            if not counted.params:
                continue
            if self.looks_at_angle:
                rows.append(counted.kernels.dot_products(counted.state("exp_avg"), counted.grads))
            else:
                rows.append(counted.kernels.square_sums(counted.grads)[:, None])
            places += counted.places
        fp64 = any(row.dtype == torch.float64 for row in rows)
        dtype = torch.float64 if fp64 else torch.float32
        return torch.cat([row.to(device, dtype) for row in rows]), places

    def _reduced(self, sums: Tensor) -> Tensor:
        """The whole model's sums. One all-reduce in fp32 (HCCL has no fp64) over its processes."""
        if self._placement is not None:
            sums = sums.float()
            dist.all_reduce(sums, group=self._placement.model_group)
        return sums

    def _scalars(self, sums: Tensor) -> Scalars:
        proceed = torch.isfinite(sums).all()
        grad_sq = sums[..., -1].sum()
        clip = torch.ones_like(grad_sq)
        if self.clip_grad:
            # Megatron's 1e-6, which keeps a zero gradient from dividing by zero.
            clip = (self.clip_grad / (grad_sq.sqrt() + 1e-6)).clamp(max=1.0)
        if self.looks_at_angle:
            sums = torch.stack(
                [sums[..., 0] * clip, sums[..., 1], sums[..., 2] * clip * clip], dim=-1
            )
        return Scalars(proceed, grad_sq, clip, sums)

    def _counted_sum(self, batch: Batch, values: Tensor) -> Tensor:
        counts = [i for i, place in enumerate(batch.places) if place.counts]
        return values[counts].sum() if len(counts) < len(values) else values.sum()

    def _finish(self, batches: Sequence[Batch], scalars: Scalars) -> None:
        """Read, at once, whether the step proceeded, the norm, and what the rule remembers."""
        memory = self._memory()
        read = [scalars.proceed, scalars.grad_sq, *memory.values()]
        proceeded, grad_sq, *remembered = torch.stack(
            [x.to(scalars.grad_sq.dtype) for x in read]
        ).tolist()
        self.grad_norm = math.sqrt(grad_sq) if grad_sq >= 0 else math.nan
        if not proceeded:
            self.last_angle, self._update_sq = None, None
            self.skipped_steps += 1
            if self._placement is not None:
                return
            warnings.warn(
                f"{type(self).__name__}: gradient or momentum is not finite, step skipped "
                f"({self.skipped_steps} so far)",
                stacklevel=3,
            )
            return
        for batch in batches:
            for state in batch.states:
                # Not in place: megatron-core loads one tensor for all.
                state["step"] = state["step"] + 1
        for group in self.param_groups:
            group.update(zip(memory, remembered, strict=True))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """The last step in numbers, for a log; {} after a skipped one.

        Communication: one all-reduce of one fp32 over the model's processes (and one more at the
        first call); every one of them must call it. One read of the device.

        Returns:
            grad_norm, clipped_grad_norm, update_rms_over_lr (root mean square over the model's
            parameters), and ``Angle.scalars`` for the rules that look at it.
        """
        if self._update_sq is None or self.grad_norm is None:
            return {}
        if self._counted is None:
            params = [(p, g) for g in self.param_groups for p in g["params"]]
            mine = sum(p.numel() for p, g in params if self._place(p, g, 0).counts)
            self._counted = self._reduced(self._update_sq.new_tensor([mine])).item()
        total = self._reduced(self._update_sq.reshape(1))[0]
        scalars = {
            "update_rms_over_lr": (total / self._counted).sqrt(),
            **(self.last_angle.scalars() if self.last_angle is not None else {}),
        }
        values = torch.stack([x.to(total.dtype) for x in scalars.values()]).tolist()
        norm, clip = self.grad_norm, self.clip_grad
        return {
            "grad_norm": norm,
            "clipped_grad_norm": min(norm, clip) if clip else norm,
            **dict(zip(scalars, values, strict=True)),
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in AdamW.

        Raises:
            ConfigError: for options a group cannot have.
            ValueError: for numbers that no step can be taken with.
        """
        self._require_no_variant(param_group)
        require_usable_numbers(self.defaults | param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in AdamW.

        Raises:
            ConfigError: it is another optimizer's, or another model's.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        groups = state_dict.get("param_groups", ())
        numbered = [(number, group) for group in groups for number in group["params"]]
        for (number, group), param in zip(numbered, params, strict=False):  # torch counts them
            state = state_dict.get("state", {}).get(number, {})
            expected = {"step", *self._state_keys(self._place(param, group, 0))}
            if state and not expected <= state.keys():
                raise ConfigError(
                    "the state is another optimizer's",
                    where=type(self).__name__,
                    expected=", ".join(sorted(expected)),
                    found=few(sorted(map(str, state))),
                    fix="Load the weights alone, and start the optimizer anew",
                )
            for name in sorted(expected - {"step"}) if state else ():
                if state[name].shape != param.shape:
                    raise ConfigError(
                        f"{name} is of another model",
                        where=type(self).__name__,
                        expected=tuple(param.shape),
                        found=tuple(state[name].shape),
                    )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # torch copies and pickles state and groups alone; without its settings a copy cannot step.
        if self._placement is not None:
            raise ConfigError(
                f"{type(self).__name__} cannot be copied once it is spread over processes"
            )
        return {name: getattr(self, name) for name in self.own} | super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            self._require_no_variant(group)
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _require_no_variant(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "maximize", "differentiable"):
            self._require(
                f"option {name} of a group", not group.get(name), "False", group.get(name)
            )
        for name in sorted(set(self.own) & group.keys()):
            what = f"it to be given to {type(self).__name__}"
            self._require(f"option {name} of a group", False, what, group[name])

    def _require_usable(self, param: Tensor, grad: Tensor) -> None:
        if param.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                "unusable parameter",
                where=type(self).__name__,
                expected="float32 or float64",
                found=param.dtype,
                fix="Give the optimizer fp32 masters of the model's weights",
            )
        self._require("gradient", grad.layout == torch.strided, "a dense one", grad.layout)

    def _require(self, name: str, condition: bool, expected: str, found: object) -> None:
        """Raise ConfigError for an unusable setting unless ``condition`` holds."""
        if not condition:
            raise ConfigError(
                f"unusable {name}",
                where=type(self).__name__,
                expected=expected,
                found=repr(found),
            )
