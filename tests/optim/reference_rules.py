"""Every update rule a second time, in float64, from its definition: whole tensors, no sharing.

Parameters and gradients are dicts of whole Hugging Face tensors; ``matrices`` names those that
Muon's kind orthogonalises. Written without a look at the code under test, in numpy
only; MoClip from its geometry, without (a, b).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


def is_hidden_matrix(name: str, tensor: np.ndarray) -> bool:
    return name.startswith("model.layers.") and tensor.ndim == 2


def attention_layer(name: str) -> str | None:
    match = re.match(r"(model\.layers\.\d+)\.self_attn\.[qkvo]_proj\.", name)
    return match[1] if match else None


def norm(tensors: Iterable[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(t**2) for t in tensors)))


def decayed(name: str, tensor: np.ndarray, lr: float, weight_decay: float) -> np.ndarray:
    return tensor * (1 - lr * weight_decay if tensor.ndim > 1 else 1.0)


class Adam:
    """AdamW; the others change one of its parts."""

    def __init__(self, lr: float, weight_decay: float, clip: float) -> None:
        self.lr, self.weight_decay, self.clip = lr, weight_decay, clip
        self.m: dict[str, Any] = {}
        self.v: dict[str, Any] = {}
        self.t = 0

    def step(self, theta: Tensors, grads: Tensors) -> dict[str, np.ndarray]:
        total = norm(grads.values())
        scale = min(1.0, self.clip / (total + 1e-6)) if self.clip else 1.0
        grads = {name: g * scale for name, g in grads.items()}
        if not self.m:
            self.m = {name: np.zeros_like(g) for name, g in grads.items()}
            self.v = {name: np.zeros_like(g) for name, g in grads.items()}
        self.t += 1
        turned = self.turned(grads)
        for name, g in grads.items():
            self.m[name] = BETA1 * self.m[name] + (1 - BETA1) * turned[name]
            self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * g**2
        return {
            name: decayed(name, p, self.lr, self.weight_decay) - self.lr * self.update(name)
            for name, p in theta.items()
        }

    def hats(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.m[name] / (1 - BETA1**self.t), self.v[name] / (1 - BETA2**self.t)

    def turned(self, grads: Tensors) -> Tensors:
        return grads

    def update(self, name: str) -> np.ndarray:
        m_hat, v_hat = self.hats(name)
        return m_hat / (np.sqrt(v_hat) + EPS)


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([t.ravel() for t in tensors.values()])


def unflat(vector: np.ndarray, like: Tensors) -> dict[str, np.ndarray]:
    out, at = {}, 0
    for name, tensor in like.items():
        out[name] = vector[at : at + tensor.size].reshape(tensor.shape)
        at += tensor.size
    return out


def turned_gradient(g: np.ndarray, m: np.ndarray, max_angle: float, obtuse: str) -> np.ndarray:
    """g' by decomposing g along and across m."""
    if not m.any() or not g.any():
        return g.copy()
    axis = m / np.linalg.norm(m)
    parallel = (g @ axis) * axis
    perpendicular = g - parallel
    along, across = g @ axis, np.linalg.norm(perpendicular)
    if across < 1e-12 * np.linalg.norm(g):  # rounding of a vector on the axis
        across, perpendicular = 0.0, np.zeros_like(g)
    if math.degrees(math.atan2(across, along)) <= max_angle:
        return g.copy()
    if obtuse == "zero" and along < 0:
        return np.zeros_like(g)
    side = perpendicular / across if across > 0 else perpendicular
    limit = math.radians(max_angle)
    if max_angle == 90:
        return perpendicular
    shortened = min(across, math.tan(limit) * abs(along)) * side
    return shortened + parallel


class MoClip(Adam):
    def __init__(self, *args: Any, max_angle: float = 45.0, obtuse: str = "line") -> None:
        super().__init__(*args)
        self.max_angle, self.obtuse, self.dropped = max_angle, obtuse, 0

    def turned(self, grads: Tensors) -> Tensors:
        g, m = flat(grads), flat(self.m)
        new = turned_gradient(g, m, self.max_angle, self.obtuse)
        if self.obtuse == "zero":
            self.dropped = self.dropped + 1 if m @ g < 0 else 0
            if self.dropped > 3:
                new, self.dropped = g, 0
        return unflat(new, grads)

    def update(self, name: str) -> np.ndarray:
        m_hat, v_hat = self.hats(name)
        return np.arctan2(m_hat, np.sqrt(v_hat))


