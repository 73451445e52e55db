"""The bisected path as one operator: what autograd, compile, checkpointing and FLOP counters see of it."""

import math

import pytest
import torch
from ops_cases import make
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from sisa_dist.ops import sisa_attention
from sisa_dist.ops.bisect import _bisected, _bisected_backward


def _arguments(x, doc_ids=None, leaf=4):
    return (*x.values(), doc_ids, 0.3, leaf)


SHORT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 5]])
DOCS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]])


@pytest.mark.parametrize(
    ("kwargs", "doc_ids", "leaf"),
    [
        ({}, None, 4),
        pytest.param({"heads": 4, "d_v": 6}, None, 2, marks=pytest.mark.slow),
        ({"heads": 4, "d_s": 2}, SHORT, 3),
        ({"decay": 2.0}, None, 64),
    ],
)
def test_gradcheck(kwargs, doc_ids, leaf):
    x = make(11 if doc_ids is None else doc_ids.shape[1], **{"kv_heads": 2, "d_h": 2, "size": 0.5, **kwargs})

    def of(*inputs):
        named = dict(zip(x, inputs, strict=True))
        return sisa_attention(**named, doc_ids=doc_ids, path="bisected", leaf=leaf)

    # log α is rounded to 2^-42 and θ to 2^-52 turns, so the step must stay far above that.
    assert torch.autograd.gradcheck(of, tuple(x.values()), eps=1e-5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("doc_ids", [None, DOCS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, doc_ids):
    x = make(11, heads=4, kv_heads=2, d_v=6, dtype=dtype, aux=torch.float32)
    torch.library.opcheck(_bisected, _arguments(x, doc_ids))
    x = {n: z.detach() for n, z in x.items()}
    out, lse, g, turns = _bisected(*_arguments(x, doc_ids))
    saved = [x[n] for n in ("q", "k", "v", "C", "B", "lam")]
    backward_arguments = (torch.ones_like(out), *saved, doc_ids, out, lse, g, turns, 0.3, 4)
    torch.library.opcheck(_bisected_backward, backward_arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_input_is_written_to():
    x = make(70, heads=4, kv_heads=2)
    before = {n: z.detach().clone() for n, z in x.items()}
    sisa_attention(**x, leaf=8).sum().backward()
    assert all(torch.equal(before[n], x[n]) for n in x)


def test_second_derivatives_are_refused():
    x = make(9)
    (dq,) = torch.autograd.grad(sisa_attention(**x).sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), x["k"])


def test_compile_keeps_it_one_node_without_a_graph_break():
    x = make(70, dtype=torch.float32)

    def of(**kwargs):
        return sisa_attention(**kwargs, leaf=16).square().sum()

    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(**x), list(x.values())) for f in (of, compiled)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x = make(130, dtype=torch.float32)

    def of(*inputs):
        return sisa_attention(**dict(zip(x, inputs, strict=True)), leaf=16)

    plain = torch.autograd.grad(of(*x.values()).square().sum(), list(x.values()))
    loss = checkpoint(of, *x.values(), use_reentrant=use_reentrant).square().sum()
    loss.backward()
    assert all(torch.equal(g, z.grad) for g, z in zip(plain, x.values(), strict=True))


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.sisa_dist.bisected.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "calls"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)])
def test_selective_checkpointing_can_keep_it(policy, calls):
    x = make(70, dtype=torch.float32)

    def of(*inputs):
        return sisa_attention(**dict(zip(x, inputs, strict=True))).square()

    def choose(ctx, op, *args, **kwargs):
        return policy if op is torch.ops.sisa_dist.bisected.default else CheckpointPolicy.PREFER_RECOMPUTE

    plain = torch.autograd.grad(of(*x.values()).sum(), list(x.values()))
    with _Count() as mode:
        contexts = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
        out = checkpoint(of, *x.values(), use_reentrant=False, context_fn=contexts)
        grads = torch.autograd.grad(out.sum(), list(x.values()))
    assert all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))
    assert mode.count == calls


def test_flops_are_half_of_the_square():
    T, d_h, d_s, d_v = 512, 16, 8, 24
    x = make(T, batch=2, heads=4, kv_heads=2, d_h=d_h, d_s=d_s, d_v=d_v, dtype=torch.float32)
    square = 2 * 4 * T * T * 2  # batch · heads · pairs · (multiply, add)
    with FlopCounterMode(display=False) as forward:
        out = sisa_attention(**x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert math.isclose(forward.get_total_flops(), square / 2 * (d_h + d_s + d_v), rel_tol=0.01)
    assert math.isclose(backward.get_total_flops(), square / 2 * (3 * (d_h + d_s) + 2 * d_v), rel_tol=0.01)
    with FlopCounterMode(display=False) as dense:
        sisa_attention(**x, path="dense")
    assert math.isclose(forward.get_total_flops() / dense.get_total_flops(), 0.5, rel_tol=0.01)


def test_what_is_kept_for_the_backward_does_not_grow_with_levels():
    """Inputs, out and lse; g (fp64) and the phase stand in for log α and θ. Nothing per level, nothing T×T."""
    x = make(1024, batch=1, heads=2, d_h=16, d_s=8, dtype=torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = sisa_attention(**x, leaf=16)
    sizes = [*x.values(), out, out[..., 0], x["log_alpha"]]
    assert sum(kept.values()) <= sum(z.numel() * z.element_size() for z in sizes)


@pytest.mark.parametrize("name", ["q", "log_alpha", "lam"])
def test_gradients_for_one_input_alone(name):
    x = make(40)
    wanted = dict(zip(x, torch.autograd.grad(sisa_attention(**x).square().sum(), list(x.values())), strict=True))
    alone = {n: z if n == name else z.detach() for n, z in x.items()}
    (got,) = torch.autograd.grad(sisa_attention(**alone).square().sum(), alone[name])
    assert torch.equal(got, wanted[name])
