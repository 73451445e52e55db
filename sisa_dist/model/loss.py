"""Cross-entropy over the vocabulary in chunks of tokens: the whole logits never exist at once.

Logits of N tokens at a vocabulary of 50 277 are 200 kB a token in fp32; a chunk of them is made, reduced and dropped.
The gradient of a chunk is formed right after its logits (the sum is linear in its upstream gradient, which only
scales it), so the backward needs no second matmul with the head: three matmuls in all, as the unchunked form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sisa_dist.model.precision import at_least_fp32

IGNORE = -100  # a label that does not count

_CHUNK_ELEMENTS = 1 << 22  # logits alive at once: 16 MB in fp32, stays in cache on a CPU and is small on a GPU


def cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, vocab_size: int) -> Tensor:
    """Σ −log softmax(h·Wᵀ)[label] over labels ≠ IGNORE, fp32 scalar; columns from vocab_size on are padding.

    h [N, D] and weight [V, D] of one dtype, labels [N] int64.
    """
    return _CrossEntropySum.apply(h_ND, weight_VD, labels_N, vocab_size)


def score_targets(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(log-probability [N] fp32, is-argmax [N] bool) of each label; IGNORE gives (0, True). No gradient."""
    log_prob_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=h_ND.device)
    is_argmax_N = torch.ones(labels_N.shape, dtype=torch.bool, device=h_ND.device)
    with torch.no_grad():
        for rows in _chunks(h_ND.shape[0], weight_VD.shape[0]):
            logits_NV = _logits(h_ND[rows], weight_VD, vocab_size)
            label_N = labels_N[rows]
            valid_N = label_N != IGNORE
            picked_N = logits_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0]
            log_prob_N[rows] = torch.where(valid_N, picked_N - logits_NV.logsumexp(1), 0.0).float()
            is_argmax_N[rows] = ~valid_N | (logits_NV.argmax(1) == label_N)
    return log_prob_N, is_argmax_N


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocab_size: int) -> Tensor:
        loss = torch.zeros((), dtype=at_least_fp32(h_ND.new_empty(0)).dtype, device=h_ND.device)
        want_h, want_weight = ctx.needs_input_grad[:2]
        dh_ND = torch.empty_like(h_ND) if want_h else None
        # fp32: a bf16 sum over many chunks would lose the small ones.
        dweight_VD = torch.zeros_like(weight_VD, dtype=loss.dtype) if want_weight else None
        for rows in _chunks(h_ND.shape[0], weight_VD.shape[0]):
            logits_NV = _logits(h_ND[rows], weight_VD, vocab_size)
            label_N = labels_N[rows]
            valid_N = label_N != IGNORE
            index_N1 = label_N.clamp(min=0)[:, None]
            lse_N = logits_NV.logsumexp(1)
            loss += torch.where(valid_N, lse_N - logits_NV.gather(1, index_N1)[:, 0], 0.0).sum()
            if dh_ND is None and dweight_VD is None:
                continue
            # softmax − one-hot, in the logits' own memory; rows of ignored labels are 0.
            grad_NV = logits_NV.sub_(lse_N[:, None]).exp_()
            grad_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1.0, dtype=grad_NV.dtype))
            grad_NV = grad_NV.mul_(valid_N[:, None]).to(h_ND.dtype)
            if dh_ND is not None:
                torch.mm(grad_NV, weight_VD, out=dh_ND[rows])
            if dweight_VD is not None and h_ND.dtype == dweight_VD.dtype:
                dweight_VD.addmm_(grad_NV.t(), h_ND[rows])
            elif dweight_VD is not None:
                dweight_VD += grad_NV.t() @ h_ND[rows]
        ctx.save_for_backward(dh_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        dh_ND, dweight_VD = ctx.saved_tensors
        dh_ND = None if dh_ND is None else dh_ND * dloss.to(dh_ND.dtype)
        dweight_VD = None if dweight_VD is None else (dweight_VD * dloss).to(ctx.weight_dtype)
        return dh_ND, dweight_VD, None, None


def _logits(h_ND: Tensor, weight_VD: Tensor, vocab_size: int) -> Tensor:
    logits_NV = at_least_fp32(h_ND @ weight_VD.t())
    if vocab_size < weight_VD.shape[0]:
        logits_NV[:, vocab_size:] = float("-inf")
    return logits_NV


def _chunks(num_tokens: int, vocab: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
