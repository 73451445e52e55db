"""Turns what the loop did into metrics records and console lines. The main rank has one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import Loader, StepBatch
from sisa_dist.checkpoint import Saved, TrainState
from sisa_dist.config import RunConfig, UserError
from sisa_dist.engine import StepResult
from sisa_dist.engine.experts import ExpertLoad
from sisa_dist.engine.gates import LearnedDs
from sisa_dist.engine.score_samples import ScoreSamples
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.console import Console
from sisa_dist.training.devices import peak_flops
from sisa_dist.training.metrics import Metrics, memory_bytes

COLLAPSED = 0.01  # of its fair share of tokens: an expert with less learns next to nothing
# By model.moe.balance: what presses harder.
_REMEDIES = {
    "loss": "raise model.moe.balance_weight",
    "bias": "raise model.moe.bias_rate",
    "none": "set model.moe.balance to loss or bias",
}


class Reporter:
    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        mesh: Mesh,
        *,
        state: TrainState,
        same: bool,
        quiet: bool,
        stage: int | None = None,
    ) -> None:
        """`same`: the run goes on as it was, so that steps done again must read what metrics.jsonl has of them.

        `stage`: the number that every record carries, in a run of stages.
        """
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._device = mesh.device
        self._peak = peak_flops(mesh.device, dtype)
        if mesh.device.type != "cpu":  # ranks of one host share its cores
            self._peak *= mesh.world_size
        self._flops_per_token = training_flops_per_token(config.model, config.training.seq_len)
        self._metrics = Metrics(run_folder, config, step=state.step, stage=stage)
        self._digests = self._metrics.dropped_digests if same and state.step else {}
        self._shares = config.data.shares
        self._balance = config.model.moe.balance if config.model.moe is not None else "none"
        self._skips_missing = config.data.on_missing == "skip"
        self._console = Console(config.training.steps, every=config.logging.every, quiet=quiet)

    def step(
        self,
        state: TrainState,
        result: StepResult,
        *,
        lr: float,
        seconds: float,
        waited: float,
        batch: StepBatch,
        loader: Loader,
    ) -> None:
        before = self._digests.pop(state.step, batch.digest)
        if before != batch.digest:
            raise UserError(
                f"step {state.step}: done again, and its samples are not those of the first time (digest {before} in "
                f"metrics.jsonl, {batch.digest} now): restore data and code, or go on all the same by --accept-changes"
            )
        rate = result.tokens / seconds
        self._metrics.write(
            "train",
            state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=rate,
            mfu=rate * self._flops_per_token / self._peak,
            memory_bytes=memory_bytes(self._device),
            loader_wait=waited / seconds,
            digest=batch.digest,
            epochs=loader.stage.epochs(state.cursor),
            padding=batch.padding,
            skipped=result.skipped,
            skipped_steps=state.skipped,
            **({"missing_windows": batch.missing_windows} if self._skips_missing else {}),
        )
        if result.skipped:
            why = f"loss {result.loss:.4f}, norm {result.grad_norm:.2f} (not finite, or a spike)"
            self._console.note(state.step, f"skipped: {why if result.tokens else 'no label in it counts'}")
        self._console.step(state.step, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens_per_second=rate)

    def layers(self, state: TrainState, layers: dict[str, list[float | None]]) -> None:
        if any(value is not None for value in layers["lambda"]):
            self._metrics.write("layers", state.step, **layers)

    def scores(self, state: TrainState, found: ScoreSamples) -> None:
        if any(value is not None for value in found.moved):
            self._metrics.write("scores", state.step, **asdict(found))

    def experts(self, state: TrainState, load: ExpertLoad) -> None:
        """Since the last such record (or since the run was started again); one line where experts starve."""
        self._metrics.write(
            "experts",
            state.step,
            layers=load.layers,
            counts=load.counts,
            balance_loss=load.balance_loss,
            z_loss=load.z_loss,
        )
        starved = [
            (layer, expert, count * len(counts) / sum(counts))
            for layer, counts in zip(load.layers, load.counts, strict=True)
            for expert, count in enumerate(counts)
            if count * len(counts) < COLLAPSED * sum(counts)
        ]
        if starved:
            layer, expert, share = starved[0]
            others = f", and so did {len(starved) - 1} others" if starved[1:] else ""
            self._console.note(
                state.step,
                f"warning: expert {expert} of layer {layer} got {share:.2%} of its fair share of tokens{others}: "
                f"routing collapses; {_REMEDIES[self._balance]}, or lower optimizer.lr",
            )

    def learned_d_s(self, state: TrainState, found: LearnedDs) -> None:
        self._metrics.write("d_s", state.step, **asdict(found))

    def evaluation(self, state: TrainState, losses: dict[str, float]) -> None:
        """`losses` by source. Of a mixture the mean by shares counts, and each source's stands beside it."""
        if self._shares is None:
            (loss,) = losses.values()
            self._metrics.write("evaluation", state.step, validation_loss=loss)
        else:
            total = sum(self._shares[name] for name in losses)
            loss = sum(self._shares[name] * losses[name] for name in losses) / total
            self._metrics.write("evaluation", state.step, validation_loss=loss, validation_losses=losses)
        self._console.note(state.step, f"validation loss {loss:.4f}")

    def by_length(self, state: TrainState, kind: str, found: dict[str, Any], told: str) -> None:
        """A record of `kind`, with one line on the console."""
        self._metrics.write(kind, state.step, **found)
        self._console.note(state.step, told)

    def saves(self, saves: list[Saved]) -> None:
        for save in saves:
            self._metrics.write(
                "checkpoint", save.step, blocked_seconds=save.blocked, seconds=save.seconds, rank_bytes=save.bytes
            )

    def note(self, state: TrainState, text: str) -> None:
        self._console.note(state.step, text)

    def close(self) -> None:
        self._console.close()
        self._metrics.close()
