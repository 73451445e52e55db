"""What the rehearsal says a step computes and moves, against the FLOP formula, hand arithmetic and itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from distributed.pretending import alone
from sisa_dist.config import RunConfig, parse_config
from sisa_dist.model import build_model
from sisa_dist.training.estimate import Estimate, estimate
from sisa_dist.training.work import Work
from sisa_dist.training.work_meter import WorkMeter

LENGTH, LAYERS, D, VOCAB = 64, 2, 128, 256
MIXERS: dict[str, dict[str, Any]] = {
    "sisa": {"mixer": "sisa", "d_s": 8},
    "attention": {"mixer": "attention"},
    "mamba2": {"mixer": "mamba2", "ssm": {"d_state": 32, "head_dim": 32, "n_groups": 2}},
}


def _config(*, dp: int = 1, tp: int = 1, mixer: str = "attention", micro_batches: int = 1, **engine: Any) -> RunConfig:
    model = dict(vocab_size=VOCAB, d_model=D, n_layers=LAYERS, n_heads=4, d_ff=3 * D, tie_embeddings=False)
    training = {"steps": 1, "seq_len": LENGTH, "micro_batch_size": 1}
    training |= {"global_batch_tokens": LENGTH * micro_batches * dp}
    blocks = {"model": model | MIXERS[mixer], "parallel": {"dp": dp, "tp": tp}, "engine": engine, "training": training}
    return parse_config(blocks | {"schedule": {"warmup_steps": 0}}, source="tiny")


@functools.cache
def _of(**settings: Any) -> Estimate:
    return alone(estimate, _config(**settings))


def _flops(work: Iterable[Work], *phases: str) -> float:
    return sum(w.calls * w.flops for w in work if w.phase in phases)


def _nbytes(work: Iterable[Work]) -> float:
    return sum(w.calls * w.nbytes for w in work if w.phase in ("forward", "backward"))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("mixer", MIXERS)
def test_products_are_those_of_the_formula(mixer: str, tp: int) -> None:
    """At this length scores, which kernels make again in the backward, are a small part."""
    found = _of(tp=tp, mixer=mixer)
    done = _flops(found.work, "forward", "backward")
    assert done == pytest.approx(found.flops_per_step / tp, rel=0.03)
    assert _flops(found.work, "recomputation", "optimizer") == 0


def test_recomputation_is_a_forward_of_the_blocks() -> None:
    plain, recomputed = _of(), _of(activation_checkpointing=True)
    assert _flops(recomputed.work, "forward", "backward") == _flops(plain.work, "forward", "backward")
    # The loss forms its gradients in the forward: three products with the head. A block's last product is not needed.
    last = 2 * LENGTH * 3 * D * D
    blocks = _flops(plain.work, "forward") - 3 * 2 * LENGTH * D * VOCAB
    assert _flops(recomputed.work, "recomputation") == blocks - LAYERS * last
    chunked = _of(mlp_chunk=16)
    assert _flops(chunked.work, "recomputation") == LAYERS * 2 * last  # of three products, not the last


def test_micro_batches_between_first_and_last_count() -> None:
    one, five = _of(), _of(micro_batches=5)
    assert _flops(five.work, "forward", "backward") == 5 * _flops(one.work, "forward", "backward")
    # Each micro-batch but the first adds its gradients to what is there.
    added = [_nbytes(_of(micro_batches=many).work) - many * _nbytes(one.work) for many in (2, 5)]
    numbers = sum(p.numel() for p in _model().parameters())
    assert added == pytest.approx([3 * 4 * numbers, 4 * 3 * 4 * numbers], rel=0.01)
    updates = [[w for w in found.work if w.operator == "aten::_fused_adamw_"] for found in (one, five)]
    assert updates[0] == updates[1]
    # Weight, gradient and two moments are read, all but the gradient written; a step count for each tensor.
    tensors = len(list(_model().parameters()))
    assert sum(w.calls * w.nbytes for w in updates[0]) == 4 * (7 * numbers + tensors)


def _model() -> nn.Module:
    with torch.device("meta"):
        return build_model(_config().model)


def test_bytes_and_products_of_a_layer_by_hand() -> None:
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    with WorkMeter() as meter:
        y = layer(x)
        y.backward(torch.ones(()).expand(5, 4))
    forward, *backward = [w for w in meter.work() if w.operator == "aten::mm"]
    assert forward == Work("forward", "aten::mm", "float32", 1, 2.0 * 5 * 6 * 4, 4 * (5 * 6 + 6 * 4 + 5 * 4))
    # dy is one stored number; dx = dy · W, dW = dyᵀ · x.
    assert {w.nbytes for w in backward} == {4 * (1 + 4 * 6 + 5 * 6), 4 * (1 + 5 * 6 + 4 * 6)}
    assert all(w.phase == "backward" and w.flops == 2 * 5 * 6 * 4 for w in backward)
    assert not [w for w in meter.work() if w.operator in ("aten::t", "aten::expand", "aten::view")]


def test_in_place_and_copies_by_hand() -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    with WorkMeter() as meter:
        x.add_(y)
        x.copy_(y)
        torch.mul(x, y, out=x)
        torch.cat((x, y))
    found = {w.operator: w.nbytes // 4 for w in meter.work()}
    # read x and y, write x · read y, write x · read x and y, write out · read two, write both
    assert found == {"aten::add_": 24, "aten::copy_": 16, "aten::mul": 24, "aten::cat": 32}


def test_causal_scores_are_half_a_square() -> None:
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    with WorkMeter() as meter:
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    forward, backward = [w for w in meter.work() if "flash" in w.operator]
    pairs = 2 * 3 * 16 * 17 / 2
    assert (forward.phase, forward.flops) == ("forward", 2 * pairs * 16)
    assert (backward.phase, backward.flops) == ("backward", 2 * pairs * 40)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_offloaded_weights_cross_the_host_link_at_every_gather(micro_batches: int) -> None:
    found = _of(dp=2, micro_batches=micro_batches, cpu_offload=True)
    whole = {name: p.numel() for name, p in _model().named_parameters()}
    root = whole["embed.weight"] + whole["head.weight"]  # gathered once: FSDP2 keeps the root's for the backward
    gathered = 2 * (sum(whole.values()) - root) + root
    # Halves of fp32 weights, and once a step halves of gradients.
    assert found.host_bytes_per_step == 4 * (micro_batches * gathered + sum(whole.values())) // 2
    assert _of().host_bytes_per_step == 0
