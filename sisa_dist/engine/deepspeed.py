"""The DeepSpeed engine: ZeRO 0 to 3 over the data axis around tensor-parallel slices.

Only this file and deepspeed_experts.py import it.

Slices are plain parameters and the mesh is handed over as `mpu`. `tensor_model_parallel` on a slice tells DeepSpeed's
norm that the other tp ranks hold the rest; without it the norm is wrong and nothing says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine import zero_state
from sisa_dist.engine.base import StepResult
from sisa_dist.engine.build_log import BuildLog
from sisa_dist.engine.checks import check_step, unequal_replicas
from sisa_dist.engine.common import count_labels, layer_statistics, move, read_result, score_batch, spare_memory
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.engine.deepspeed_config import deepspeed_config
from sisa_dist.engine.deepspeed_experts import announced
from sisa_dist.engine.experts import ExpertLoad, ExpertWatch
from sisa_dist.engine.gates import GateWatch, LearnedDs
from sisa_dist.engine.guard import Guard, Verdict, skip_if
from sisa_dist.engine.norm import global_norm
from sisa_dist.engine.optim import build_optimizer, set_rates
from sisa_dist.engine.score_samples import ScoreSamples, ScoreWatch
from sisa_dist.model import build_model
from sisa_dist.model.init import init_parameters
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import as_global, buffers_as_global


class DeepSpeedEngine:
    """Engine over `deepspeed.initialize`. Weights and moments are fp32, flat and partitioned as the stage says."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._deepspeed = deepspeed = _import(mesh)
        self.mesh, self.dp_rank, self.dp_size = mesh, mesh.dp_rank, mesh.dp_size
        self.reduce_size = mesh.reduce_size
        self.stage = config.engine.zero_stage
        settings = deepspeed_config(config, dp_size=mesh.dp_size, cuda=mesh.device.type == "cuda")
        if mesh.is_main and Path(config.output_dir).is_dir():
            (Path(config.output_dir) / "deepspeed.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        with torch.device("meta"):
            model = build_model(config.model, attention=config.attention)
        # Under ZeRO-3 a weight is gathered for its owner's forward only: no overlap, which reads it before.
        self.slices = apply_plan(model, mesh, overlap=False)
        spare_memory(model, config.engine)
        if config.engine.precision == "bf16":
            compute_in(model, torch.bfloat16)
        try:
            self._materialise(model, config, settings)
        except deepspeed.runtime.config.DeepSpeedConfigError as error:
            raise UserError(f"engine.deepspeed_config: {' '.join(str(error).split())}") from None
        for name, parameter in model.named_parameters():
            parameter.tensor_model_parallel = self.slices[name].tp_dim is not None  # type: ignore[attr-defined]
        self.model = model
        shapes = {name: part.shape for name, part in self.slices.items()}
        apart = {name for name, part in self.slices.items() if part.ep_dim is not None}
        self.adamw = build_optimizer(model, config.optimizer, shapes=shapes, moments=self.stage == 0, apart=apart)
        with announced(model, apart, self.adamw, mesh) if apart else contextlib.nullcontext():
            self.zero, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.adamw,
                config=settings,
                mpu=_MPU(mesh),
                dist_init_required=False,
            )
        zero_state.make_moments(self.zero, self.stage)
        self.guard = Guard(mesh, spike_sigma=config.training.spike_sigma)
        self.experts = ExpertWatch(model, mesh)
        self.gates = GateWatch(model, mesh, seed=config.seed, steps=config.training.steps)
        self.scores = ScoreWatch(model, mesh, seed=config.seed)
        self.check_every = config.engine.check_every
        self.step_number = 0
        self.adamw.register_step_pre_hook(self._judge)
        self._waits: list[Callable[[], None]] = []

    def train_step(self, micro_batches: Sequence[Batch], lr: float, *, stop: bool = False) -> StepResult:
        enter = self.mesh.enter
        enter("label count")
        count = count_labels(micro_batches, self.mesh)
        # DeepSpeed averages over data ranks, cp ranks among them; the loss is a sum divided once by the global count.
        scale = self.reduce_size / count.clamp(min=1)
        loss_sum = torch.zeros((), device=self.mesh.device)
        self.model.reset_statistics()
        self.gates.before_step()
        for number, batch in enumerate(micro_batches, start=1):
            self.zero.set_gradient_accumulation_boundary(number == len(micro_batches))
            inputs = move(batch.tokens, self.mesh), move(batch.labels, self.mesh)
            enter("forward")
            loss, _ = self.zero(*inputs, doc_ids_BT=move(batch.doc_ids, self.mesh))
            enter("backward")
            self.zero.backward(loss * scale, scale_wrt_gas=False)
            loss_sum += loss.detach()
        self.step_number += 1
        if self.check_every and self.step_number % self.check_every == 0:
            enter("sanity checks")
            weights, gradients = self._weights(), self._gradients()
            tied = self.model.config.tie_embeddings
            check_step(weights, gradients, self.slices, self.mesh, tied=tied, step=self.step_number)
        enter("loss")
        loss_mean = self.mesh.sum_over_reduced(loss_sum) / count
        set_rates(self.zero.optimizer, lr, gates_stand=self.gates.stand)
        enter("optimizer")
        self._judgement = _Judgement(loss_mean, stop)
        self._step()
        judged = self._judgement
        if judged.verdict is None:  # ZeRO met a gradient that is not finite and did not get as far as AdamW
            for wait in self._waits:  # what follows writes buffers, which a save may be copying
                wait()
            judged.norm = torch.full_like(loss_mean, float("inf"))
            judged.verdict = self.guard.judge(loss_mean, judged.norm, stop=stop)
        assert judged.norm is not None
        self.experts.after_step(judged.verdict.skip)
        self.gates.after_step()
        enter("results")
        return read_result(loss_mean, judged.norm, count, judged.verdict)

    def _step(self) -> None:
        """Clip and step. DeepSpeed knows the norm inside; there, just before AdamW moves, the guard is asked."""
        if self.stage == 0:  # it keeps no norm without ZeRO; gradients are whole on every data rank
            grads = [(p.grad, self.slices[n]) for n, p in self.model.named_parameters() if p.grad is not None]
            self._judgement.norm = global_norm(grads, self.mesh, sharded=False)
        self.zero.step()

    def _judge(self, adamw: torch.optim.AdamW, *_: Any) -> None:
        """Before each step of AdamW, which under ZeRO-3 takes several for one of ours."""
        judgement = self._judgement
        if judgement.verdict is None:
            if judgement.norm is None:
                norm = torch.as_tensor(self.zero.optimizer._global_grad_norm, device=self.mesh.device)
                judgement.norm = norm.float().where(norm >= 0, float("inf"))  # −1 stands for one that is not finite
            judgement.verdict = self.guard.judge(judgement.loss, judgement.norm, stop=judgement.stop)
        skip_if(adamw, judgement.verdict.skip)

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.zero.eval()
        with self.scores.look(tokens_BT.shape[1]):
            scores = score_batch(self.zero, tokens_BT, labels_BT, doc_ids_BT, self.mesh)
        self.zero.train()
        return scores

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self.mesh.sum_over_dp(torch.tensor(values, dtype=torch.float64, device=self.mesh.device)).tolist()

    def before_update(self, call: Callable[[], None]) -> None:
        self._waits.append(call)
        self.adamw.register_step_pre_hook(lambda *_: call())

    def layer_statistics(self) -> dict[str, list[float | None]]:
        vectors = [p for p in self.model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
        with self._deepspeed.zero.GatheredParameters(vectors, enabled=self.stage == 3):
            return layer_statistics(self.model, self.mesh)

    def state_tensors(self) -> dict[str, Tensor]:
        state = zero_state.state_tensors(self.zero, self.stage, self.model, self.slices, self.mesh)
        return state | buffers_as_global(self.model, self.mesh)

    def set_step(self, step: int) -> None:
        self.step_number = step
        self.gates.loaded()
        zero_state.set_step(self.zero, self.stage, step)

    def unequal_replicas(self) -> dict[str, list[str]]:
        return unequal_replicas(self._weights(), self.slices, self.mesh)

    def expert_load(self) -> ExpertLoad | None:
        return self.experts.take()

    def learned_d_s(self) -> LearnedDs | None:
        return self.gates.take()

    def sample_scores(self, step: int) -> None:
        self.scores.ask(step)

    def score_samples(self) -> ScoreSamples:
        return self.scores.take()

    def _weights(self) -> dict[str, Tensor]:
        """What forward uses. Under ZeRO-3 this rank's flat partitions; alike over tp where the whole would be."""
        return {name: zero_state.held(p) if self.stage == 3 else p for name, p in self.model.named_parameters()}

    def _gradients(self) -> dict[str, Tensor]:
        """Whole over data ranks, this rank's tp slice; between backward and step. For checks: it gathers."""
        from deepspeed.utils import safe_get_full_grad

        named = list(self.model.named_parameters())
        return {name: p.grad if self.stage == 0 else safe_get_full_grad(p) for name, p in named}  # type: ignore

    def _materialise(self, model: nn.Module, config: RunConfig, settings: dict[str, Any]) -> None:
        """Give the meta model its initial weights. Under ZeRO-3 one block at a time, partitioned at once."""
        parts: list[tuple[str, nn.Module]] = [("", model)]
        if self.stage == 3:
            parts = [(f"blocks.{number}", block) for number, block in enumerate(model.blocks)]  # type: ignore
            parts += [(name, child) for name, child in model.named_children() if name != "blocks"]
        log = BuildLog(self.mesh, n_layers=config.model.n_layers)
        settle = dict(seed=config.seed, std=config.model.init_std, view=self._as_global, announce=log)
        partition = None
        for prefix, part in parts:
            part.to_empty(device=self.mesh.device)
            init_parameters(part, prefix=prefix, **settle)  # type: ignore[arg-type]
            if self.stage == 3 and partition is None:
                group = self.mesh.group("dp_shard")
                partition = self._deepspeed.zero.Init(
                    module=part, data_parallel_group=group, config_dict_or_path=settings, mpu=_MPU(self.mesh)
                )
            elif partition is not None:  # a second Init would make its process groups again, and refuses
                partition._convert_to_zero_parameters(part.parameters())
        if self.stage == 3 and config.model.tie_embeddings:
            # The head reads the embedding's weight, which its own forward would not gather.
            self._deepspeed.zero.register_external_parameter(model.head, model.embed.weight)  # type: ignore

    def _as_global(self, name: str, stored: Tensor) -> Tensor:
        return as_global(stored, self.slices[name], self.mesh)


@dataclass
class _Judgement:
    """What the guard is asked with, and its answer, for one step."""

    loss: Tensor
    stop: bool
    norm: Tensor | None = None
    verdict: Verdict | None = None


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
        return self._mesh.reduce_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.reduce_size

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
