"""The PyTorch engine: FSDP2 over the data axes around tensor-parallel slices.

One process in fp32 has nothing to shard and nothing to cast, so it runs the plain model; everything else, one
process in bf16 included, goes through `fully_shard`, so that precision means the same at every world size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig
from sisa_dist.engine.base import StepResult
from sisa_dist.engine.build_log import BuildLog
from sisa_dist.engine.checks import check_step, unequal_replicas
from sisa_dist.engine.common import count_labels, layer_statistics, move, read_result, score_batch, spare_memory
from sisa_dist.engine.experts import ExpertLoad, ExpertWatch
from sisa_dist.engine.gates import GateWatch, LearnedDs
from sisa_dist.engine.guard import Guard, skip_if
from sisa_dist.engine.norm import clip_gradients, global_norm
from sisa_dist.engine.optim import build_optimizer, set_rates
from sisa_dist.engine.score_samples import ScoreSamples, ScoreWatch
from sisa_dist.engine.shard import shard
from sisa_dist.model import build_model
from sisa_dist.model.init import init_parameters
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.storage import as_global, buffers_as_global


class FSDP2Engine:
    """Engine over `fully_shard`. Weights and moments are fp32 DTensors (plain tensors on one fp32 process)."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.mesh, self.dp_rank, self.dp_size = mesh, mesh.dp_rank, mesh.dp_size
        self.reduce_size = mesh.reduce_size
        self.grad_clip = config.optimizer.grad_clip
        self.check_every = config.engine.check_every
        self.step_number = 0
        with torch.device("meta"):
            self.model = build_model(config.model, attention=config.attention)
        overlap = config.engine.overlap is not False and not config.engine.compile
        self.slices = apply_plan(self.model, mesh, overlap=overlap)
        spare_memory(self.model, config.engine)
        for block in self.model.blocks if config.engine.compile else ():
            block.compile()
        if mesh.world_size > 1 or config.engine.precision == "bf16" or config.engine.cpu_offload:
            shard(self.model, mesh, config.engine)
        self.model.to_empty(device="cpu" if config.engine.cpu_offload else mesh.device)
        log = BuildLog(mesh, n_layers=config.model.n_layers)
        init_parameters(self.model, seed=config.seed, std=config.model.init_std, view=self._as_global, announce=log)
        self.dealt_out = {name for name, part in self.slices.items() if part.ep_dim is not None}
        self.optimizer = build_optimizer(self.model, config.optimizer, apart=self.dealt_out)
        self.guard = Guard(mesh, spike_sigma=config.training.spike_sigma)
        self.experts = ExpertWatch(self.model, mesh)
        self.gates = GateWatch(self.model, mesh, seed=config.seed, steps=config.training.steps)
        self.scores = ScoreWatch(self.model, mesh, seed=config.seed, compiled=config.engine.compile)

    def train_step(self, micro_batches: Sequence[Batch], lr: float, *, stop: bool = False) -> StepResult:
        enter = self.mesh.enter
        enter("label count")
        count = count_labels(micro_batches, self.mesh)
        # FSDP averages over data ranks, cp ranks among them; the loss is a sum divided once by the global count.
        scale = self.reduce_size / count.clamp(min=1)
        loss_sum = torch.zeros((), device=self.mesh.device)
        self.model.reset_statistics()
        self.gates.before_step()
        for number, batch in enumerate(micro_batches, start=1):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(number == len(micro_batches))
            inputs = move(batch.tokens, self.mesh), move(batch.labels, self.mesh)
            enter("forward")
            loss, _ = self.model(*inputs, doc_ids_BT=move(batch.doc_ids, self.mesh))
            enter("backward")
            (loss * scale).backward()
            loss_sum += loss.detach()
        self._average_experts()
        self.step_number += 1
        if self.check_every and self.step_number % self.check_every == 0:
            enter("sanity checks")
            weights = dict(self.model.named_parameters())
            gradients = {name: p.grad for name, p in weights.items()}
            tied = self.model.config.tie_embeddings
            check_step(weights, gradients, self.slices, self.mesh, tied=tied, step=self.step_number)
        enter("gradient norm")
        grad_norm = self._clip()
        loss_mean = self.mesh.sum_over_reduced(loss_sum) / count
        enter("verdict")
        verdict = self.guard.judge(loss_mean, grad_norm, stop=stop)
        skip_if(self.optimizer, verdict.skip)
        enter("optimizer")
        set_rates(self.optimizer, lr, gates_stand=self.gates.stand)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.experts.after_step(verdict.skip)
        self.gates.after_step()
        enter("results")
        return read_result(loss_mean, grad_norm, count, verdict)

    def score(self, tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with self.scores.look(tokens_BT.shape[1]):
            scores = score_batch(self.model, tokens_BT, labels_BT, doc_ids_BT, self.mesh)
        # What a forward leaves gathered waits for a backward; here none comes, and state_tensors needs the shards.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return scores

    def sum_over_dp(self, values: list[float]) -> list[float]:
        return self.mesh.sum_over_dp(torch.tensor(values, dtype=torch.float64, device=self.mesh.device)).tolist()

    def state_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state[f"model.{name}"] = self._as_global(name, parameter)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self._as_global(name, self.optimizer.state[parameter][moment])
        return state | buffers_as_global(self.model, self.mesh)

    def unequal_replicas(self) -> dict[str, list[str]]:
        return unequal_replicas(dict(self.model.named_parameters()), self.slices, self.mesh)

    def set_step(self, step: int) -> None:
        self.step_number = step
        self.gates.loaded()
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def before_update(self, call: Callable[[], None]) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: call())

    def layer_statistics(self) -> dict[str, list[float | None]]:
        return layer_statistics(self.model, self.mesh)

    def expert_load(self) -> ExpertLoad | None:
        return self.experts.take()

    def learned_d_s(self) -> LearnedDs | None:
        return self.gates.take()

    def sample_scores(self, step: int) -> None:
        self.scores.ask(step)

    def score_samples(self) -> ScoreSamples:
        return self.scores.take()

    def _clip(self) -> Tensor:
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        norm = global_norm([(p.grad, self.slices[name]) for name, p in named], self.mesh)  # type: ignore[misc]
        if self.grad_clip is not None:
            clip_gradients([p for _, p in named], self.grad_clip, norm)
        return norm

    def _average_experts(self) -> None:
        """What FSDP averaged over the holders of the same experts, dp / ep, is made an average over all data ranks.

        Not by FSDP's divide factor: that is a PREMUL_SUM, which gloo has not, and where a plain sum is forced instead
        torch 2.13 divides twice if there is one holder. A shard is divided once a step, which costs next to nothing.
        """
        for name, parameter in self.model.named_parameters() if self.dealt_out else ():
            if name in self.dealt_out and isinstance(parameter.grad, DTensor):
                parameter.grad.to_local().div_(self.mesh.ep_size)

    def _as_global(self, name: str, stored: Tensor) -> Tensor:
        return as_global(stored, self.slices[name], self.mesh)
