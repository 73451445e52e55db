"""How a case is held against its reference: one error per term, in units of its tolerance. Above 1 is red."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed.grid import Case, Outcome

# fp32: a sum split over ranks is added in another order, an error of a few ulp (1.2e-7) that two layers, a loss and
# a few steps of Adam carry on. Measured over the whole grid, when it took five steps: scores 1e-6, losses 5e-7, norms
# 4e-7, gradients 6e-6.
FP32 = 1e-5
# bf16: each rank rounds its part of a sum to 8 bits (2^-9) before it is added, where one process rounds the sum.
BF16_SCORE = 0.05  # nats; a logit of ±4 is rounded by up to 2^-7, and two of them make a log-probability
BF16_LOSS, BF16_NORM = 5e-3, 1e-2  # a mean over 90 labels; a norm over 10 000 entries
BF16_GRADIENT = 0.05  # of the tensor's largest entry,
BF16_FLOOR = 4e-2  # and of its module's: what is small is often a difference of large rounded terms
BF16_FEW = 0.9
BF16_UPDATE = 0.15  # mean error of the updates against their mean size; Adam makes signs of small gradients


# A GPU sums with atomics, in an order of its own each time: nothing but the initial weights is exact, and fp32 sums of
# one run differ by what a split differs by here. Stated, not yet measured: no GPU has run this.
GPU_FACTOR = 4


def errors(case: Case, got: Outcome, want: Outcome, *, gpu: bool = False) -> dict[str, float]:
    """Term → error ÷ tolerance. Exact terms give 0 or infinity."""
    # Without tp no sum of the forward is split, so it is the same to the bit; a compiler orders sums its own way.
    exact_forward = ("tp" not in case.layout or case.layout == "tp1") and not dict(case.engine).get("compile")
    exact_forward &= "ep" not in case.layout  # an expert's rows stand in another table, which products may feel
    exact_forward &= "cp" not in case.layout  # a row's softmax is merged of other parts
    exact_forward &= not gpu
    bf16 = case.precision == "bf16"
    found = {f"initial {name}": _exact(got.initial[name], tensor) for name, tensor in want.initial.items()}
    if exact_forward:
        found["score"] = _exact(got.log_prob, want.log_prob)
    else:
        found["score"] = _most(got.log_prob - want.log_prob) / (BF16_SCORE if bf16 else FP32 * _most(want.log_prob))
    if exact_forward or not bf16:
        found["argmax"] = _exact(got.is_argmax, want.is_argmax)
    for step, (a, b) in enumerate(zip(got.losses, want.losses, strict=True)):
        found[f"loss {step}"] = abs(a - b) / (BF16_LOSS if bf16 else FP32)
    for step, (a, b) in enumerate(zip(got.norms, want.norms, strict=True)):
        found[f"norm {step}"] = abs(a - b) / b / (BF16_NORM if bf16 else FP32)
    # A bias's gradient is a sum, which cancels, of the very terms that its module's weight sums: they share a scale.
    owner = {name: name.rpartition(".")[0] for name in want.gradients}
    for name, gradient in want.gradients.items():
        scale = max(_most(other) for key, other in want.gradients.items() if owner[key] == owner[name])
        tolerance = BF16_GRADIENT * _most(gradient) + BF16_FLOOR * scale if bf16 else FP32 * scale
        found[f"gradient {name}"] = _most(got.gradients[name] - gradient) / tolerance
    for name, final in want.final.items():
        if bf16 and name.endswith("wk.bias"):
            # In channels that RoPE leaves alone it adds one number to all scores of a query, so its true gradient is 0
            # there; bf16 makes it rounding, and Adam steps of any sign. The gradient itself is held above.
            continue
        error = got.final[name] - final
        if bf16:
            moved = (final - want.initial[name]).abs()
            # Of a few entries one may go the other way; none may stand still, nor all go wrong.
            share = BF16_UPDATE if moved.numel() >= 16 else BF16_FEW
            found[f"weight {name}"] = error.abs().mean().item() / (share * moved.mean().item())
        else:
            found[f"weight {name}"] = _most(error) / FP32
    assert got.gradients.keys() == want.gradients.keys() and got.final.keys() == want.final.keys()
    if gpu:
        found = {term: error / GPU_FACTOR for term, error in found.items()}
    return {term: float("inf") if error != error else error for term, error in found.items()}


def red(found: dict[str, float]) -> dict[str, float]:
    """The terms beyond their tolerance, worst first."""
    return dict(sorted(((term, error) for term, error in found.items() if error > 1), key=lambda item: -item[1]))


def _exact(got: Tensor, want: Tensor) -> float:
    return 0.0 if torch.equal(got, want) else float("inf")


def _most(tensor: Tensor) -> float:
    return tensor.abs().max().item()
