"""Mistakes one can make in a split, each made on purpose: the grid must see every one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.parallel import apply, collectives, layers, overlap

EngineChange = Callable[[FSDP2Engine], None]


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[EngineChange]:
    """The mistake `name` in force while a case runs; yields what is to be done to the engine once it is built."""
    if name is None:
        yield lambda engine: None
        return
    mutation = MUTATIONS[name]
    if isinstance(mutation, contextlib.AbstractContextManager):
        with mutation:
            yield lambda engine: None
    else:
        yield mutation


def _missing(x: Tensor, group: Any) -> Tensor:
    return x.clone()


def _doubled(x: Tensor, group: Any) -> Tensor:
    return collectives.all_reduce(collectives.all_reduce(x, group), group)


def _part_only(x: Tensor, group: Any) -> Tensor:
    return x.chunk(group.size(), collectives.SEQUENCE)[group.rank()].contiguous()


def _summed_twice(x: Tensor, group: Any) -> Tensor:
    return collectives.reduce_scatter(collectives.all_reduce(x, group), group)


def _forward(function: type, collective: Callable[[Tensor, Any], Tensor]) -> Any:
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return collective(x, group)

    return mock.patch.object(function, "forward", staticmethod(forward))


def _backward(function: type, collective: Callable[[Tensor, Any], Tensor]) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collective(grad, ctx.group), None

    return mock.patch.object(function, "backward", staticmethod(backward))


def _started(name: str, collective: Callable[[Tensor, Any], Tensor]) -> Any:
    """The collective that overlap.py starts, and it alone, replaced by one that is done at once."""

    class Done:
        def wait(self) -> None:
            pass

    real = getattr(collectives, name)

    def start(x: Tensor, group: Any) -> tuple[Tensor, Any]:
        with mock.patch.object(collectives, name, real):
            return collective(x, group), Done()

    return mock.patch.object(overlap, "collectives", mock.Mock(wraps=collectives, **{name: start}))


@staticmethod  # type: ignore[misc]
def _no_gradient(ctx: Any, nothing: None) -> tuple[Tensor, None]:
    x, dy = (tensor.flatten(0, -2) for tensor in ctx.made_of)
    return dy.new_zeros(dy.shape[1], x.shape[1]), None


def _slices(change: Callable[[str, apply.Slice], apply.Slice]) -> Any:
    """Slices changed where the model is cut."""
    real = apply._slice

    def slice_(model: Any, name: str, *rest: Any) -> apply.Slice:
        return change(name, real(model, name, *rest))

    return mock.patch.object(apply, "_slice", slice_)


def _marked_full(pattern: str) -> Any:
    return _slices(lambda name, part: dataclasses.replace(part, tp_grad="full") if fnmatchcase(name, pattern) else part)


def _in_the_norm(pattern: str, tp_dim: int | None) -> EngineChange:
    """The norm is told another tp_dim; were the rest of the engine told too, it would stop before a number is wrong."""

    def change(engine: FSDP2Engine) -> None:
        real, truth = engine._clip, engine.slices
        lie = {
            name: dataclasses.replace(part, tp_dim=tp_dim) if fnmatchcase(name, pattern) else part
            for name, part in truth.items()
        }

        def clip() -> Tensor:
            engine.slices = lie
            try:
                return real()
            finally:
                engine.slices = truth

        engine._clip = clip  # type: ignore[method-assign]

    return change


def _flag_forgotten(engine: Any) -> None:
    """As if the flag had not been there when DeepSpeed looked."""
    for parameter in engine.model.parameters():
        parameter.tensor_model_parallel = False


def _unaveraged(engine: FSDP2Engine) -> None:
    engine.reduce_size = 1


def _of_the_next_rank(pattern: str) -> EngineChange:
    """Each rank holds what the next should hold."""

    def change(engine: FSDP2Engine) -> None:
        for name, parameter in engine.model.named_parameters():
            if fnmatchcase(name, pattern):
                local = parameter.to_local()  # type: ignore[attr-defined]
                mine = torch.distributed.get_rank(engine.mesh.group("tp"))
                everyones = collectives.all_gather(local.detach()[None], engine.mesh.group("tp"), dim=0)
                with torch.no_grad():
                    local.copy_(everyones[(mine + 1) % engine.mesh.tp_size])

    return change


def _unmasked(module: layers.VocabularyEmbedding, tokens_BT: Tensor) -> Tensor:
    row_BT = (tokens_BT - module.first).clamp(0, module.num_embeddings - 1)
    return module.border.leave(torch.nn.functional.embedding(row_BT, module.weight))


def _experts_of_the_next(engine: Any) -> None:
    """Each rank takes its experts for those of the next."""
    for block in engine.model.blocks:
        experts = block.mlp.experts
        first = (experts.share.first + experts.share.count) % experts.share.total
        experts.share = dataclasses.replace(experts.share, first=first)


def _counted_by_every_rank(share: layers.ExpertSlice, x: Tensor) -> Tensor:
    return collectives.copy(collectives.reduce(x, share.group), share.group)


@staticmethod  # type: ignore[misc]
def _nothing_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad.new_zeros(sum(ctx.sent), *grad.shape[1:]), None, None, None


def _gates_cost_everywhere(engine: Any) -> None:
    engine.model.gates.part = 1.0


def _noise_of_the_rank(engine: Any) -> None:
    engine.gates._seed = engine.mesh.tp_rank + 10 * engine.mesh.dp_rank


def _not_averaged(engine: FSDP2Engine) -> None:
    engine._average_experts = lambda: None  # type: ignore[method-assign]


def _reduced_over_ep(engine: Any) -> None:
    """DeepSpeed adds up the gradients of different experts."""
    groups = engine.zero.optimizer.expert_dp_process_group
    engine.zero.optimizer.expert_dp_process_group = dict.fromkeys(groups, engine.mesh.group("ep"))


def _added_by_every_rank(module: Any, group: Any, *, partial: bool) -> None:
    """Nothing is done, so the module adds its bias to its own part of the sum."""


def _left_alone(module: Any, group: Any) -> None:
    """Nothing is done, so the module goes on with what is here alone."""


def _first_rows(model: Any, name: str, split: Any, mesh: Any) -> tuple[int, int] | None:
    if not apply._held_whole(model, split, mesh.tp_size):
        return None
    return 0, model.get_parameter(name).shape[0] // getattr(model.config, split.over)


MUTATIONS: dict[str, Any] = {
    "tp_dim dropped from a column": _in_the_norm("*.wq.weight", None),
    "tp_dim dropped from a row": _in_the_norm("*.down.weight", None),
    "tp_dim given to a replicated norm": _in_the_norm("*.norm1.weight", 0),
    "copy without its all-reduce": _backward(collectives._Copy, _missing),
    "copy with two all-reduces": _backward(collectives._Copy, _doubled),
    "overlapped copy without its all-reduce": _started("start_all_reduce", _missing),
    "overlapped copy with two all-reduces": _started("start_all_reduce", _doubled),
    "reduce without its all-reduce": _forward(collectives._Reduce, _missing),
    "reduce with two all-reduces": _forward(collectives._Reduce, _doubled),
    "gather without its reduce-scatter": _backward(collectives._Gather, _part_only),
    "gather with two sums": _backward(collectives._Gather, _summed_twice),
    "overlapped gather without its reduce-scatter": _started("start_reduce_scatter", _part_only),
    "overlapped gather with two sums": _started("start_reduce_scatter", _summed_twice),
    "weight gradients delayed and forgotten": mock.patch.object(overlap._Delay, "backward", _no_gradient),
    "scatter without its sum": _forward(collectives._Scatter, _part_only),
    "scatter with two sums": _forward(collectives._Scatter, _summed_twice),
    "norm gradients not summed under sp": _marked_full("*.norm?.weight"),
    "final norm gradient not summed under sp": _marked_full("norm.weight"),
    "partial marked full: kv held whole": _marked_full("*.wk.weight"),
    "partial marked full: B held whole": _marked_full("*.wb.weight"),
    "partial marked full: decay bias held whole": _marked_full("*.decay.bias"),
    "partial marked full: a shared gain": _marked_full("*.q_norm.weight"),
    "λ from the wrong rank": _of_the_next_rank("*.importance.lambda_raw"),
    "U from the wrong rank": _of_the_next_rank("*.ssm_gate.weight"),
    "loss not averaged": _unaveraged,
    "tensor_model_parallel forgotten": _flag_forgotten,
    "a row layer's bias added on every rank": mock.patch.object(apply, "add_after", _added_by_every_rank),
    "a row layer's bias not summed under sp": _marked_full("*.wo.bias"),
    "a norm's bias not summed under sp": _marked_full("*.norm?.bias"),
    "partial marked full: a kv bias held whole": _marked_full("*.wk.bias"),
    "partial marked full: a group of B held whole": _marked_full("*.wB.weight"),
    "partial marked full: a convolution held whole": _marked_full("*.conv_C.bias"),
    "partial marked full: angles of all heads": _marked_full("*.wangle.weight"),
    "partial marked full: a gain of all heads": _marked_full("*.B_norm.weight"),
    "a norm over this rank's channels alone": mock.patch.object(apply, "norm_over_ranks", _left_alone),
    "a sum inside a region left out": mock.patch.object(apply, "sum_after", _left_alone),
    "partial marked full: a gain of Mamba's time steps": _marked_full("*.dt_norm.weight"),
    "a group's rows from the first group": mock.patch.object(apply, "_own_rows", _first_rows),
    "partial marked full: a router": _marked_full("*.router.weight"),
    "experts of another rank": _experts_of_the_next,
    "router's losses counted by every rank": mock.patch.object(layers.ExpertSlice, "sum", _counted_by_every_rank),
    "tp_dim dropped from experts": _in_the_norm("*.experts.up", None),
    "exchanged rows' gradients kept": mock.patch.object(collectives._Exchange, "backward", _nothing_back),
    "experts averaged over their holders alone": _not_averaged,
    "experts reduced over the ranks of ep": _reduced_over_ep,
    "partial marked full: gates": _marked_full("gates.log_alpha"),
    "gates' cost counted by every rank": _gates_cost_everywhere,
    "gates' noise of each rank its own": _noise_of_the_rank,
    "embedding without its mask": mock.patch.object(layers.VocabularyEmbedding, "forward", _unmasked),
}
