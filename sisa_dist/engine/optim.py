"""AdamW with the parameter groups of the paper (sisa.md §2). Below `training` because the engines own the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from sisa_dist.config import OptimizerConfig


def group_of(name: str, shape: Sequence[int]) -> str:
    """Of the parameter `name`, of this global shape, when it is no expert that is dealt out."""
    if name == "gates.log_alpha":
        return "gates"
    return "lambda" if name.endswith("lambda_raw") else "vectors" if len(shape) < 2 else "matrices"


def set_rates(optimizer: torch.optim.Optimizer, lr: float, *, gates_stand: bool) -> None:
    """Each group's own of the step's `lr`; 0 for gates that are hard (engine/gates.py)."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if gates_stand and group["gates"] else lr * group["lr_ratio"]


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    shapes: Mapping[str, torch.Size] | None = None,
    moments: bool = True,
    apart: Collection[str] = (),
) -> torch.optim.AdamW:
    """Groups: matrices (decayed), vectors (gains and biases, not decayed), λ_raw (not decayed, lr × lambda_lr_ratio),
    gates of learned d_s (not decayed, lr × gate_lr_ratio).

    Each group carries `lr_ratio`; the engine sets lr = lr(step) · lr_ratio (set_rates).
    Of the parameters named in `apart`, matrices that other ranks share than the rest, groups of their own are made.
    `shapes` are the global ones, where a parameter does not show its own (ZeRO-3). Moments exist from the start, as
    zeros, so that a checkpoint can be read into them before the first step; not where an engine makes them elsewhere.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "apart": [], "vectors": [], "lambda": [], "gates": []}
    for name, parameter in model.named_parameters():
        shape = shapes[name] if shapes else parameter.shape
        groups["apart" if name in apart else group_of(name, shape)].append(parameter)
    settings = {
        "matrices": {"weight_decay": config.weight_decay, "lr_ratio": 1.0},
        "apart": {"weight_decay": config.weight_decay, "lr_ratio": 1.0},
        "vectors": {"weight_decay": 0.0, "lr_ratio": 1.0},
        "lambda": {"weight_decay": 0.0, "lr_ratio": config.lambda_lr_ratio},
        "gates": {"weight_decay": 0.0, "lr_ratio": config.gate_lr_ratio},
    }
    optimizer = torch.optim.AdamW(
        [{"params": groups[kind], "gates": kind == "gates", **settings[kind]} for kind in groups if groups[kind]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if moments):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
