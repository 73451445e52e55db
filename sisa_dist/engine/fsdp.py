"""The PyTorch engine: FSDP2 over the data axis, one block a group.

One process in fp32 has nothing to shard and nothing to cast, so it runs the plain model; everything else, one
process in bf16 included, goes through `fully_shard`, so that precision means the same at every world size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig
from sisa_dist.engine.base import StepResult
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.model import build_model
from sisa_dist.model.init import init_parameters
from sisa_dist.model.loss import IGNORE
from sisa_dist.parallel.mesh import Mesh


class FSDP2Engine:
    """Engine over `fully_shard`. Weights and moments are fp32 DTensors (plain tensors on one fp32 process)."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.dp_rank, self.dp_size = mesh, mesh.dp_rank, mesh.dp_size
        self.grad_clip = config.optimizer.grad_clip
        with torch.device("meta"):
            self.model = build_model(config.model, attention=config.attention)
        if mesh.dp_size > 1 or config.engine.precision == "bf16":
            _shard(self.model, mesh, torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
        self.model.to_empty(device=mesh.device)
        init_parameters(self.model, seed=config.seed, std=config.model.init_std)
        for block in self.model.blocks:
            block.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        count = torch.tensor(sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches))
        count = self.mesh.sum_over_dp(count.to(self.mesh.device)).clamp_(min=1)
        # FSDP averages over data ranks; the loss is a sum divided once by the global count.
        scale = self.dp_size / count
        loss_sum = torch.zeros((), device=self.mesh.device)
        for number, batch in enumerate(micro_batches, start=1):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(number == len(micro_batches))
            loss, _ = self.model(*self._inputs(batch.tokens, batch.labels), doc_ids_BT=self._move(batch.doc_ids))
            (loss * scale).backward()
            loss_sum += loss.detach()
        grad_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss_mean = self.mesh.sum_over_dp(loss_sum) / count
        return StepResult(loss_mean.item(), grad_norm.item(), int(count.item()))

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_prob_BT, is_argmax_BT = self.model(
                *self._inputs(tokens_BT, labels_BT), doc_ids_BT=self._move(doc_ids_BT), per_token=True
            )
        # The root keeps its parameters gathered for a backward; here none comes, and state_tensors needs the shards.
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        return log_prob_BT.cpu(), is_argmax_BT.cpu()

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self.mesh.sum_over_dp(torch.tensor(values, dtype=torch.float64, device=self.mesh.device)).tolist()

    def state_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state[f"model.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return state

    def set_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def layer_statistics(self) -> dict[str, list[float | None]]:
        lambdas: list[float | None] = []
        half_lives: list[float | None] = []
        for block in self.model.blocks:
            found: dict[str, Tensor] = getattr(block.mixer, "statistics", dict)()
            lam, log_alpha = found.get("lambda"), found.get("mean_log_alpha")
            lambdas.append(None if lam is None else _full(lam).mean().item())
            if log_alpha is None:
                half_lives.append(None)
            else:
                (total,) = self.sum_over_dp([log_alpha.item()])
                half_lives.append(math.log(2) / max(-total / self.dp_size, 1e-30))
        return {"lambda": lambdas, "half_life": half_lives}

    def _clip(self) -> Tensor:
        parameters = list(self.model.parameters())
        norm = _full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        return norm

    def _inputs(self, tokens_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        return tokens_BT.to(self.mesh.device), labels_BT.to(self.mesh.device)

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.mesh.device)


def _shard(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> None:
    # Inputs are never cast: the embedding's output already has the compute dtype, and RoPE tables stay fp32.
    compute = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:  # type: ignore[union-attr]
        small = [module for module in block.modules() if getattr(module, "fp32_in_forward", False)]
        fully_shard(small, mesh=mesh.device_mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh.device_mesh, mp_policy=compute)
    fully_shard(model.norm, mesh=mesh.device_mesh, mp_policy=exact)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh.device_mesh, mp_policy=compute)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
