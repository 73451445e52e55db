"""Packed documents need no T×T tensor above the leaf size: the largest tensor of a step grows as T does."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from ops_cases import make
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sisa_dist.config import AttentionConfig
from sisa_dist.ops import causal_attention, sisa_attention

LENGTHS = (1024, 2048, 4096)
HEADS, D_H, D_S = 2, 16, 8
# Every path a run may train with; the dense oracle is what it says. `attention` is the other mixer.
PATHS = [*(path for path in get_args(AttentionConfig.model_fields["path"].annotation) if path != "dense"), "attention"]


class _Largest(TorchDispatchMode):
    """The most elements that any operator returned. Ours are looked into: what they call is hidden from a mode."""

    def __init__(self):
        super().__init__()
        self.elements, self.inside = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name.startswith("sisa_dist::"):
            self.inside.add(name)
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(path, T, monkeypatch):
    """Of forward and backward with documents of several leaves each, one of them half the sequence."""
    # Workspaces of scores are bounded by constants: small here, so that what grows is not hidden under them.
    monkeypatch.setattr("sisa_dist.ops.products.CPU_CHUNK", 1 << 12)
    monkeypatch.setattr("sisa_dist.ops.backends.rectangle.PRODUCTS_UP_TO", 64)
    x = make(T, batch=1, heads=HEADS, d_h=D_H, d_s=D_S, dtype=torch.float32, decay=1e-3)
    doc_ids = torch.arange(T)[None] // 300
    doc_ids[:, T // 2 :] = T
    inputs = {n: z for n, z in x.items() if n in "qkv"} if path == "attention" else x
    function = causal_attention if path == "attention" else sisa_attention
    kwargs = {} if path == "attention" else {"path": path, "leaf": 64}
    with _Largest() as mode:
        out = function(**inputs, doc_ids=doc_ids, **kwargs)
        out.sum().backward()
    assert mode.inside == ({"sisa_dist::bisected", "sisa_dist::bisected_backward"} if path != "dense" else set())
    return mode.elements


@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_grows_with_the_square(path, monkeypatch):
    sizes = [largest(path, T, monkeypatch) for T in LENGTHS]
    print(path, sizes)
    # The mask inside the leaves, 64 a token and head, is the largest; a T×T mask of one sequence would be T.
    assert all(size <= 64 * HEADS * T for size, T in zip(sizes, LENGTHS, strict=True)), sizes
    for half, whole in pairwise(sizes):
        assert whole <= 2.05 * half, sizes


def test_a_square_would_be_seen(monkeypatch):
    sizes = [largest("dense", T, monkeypatch) for T in LENGTHS[:2]]
    assert sizes[1] == 4 * sizes[0] >= 2048 * 2048
