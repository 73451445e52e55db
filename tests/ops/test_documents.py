"""Packing documents is running them apart, and nothing at all passes between them."""

from itertools import pairwise

import pytest
import torch
from ops_cases import as_fp64, assert_close, cut, make, value_and_gradients

from sisa_dist.ops import causal_attention, forgetting_attention, sigmoid_sisa_attention, sisa_attention

# Starts of documents in a sequence of 300 tokens with leaf 16: inside leaves, on edges of leaves and of spans, one
# token long, several inside one leaf, and one document that spans nearly everything.
LAYOUTS = {
    "one": [0],
    "edges": [0, 16, 64, 128, 256],
    "inside": [0, 5, 30, 99, 141, 290],
    "tiny": [0, 1, 2, 3, 17, 18, 200, 299],
    "long": [0, 3],
}
T = 300


def ids(*layouts):
    """Document ids need not be consecutive, only non-decreasing."""
    rows = []
    for starts in layouts:
        row = torch.zeros(T, dtype=torch.long)
        row[starts[1:]] = 2
        rows.append(row.cumsum(0))
    return torch.stack(rows)


def apart(x, doc_ids, **kwargs):
    """Run each document of each sequence by itself; gradients are put back in place, λ's added."""
    whole = {n: torch.zeros_like(z) for n, z in x.items()}
    whole["out"] = torch.zeros(*x["q"].shape[:3], x["v"].shape[-1], dtype=x["q"].dtype)
    gen = torch.Generator().manual_seed(1)
    cotangent = torch.randn(whole["out"].shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(x["q"].dtype)
    for b, row in enumerate(doc_ids):
        edges = [0, *(1 + (row[1:] != row[:-1]).nonzero()[:, 0]).tolist(), T]
        for start, stop in pairwise(edges):
            part = {n: z if n == "lam" else z[b : b + 1] for n, z in cut(x, start, stop).items()}
            out = sisa_attention(**part, **kwargs)
            grads = torch.autograd.grad(out, list(part.values()), cotangent[b : b + 1, :, start:stop])
            whole["out"][b, :, start:stop] = out[0].detach()
            for n, g in zip(part, grads, strict=True):
                if n == "lam":
                    whole[n] += g
                else:
                    whole[n][b, :, start:stop] = g[0]
    return {n: z.detach() for n, z in whole.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", [0.03, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_is_apart(layout, decay, dtype, tolerance):
    x = make(T, heads=4, kv_heads=2, d_s=6, d_v=12, decay=decay, dtype=dtype)
    doc_ids = ids(LAYOUTS[layout], LAYOUTS["inside"])
    for leaf in (16, None):
        packed = value_and_gradients(x, doc_ids=doc_ids, leaf=leaf)
        assert_close(packed, apart(x, doc_ids, leaf=leaf), tolerance, floor=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["single", "bisected"])
def test_packed_paths_are_the_explicit_score(path, layout):
    x = make(T, decay=0.05)
    doc_ids = ids(LAYOUTS[layout], LAYOUTS["edges"])
    got = value_and_gradients(x, doc_ids=doc_ids, path=path, leaf=16)
    assert_close(got, value_and_gradients(x, doc_ids=doc_ids, path="dense"), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_single_holds_a_strong_decay_in_every_document(dtype, tolerance):
    """About 60 nats in each: its factors meet those of the next document as e^60, which no mask value outweighs."""
    x = make(T, decay=3.5, dtype=dtype)
    doc_ids = torch.arange(T)[None].expand(2, T) // 33
    decays = x["log_alpha"].detach().unfold(2, 33, 33).sum(-1).neg()
    assert decays.min() > 45 and decays.max() < 80
    wanted = value_and_gradients(as_fp64(x), doc_ids=doc_ids, path="dense")
    assert_close(value_and_gradients(x, doc_ids=doc_ids, path="single"), wanted, tolerance)


def test_packed_bf16():
    x = make(T, d_h=64, d_s=32, decay=1.0, dtype=torch.bfloat16, aux=torch.float32)
    doc_ids = ids(LAYOUTS["inside"], LAYOUTS["tiny"])
    limits = {"out": 1e-2, "log_alpha": 4e-2, "theta": 4e-2, "rest": 2e-2}
    assert_close(value_and_gradients(x, doc_ids=doc_ids, leaf=16), apart(as_fp64(x), doc_ids, path="dense"), limits)


@pytest.mark.parametrize("leaf", [16, 32, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.03, 2.0])
def test_nothing_passes_between_documents(dtype, decay, leaf):
    """Bit for bit: another document's content moves no output, and gets no gradient."""
    aux = torch.float32 if dtype == torch.bfloat16 else dtype
    x, other = (make(T, heads=4, kv_heads=2, decay=decay, dtype=dtype, aux=aux, seed=s) for s in (0, 1))
    doc_ids = ids(LAYOUTS["inside"], LAYOUTS["inside"])
    start, stop = 30, 141  # two whole documents, compared as one stretch
    mixed = {}
    for n, z in x.items():
        mixed[n] = (
            z if n == "lam" else torch.cat((other[n][:, :, :start], z[:, :, start:stop], other[n][:, :, stop:]), 2)
        )
    out, out_mixed = (sisa_attention(**y, doc_ids=doc_ids, leaf=leaf) for y in (x, mixed))
    assert torch.equal(out[:, :, start:stop], out_mixed[:, :, start:stop])
    assert not torch.equal(out[:, :, :start], out_mixed[:, :, :start])

    names = [n for n in x if n != "lam"]
    grads = torch.autograd.grad(out[:, :, 99:141].square().sum(), [x[n] for n in names])
    for n, g in zip(names, grads, strict=True):
        assert (g[:, :, :99] == 0).all() and (g[:, :, 141:] == 0).all(), n
        assert g[:, :, 99:141].abs().max() > 0, n
        if n in ("log_alpha", "theta"):  # only sums inside the document enter, which the first token is not part of
            assert (g[:, :, 99] == 0).all(), n


@pytest.mark.parametrize("backend", ["auto", "products"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_attention_with_documents(layout, backend):
    x = {n: z for n, z in make(T, heads=4, kv_heads=2, d_v=12, dtype=torch.float32).items() if n in "qkv"}
    doc_ids = ids(LAYOUTS[layout], LAYOUTS["edges"])

    def explicit(q, k, v):
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1) | (doc_ids[:, :, None] != doc_ids[:, None, :])
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ v

    got = value_and_gradients(x, causal_attention, doc_ids=doc_ids, backend=backend)
    assert_close(
        got, value_and_gradients({n: z.detach().double().requires_grad_() for n, z in x.items()}, explicit), 1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [sisa_attention, sigmoid_sisa_attention, forgetting_attention])
def test_levels_whole_as_on_a_gpu_are_the_cut_ones(function, layout, monkeypatch):
    """A CPU leaves out the keys and rows that no crossing document reaches; elsewhere they are masked."""
    x = make(T, heads=4, kv_heads=2, d_s=6, d_v=12, decay=0.5)
    if function is forgetting_attention:
        log_f = x["log_alpha"].detach().repeat_interleave(2, 1).requires_grad_()
        x = {n: z for n, z in x.items() if n in "qkv"} | {"log_f": log_f}
    doc_ids = ids(LAYOUTS[layout], LAYOUTS["inside"])
    cut_levels = value_and_gradients(x, function, doc_ids=doc_ids, leaf=16)
    calls = []
    monkeypatch.setattr("sisa_dist.ops.operands.within_reach", lambda levels, _: calls.append(1) or levels)
    assert_close(value_and_gradients(x, function, doc_ids=doc_ids, leaf=16), cut_levels, 1e-12)
    assert calls
    if function is sisa_attention:
        assert_close(cut_levels, value_and_gradients(x, doc_ids=doc_ids, path="dense"), 1e-10)