class MoClipByTensor(MoClip):
    """One angle for each parameter as megatron-core fuses them: q, k, v are one, gate, up one."""

    def turned(self, grads: Tensors) -> Tensors:
        out: dict[str, np.ndarray] = {}
        fused: dict[str, list[str]] = {}
        for name in grads:
            key = re.sub(r"\.[qkv]_proj\.", ".qkv.", re.sub(r"\.(gate|up)_proj\.", ".fc1.", name))
            fused.setdefault(key, []).append(name)
        for names in fused.values():
            part = {name: grads[name] for name in names}
            g, m = flat(part), flat({name: self.m[name] for name in names})
            out |= unflat(turned_gradient(g, m, self.max_angle, self.obtuse), part)
        return out


class MoFO(Adam):
    def update(self, name: str) -> np.ndarray:
        update, m = super().update(name), np.abs(self.m[name])
        if m.ndim < 2:
            return update
        k = max(1, int(0.2 * m.size))
        return update * (m >= np.sort(m.ravel())[-k])


class TAM(Adam):
    cosine = 1.0

    def turned(self, grads: Tensors) -> Tensors:
        g, m = flat(grads), flat(self.m)
        self.cosine = g @ m / np.linalg.norm(g) / np.linalg.norm(m) if m.any() else 1.0
        return grads

    def update(self, name: str) -> np.ndarray:
        return super().update(name) * max(self.cosine, 0.0)


def newton_schulz(m: np.ndarray, steps: int = 5) -> np.ndarray:
    x = m / max(np.linalg.norm(m), 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x


class Muon(Adam):
    """Hidden matrices orthogonalised, the rest Adam; attention layers clipped at 0.5."""

    momentum, attention_clip = 0.95, 0.5

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.buffer: dict[str, Any] = {}

    def turned(self, grads: Tensors) -> Tensors:
        scales = self.scales(grads)
        for name, g in grads.items():
            if is_hidden_matrix(name, g):
                before = self.buffer.get(name, np.zeros_like(g))
                g = g * scales.get(attention_layer(name), 1.0)
                self.buffer[name] = self.momentum * before + (1 - self.momentum) * g
        return grads

    def scales(self, grads: Tensors) -> dict[str | None, float]:
        layers: dict[str, list[np.ndarray]] = {}
        for name, g in grads.items():
            if (layer := attention_layer(name)) is not None:
                layers.setdefault(layer, []).append(g)
        return {
            layer: min(1.0, self.attention_clip / (norm(parts) + 1e-6))
            for layer, parts in layers.items()
        }

    def update(self, name: str) -> np.ndarray:
        if name not in self.buffer:
            return super().update(name)
        m = self.buffer[name]
        return 0.2 * np.sqrt(max(m.shape)) * newton_schulz(m)


class AdaMuon(Muon):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.variance: dict[str, Any] = {}

    def scales(self, grads: Tensors) -> dict[str | None, float]:
        return {}

    def update(self, name: str) -> np.ndarray:
        if name not in self.buffer:
            return Adam.update(self, name)
        o = newton_schulz(np.sign(self.buffer[name]))
        before = self.variance.get(name, np.zeros_like(o))
        self.variance[name] = self.momentum * before + (1 - self.momentum) * o**2
        u = o / (np.sqrt(self.variance[name]) + EPS)
        return 0.2 * np.sqrt(u.size) * u / np.linalg.norm(u)


#: By name: the settings that build_optimizer takes, and the reference.
RULES: dict[str, tuple[dict[str, Any], Callable[..., Adam]]] = {
    "adamw": ({"optimizer": "adamw"}, Adam),
    "moclip": ({"optimizer": "moclip"}, MoClip),
    "moclip zero": (
        {"optimizer": "moclip", "obtuse": "zero", "max_angle": 60.0},
        lambda *args: MoClip(*args, max_angle=60.0, obtuse="zero"),
    ),
    "moclip tensor": ({"optimizer": "moclip", "angle_scope": "tensor"}, MoClipByTensor),
    "mofo": ({"optimizer": "mofo"}, MoFO),
    "tam": ({"optimizer": "tam"}, TAM),
    "adamuon": ({"optimizer": "adamuon"}, AdaMuon),
    "muonclip": ({"optimizer": "muonclip"}, Muon),
}


def run(
    rule: str,
    start: Tensors,
    gradients: Iterable[Tensors],
    *,
    lr: float,
    weight_decay: float,
    clip: float,
) -> dict[str, np.ndarray]:
    """The parameters after a step for each of ``gradients``."""
    reference = RULES[rule][1](lr, weight_decay, clip)
    theta = {name: np.asarray(p, np.float64) for name, p in start.items()}
    for grads in gradients:
        theta = reference.step(theta, {n: np.asarray(g, np.float64) for n, g in grads.items()})
    return theta
