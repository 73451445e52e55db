"""Cross-entropy over the vocabulary in chunks of tokens: of large vocabularies the whole logits never exist at once.

Logits of N tokens at a vocabulary of 50 277 are 200 kB a token in fp32; a chunk of them is made, reduced and dropped.
The gradient of a chunk is formed right after its logits (the sum is linear in its upstream gradient, which only
scales it), so the backward needs no second matmul with the head: three matmuls in all, as the unchunked form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.model.precision import at_least_fp32

IGNORE = -100  # a label that does not count

# Logits alive at once: 16 MB in fp32 stay in a CPU's cache. In training twice as many as the batch has hidden numbers,
# where that is more: each chunk reads and writes the head's whole gradient, which at 7B and 83 tokens a chunk would
# take a GPU several times as long as the matmuls.
_CHUNK_ELEMENTS = 1 << 22
_TIMES_HIDDEN = 2


@dataclass(frozen=True)
class Vocabulary:
    """Which columns the weight's rows stand for, and how columns held elsewhere join in: here all are held.

    Columns from `size` on are padding. `first` is the column of the weight's first row. Tensor parallelism puts a
    subclass with a slice of the vocabulary in its place.
    """

    size: int
    first: int = 0

    def over_all(self, lse_N: Tensor, picked_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over, and logit at, the columns of this slice (−inf where not here) → over all columns."""
        return lse_N, picked_N

    def argmax(self, logits_NV: Tensor) -> Tensor:
        """The column of the largest logit of all, the first of equals."""
        return logits_NV.argmax(1) + self.first

    def whole(self, logits: Tensor) -> Tensor:
        """All columns [..., V] of logits that hold this slice of them."""
        return logits


def all_logits(h_BTD: Tensor, weight_VD: Tensor, vocabulary: Vocabulary) -> Tensor:
    """h · Wᵀ, [B, T, vocabulary.size] fp32, padding cut off. For decoding: it holds the whole logits."""
    return at_least_fp32(vocabulary.whole(F.linear(h_BTD, weight_VD))[..., : vocabulary.size])


def cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Σ −log softmax(h·Wᵀ)[label] over labels ≠ IGNORE, fp32 scalar.

    h [N, D] and weight [V, D] of one dtype, labels [N] int64. With a slice of the vocabulary the gradient of h is the
    slice's part of it: the sum over slices is left to whoever cut it.
    """
    return _CrossEntropySum.apply(h_ND, weight_VD, labels_N, vocabulary)


def score_targets(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """(log-probability [N] fp32, is-argmax [N] bool) of each label; IGNORE gives (0, True). No gradient."""
    log_prob_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=h_ND.device)
    is_argmax_N = torch.ones(labels_N.shape, dtype=torch.bool, device=h_ND.device)
    with torch.no_grad():
        for rows in _chunks(h_ND, weight_VD):
            logits_NV = _logits(h_ND[rows], weight_VD, vocabulary)
            label_N = labels_N[rows]
            valid_N = label_N != IGNORE
            index_N, here_N = _here(label_N, logits_NV.shape[1], vocabulary)
            lse_N, picked_N = vocabulary.over_all(logits_NV.logsumexp(1), _pick(logits_NV, index_N, here_N))
            log_prob_N[rows] = torch.where(valid_N, picked_N - lse_N, 0.0).float()
            is_argmax_N[rows] = ~valid_N | (vocabulary.argmax(logits_NV) == label_N)
    return log_prob_N, is_argmax_N


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocabulary: Vocabulary) -> Tensor:
        loss = torch.zeros((), dtype=at_least_fp32(h_ND.new_empty(0)).dtype, device=h_ND.device)
        want_h, want_weight = ctx.needs_input_grad[:2]
        dh_ND = torch.empty_like(h_ND) if want_h else None
        # fp32: a bf16 sum over many chunks would lose the small ones.
        dweight_VD = torch.zeros_like(weight_VD, dtype=loss.dtype) if want_weight else None
        for rows in _chunks(h_ND, weight_VD, training=want_weight):
            logits_NV = _logits(h_ND[rows], weight_VD, vocabulary)
            label_N = labels_N[rows]
            valid_N = label_N != IGNORE
            index_N, here_N = _here(label_N, logits_NV.shape[1], vocabulary)
            lse_N, picked_N = vocabulary.over_all(logits_NV.logsumexp(1), _pick(logits_NV, index_N, here_N))
            loss += torch.where(valid_N, lse_N - picked_N, 0.0).sum()
            if dh_ND is None and dweight_VD is None:
                continue
            # softmax − one-hot, in the logits' own memory; rows of ignored labels are 0.
            grad_NV = logits_NV.sub_(lse_N[:, None]).exp_()
            grad_NV.scatter_add_(1, index_N[:, None], -here_N[:, None].to(grad_NV.dtype))
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


def _logits(h_ND: Tensor, weight_VD: Tensor, vocabulary: Vocabulary) -> Tensor:
    logits_NV = at_least_fp32(h_ND @ weight_VD.t())
    padding = max(0, vocabulary.size - vocabulary.first)
    if padding < weight_VD.shape[0]:
        logits_NV[:, padding:] = float("-inf")
    return logits_NV


def _here(label_N: Tensor, width: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """(a column of this slice that is safe to index, whether it is the label's)."""
    local_N = label_N - vocabulary.first
    here_N = (local_N >= 0) & (local_N < width)
    return local_N.clamp(0, width - 1), here_N


def _pick(logits_NV: Tensor, index_N: Tensor, here_N: Tensor) -> Tensor:
    return logits_NV.gather(1, index_N[:, None])[:, 0].masked_fill(~here_N, float("-inf"))


def _chunks(h_ND: Tensor, weight_VD: Tensor, *, training: bool = False) -> list[slice]:
    num_tokens = h_ND.shape[0]
    elements = max(_CHUNK_ELEMENTS, _TIMES_HIDDEN * h_ND.numel() if training else 0)
    size = max(1, elements // weight_VD.shape[0])
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
