"""The DeepSpeed engine: ZeRO 0 to 3 over the data axis around tensor-parallel slices. The one file that imports it.

Slices are plain parameters and the mesh is handed over as `mpu`. `tensor_model_parallel` on a slice tells DeepSpeed's
norm that the other tp ranks hold the rest; without it the norm is wrong and nothing says so.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine import zero_state
from sisa_dist.engine.base import StepResult
from sisa_dist.engine.checks import unequal_replicas
from sisa_dist.engine.common import count_labels, layer_statistics, pad_sequence
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.engine.deepspeed_config import deepspeed_config
from sisa_dist.engine.norm import global_norm
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.model import build_model
from sisa_dist.model.init import init_parameters
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import as_global


class DeepSpeedEngine:
    """Engine over `deepspeed.initialize`. Weights and moments are fp32, flat and partitioned as the stage says."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        deepspeed = _import(mesh)
        if mesh.size("dp_replicate") > 1:
            raise UserError(
                "parallel.dp_replicate needs engine.kind fsdp2: under deepspeed set it to 1 and, for shards within a "
                "host, engine.deepspeed_config.zero_optimization.zero_hpz_partition_size"
            )
        self.mesh, self.dp_rank, self.dp_size = mesh, mesh.dp_rank, mesh.dp_size
        self.stage = config.engine.zero_stage
        settings = deepspeed_config(config, dp_size=mesh.dp_size, cuda=mesh.device.type == "cuda")
        if mesh.is_main and Path(config.output_dir).is_dir():
            (Path(config.output_dir) / "deepspeed.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        with torch.device("meta"):
            model = build_model(config.model, attention=config.attention)
        # Under ZeRO-3 a weight is gathered for its owner's forward only: no overlap, which reads it before.
        self.slices = apply_plan(model, mesh, overlap=False)
        for block in model.blocks:
            block.activation_checkpointing = config.engine.activation_checkpointing  # type: ignore[assignment]
            if config.engine.compile:
                block.compile()
        if config.engine.precision == "bf16":
            compute_in(model, torch.bfloat16)
        self._materialise(model, config, settings)
        for name, parameter in model.named_parameters():
            parameter.tensor_model_parallel = self.slices[name].tp_dim is not None  # type: ignore[attr-defined]
        self.model = model
        shapes = {name: part.shape for name, part in self.slices.items()}
        self.zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer, shapes=shapes, moments=self.stage == 0),
            config=settings,
            mpu=_MPU(mesh),
            dist_init_required=False,
        )
        zero_state.make_moments(self.zero, self.stage)

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        count = count_labels(micro_batches, self.mesh)
        # DeepSpeed averages over data ranks; the loss is a sum divided once by the global count.
        scale = self.dp_size / count
        loss_sum = torch.zeros((), device=self.mesh.device)
        self.model.reset_statistics()
        for number, batch in enumerate(micro_batches, start=1):
            self.zero.set_gradient_accumulation_boundary(number == len(micro_batches))
            inputs = self._move(batch.tokens), self._move(batch.labels)
            loss, _ = self.zero(*inputs, doc_ids_BT=self._move(batch.doc_ids))
            self.zero.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        grad_norm = self._step()
        loss_mean = self.mesh.sum_over_dp(loss_sum) / count
        return StepResult(loss_mean.item(), float(grad_norm), int(count.item()))

    def _step(self) -> Tensor | float:
        """Clip and step; the norm before clipping."""
        norm: Tensor | float | None = None
        if self.stage == 0:  # DeepSpeed keeps no norm without ZeRO; gradients are whole on every data rank
            grads = [(p.grad, self.slices[n]) for n, p in self.model.named_parameters() if p.grad is not None]
            norm = global_norm(grads, self.mesh, sharded=False)
        self.zero.step()
        if norm is None:
            norm = self.zero.get_global_grad_norm()
        assert norm is not None
        return norm

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        length = tokens_BT.shape[1]
        tokens_BT, labels_BT, doc_ids_BT = pad_sequence(tokens_BT, labels_BT, doc_ids_BT, self.mesh)
        self.zero.eval()
        with torch.no_grad():
            log_prob_BT, is_argmax_BT = self.zero(
                self._move(tokens_BT), self._move(labels_BT), doc_ids_BT=self._move(doc_ids_BT), per_token=True
            )
        self.zero.train()
        return log_prob_BT[:, :length].cpu(), is_argmax_BT[:, :length].cpu()

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self.mesh.sum_over_dp(torch.tensor(values, dtype=torch.float64, device=self.mesh.device)).tolist()

    def layer_statistics(self) -> dict[str, list[float | None]]:
        import deepspeed

        vectors = [p for p in self.model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
        with deepspeed.zero.GatheredParameters(vectors, enabled=self.stage == 3):
            return layer_statistics(self.model, self.mesh)

    def state_tensors(self) -> dict[str, Tensor]:
        return zero_state.state_tensors(self.zero, self.stage, self.model, self.slices, self.mesh)

    def set_step(self, step: int) -> None:
        self.step_number = step
        zero_state.set_step(self.zero, self.stage, step)

    def unequal_replicas(self) -> dict[str, list[str]]:
        # ZeRO-3 leaves a flat partition of each; alike over tp all the same, where the whole would be.
        return unequal_replicas(
            {name: getattr(p, "ds_tensor", p) for name, p in self.model.named_parameters()}, self.slices, self.mesh
        )

    def _materialise(self, model: nn.Module, config: RunConfig, settings: dict[str, Any]) -> None:
        """Give the meta model its initial weights. Under ZeRO-3 one block at a time, partitioned at once."""
        parts: list[tuple[str, nn.Module]] = [("", model)]
        mpu = _MPU(self.mesh)
        if self.stage == 3:
            parts = [(f"blocks.{number}", block) for number, block in enumerate(model.blocks)]  # type: ignore
            parts += [(name, child) for name, child in model.named_children() if name != "blocks"]
        for prefix, part in parts:
            part.to_empty(device=self.mesh.device)
            init_parameters(part, seed=config.seed, std=config.model.init_std, view=self._as_global, prefix=prefix)
            if self.stage == 3:
                import deepspeed

                group = self.mesh.group("dp_shard")
                deepspeed.zero.Init(module=part, data_parallel_group=group, config_dict_or_path=settings, mpu=mpu)
        if self.stage == 3 and config.model.tie_embeddings:
            # The head reads the embedding's weight, which its own forward would not gather.
            deepspeed.zero.register_external_parameter(model.head, model.embed.weight)  # type: ignore

    def _as_global(self, name: str, stored: Tensor) -> Tensor:
        return as_global(stored, self.slices[name], self.mesh)

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.mesh.device, non_blocking=True)


class _MPU:
    """The mesh in the words DeepSpeed asks in."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("tp")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._mesh.group("tp"), 0)

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("dp_shard")


def _import(mesh: Mesh) -> Any:
    """DeepSpeed, on the device the run is on. Raises UserError where it is not installed."""
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # of this process alone; on a GPU DeepSpeed finds its own
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"engine.kind deepspeed, but it cannot be imported ({error}): pip install 'sisa-dist[deepspeed]', or set "
            "engine.kind to fsdp2"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by the names that torch 2.13 renamed, and torch says so at each call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    if mesh.device.type == "cpu":
        # Compiled on first use for half a minute, for a shared-memory all-reduce that gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
