"""Initial values as a pure function of (seed, parameter name, global index).

Nothing here depends on how many processes there are or what was drawn before: a rank that holds rows 100..199 of a
weight draws those rows and gets the bits the one-process model has. Blocks of 2^16 elements each have a Philox
generator of their own (numpy's streams are the same on every platform), so a slice costs its own blocks only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_BLOCK = 1 << 16


class Init(Protocol):
    """How one parameter starts: `start`..`stop` are positions in the flattened global tensor."""

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Constant:
    value: float

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, self.value, dtype=np.float32)


@dataclass(frozen=True)
class Normal:
    std: float

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray:
        values = _drawn(key, start, stop, lambda generator: generator.standard_normal(_BLOCK, dtype=np.float32))
        return values * np.float32(self.std)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [−bound, bound)."""

    bound: float

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray:
        values = _drawn(key, start, stop, lambda generator: generator.random(_BLOCK, dtype=np.float32))
        return (values * 2 - 1) * np.float32(self.bound)


@dataclass(frozen=True)
class InverseSoftplus:
    """softplus⁻¹ of a value log-uniform in [low, high): the bias of a time step (Gu & Dao 2023)."""

    low: float
    high: float

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray:
        uniform = _drawn(key, start, stop, lambda generator: generator.random(_BLOCK, dtype=np.float32))
        value = np.exp(np.log(self.low) + uniform.astype(np.float64) * np.log(self.high / self.low))
        return (value + np.log(-np.expm1(-value))).astype(np.float32)


@dataclass(frozen=True)
class LogIndex:
    """log(1), log(2), …: by the place in the whole tensor, anew every `period`."""

    period: int | None = None

    def draw(self, key: bytes, start: int, stop: int) -> np.ndarray:
        place = np.arange(start, stop, dtype=np.float64)
        return np.log(1 + (place if self.period is None else place % self.period)).astype(np.float32)


def _drawn(key: bytes, start: int, stop: int, block_of: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
    """Positions start..stop of an endless tensor whose blocks `block_of` draws, each from its own generator."""
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        values = block_of(_generator(key, block))
        low, high = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
        out[low - start : high - start] = values[low - block * _BLOCK : high - block * _BLOCK]
    return out


def init_parameters(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    view: Callable[[str, Tensor], Tensor] = lambda name, stored: stored,
    prefix: str = "",
    announce: Callable[[str], None] = lambda module_name: None,
) -> None:
    """Fill every parameter and buffer in place, plain or DTensor (then only this rank's part).

    `prefix` is the name of `model` in the whole one. `view(name, stored)` presents a stored parameter as its global
    tensor where it is a part of one. `announce` is told each module's full name before its own parameters are drawn.

    A module says how its own parameters start in `init_rules`; Linear and Embedding weights default to N(0, std),
    biases to 0.
    """
    with torch.no_grad():
        for module_name, module in model.named_modules():
            announce(".".join(filter(None, (prefix, module_name))))
            for name, parameter in module.named_parameters(recurse=False):
                full_name = ".".join(filter(None, (prefix, module_name, name)))
                _fill(view(full_name, parameter), init_rule(module, name, std=std), _key(seed, full_name))
            for name, buffer in module.named_buffers(recurse=False):  # whole on every rank
                full_name = ".".join(filter(None, (prefix, module_name, name)))
                _fill(buffer, init_rule(module, name, std=std), _key(seed, full_name))


def init_rule(module: nn.Module, name: str, *, std: float) -> Init:
    """How the parameter `name` of `module` itself starts."""
    rules: dict[str, Init] = getattr(module, "init_rules", {})
    if name in rules:
        return rules[name]
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise AssertionError(f"{type(module).__name__}.{name} has no initial value: add it to init_rules")
    return Constant(0.0) if name == "bias" else Normal(std)


def initial_value(rule: Init, full_name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """The whole parameter `full_name` as `init_parameters` sets it, fp32."""
    values = torch.empty(shape)
    _fill(values, rule, _key(seed, full_name))
    return values


def _fill(parameter: Tensor, rule: Init, key: bytes) -> None:
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local_shape, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    else:
        local, local_shape, offset = parameter, shape, (0,) * len(shape)
    if local.numel() == 0:
        return
    # Whole leading rows are one flat range; columns, where they are cut, are cut from that range.
    row = int(np.prod(shape[1:], dtype=np.int64))
    rows = rule.draw(key, offset[0] * row, (offset[0] + local_shape[0]) * row)
    values = rows.reshape(local_shape[0], *shape[1:])
    for dim in range(1, len(shape)):
        values = values.take(range(offset[dim], offset[dim] + local_shape[dim]), axis=dim)
    local.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _key(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()


def _generator(key: bytes, block: int) -> np.random.Generator:
    # As uint64: of a list with an integer past 2^63 numpy makes floats, and keys that lie close become one.
    words = np.array([int.from_bytes(key, "little"), block], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))
