"""The content of DeepSpeed's native files, as DeepSpeed 0.19 writes it: what each key holds, stage by stage.

Flat partitions come in mapped from elsewhere. The classes are DeepSpeed's own, so it must be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.convert.deepspeed_layout import Layout
from sisa_dist.convert.deepspeed_ranks import MOMENTS
from sisa_dist.convert.deepspeed_read import CLIENT_STATE


class Flats(Protocol):
    """The flat groups of one tp rank."""

    def whole(self, kind: str, group: int) -> Tensor:
        """[dp · partition] fp32"""

    def partition(self, kind: str, group: int, dp_rank: int) -> Tensor:
        """[partition] fp32, of its own storage: what shares one is saved with it"""


@dataclass(frozen=True)
class States:
    """Makes the content of every file of a checkpoint.

    `names` are all parameters in the module's order; `optimizer` its groups' settings and names; `owners` says of
    which of them each flat group is.
    """

    config: RunConfig
    settings: dict[str, Any]  # DeepSpeed's JSON
    layout: Layout
    stage: int
    dp: int
    tp: int
    step: int
    adam_step: int
    names: Sequence[str]
    optimizer: Sequence[tuple[dict[str, Any], list[str]]]
    owners: Sequence[int]

    def model(self, flats: Flats) -> dict[str, Any]:
        """A `…model_states.pt`. Under stage 3 parameters are placeholders: the optimizer's files hold them."""
        module = {name: torch.empty(0) for name in self.names}
        if self.stage < 3:
            module = self._views(flats, "model")
        zero, frozen = self.stage > 0, self.stage > 1
        return {
            "module": module,
            "buffer_names": [],
            "optimizer": None if zero else self._plain(flats),
            "param_shapes": [dict(group) for group in self.layout.groups] if zero else None,
            "frozen_param_shapes": {} if frozen else None,
            "shared_params": {} if zero else None,
            "frozen_param_fragments": {} if frozen else None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.step,
            "global_samples": self.step * self.config.training.global_batch_windows,
            "dp_world_size": self.dp,
            "mp_world_size": self.tp,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": self.tp},
            "ds_config": self.settings,
            "ds_version": deepspeed().__version__,
            CLIENT_STATE: {"config": dump_config(self.config)},
        }

    def optimizer_state(self, flats: Flats, dp_rank: int) -> dict[str, Any]:
        """A `…optim_states.pt` of stages 1 to 3."""
        state = self._stage_3(flats, dp_rank) if self.stage == 3 else self._stage_12(flats, dp_rank)
        return {"optimizer_state_dict": state, "ds_config": self.settings, "ds_version": deepspeed().__version__}

    def _stage_12(self, flats: Flats, dp_rank: int) -> dict[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        groups = range(len(self.layout.groups))
        paddings = [self.layout.padding(dp_rank, group) for group in groups]
        masters = [flats.partition("model", group, dp_rank) for group in groups]
        fragments: list[dict[str, Any]] = [{} for _ in groups]
        for name in self.layout.offsets:
            for span in self.layout.spans(name):
                if span.rank == dp_rank:
                    fragments[span.group][name] = fragment_address(numel=span.numel, start=span.start)
        return self._common() | {
            "clip_grad": self.config.optimizer.grad_clip or 0.0,
            "base_optimizer_state": self._adam(flats, dp_rank),
            "single_partition_of_fp32_groups": [
                flat[: flat.numel() - padding] for flat, padding in zip(masters, paddings, strict=True)
            ],
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(group) for group in self.layout.groups],
            "partition_count": [self.dp for _ in groups],
            "ds_version": deepspeed().__version__,
            "param_slice_mappings": fragments,
        }

    def _stage_3(self, flats: Flats, dp_rank: int) -> dict[str, Any]:
        return self._common() | {
            "partition_count": self.dp,
            "optimizer_state_dict": self._adam(flats, dp_rank),
            "fp32_flat_groups": [flats.partition("model", group, dp_rank) for group in range(len(self.layout.groups))],
        }

    def _common(self) -> dict[str, Any]:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return {
            "zero_stage": ZeroStageEnum(self.stage),
            "loss_scaler": LossScaler(1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
        }

    def _adam(self, flats: Flats, dp_rank: int) -> dict[str, Any]:
        """AdamW's state_dict where each flat partition is one parameter."""
        groups = range(len(self.layout.groups))
        return {
            "state": {
                group: self._step() | {kind: flats.partition(kind, group, dp_rank) for kind in MOMENTS}
                for group in groups
            },
            "param_groups": [
                settings | {"params": [group for group in groups if self.owners[group] == number]}
                for number, (settings, _) in enumerate(self.optimizer)
            ],
        }

    def _plain(self, flats: Flats) -> dict[str, Any]:
        """AdamW's own state_dict, of stage 0."""
        numbers = {name: number for number, name in enumerate(self.layout.offsets)}
        moments = {kind: self._views(flats, kind) for kind in MOMENTS}
        return {
            "state": {
                number: self._step() | {kind: moments[kind][name] for kind in MOMENTS}
                for name, number in numbers.items()
            },
            "param_groups": [
                settings | {"params": [numbers[name] for name in names]} for settings, names in self.optimizer
            ],
        }

    def _step(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(float(self.adam_step))}

    def _views(self, flats: Flats, kind: str) -> dict[str, Tensor]:
        """Whole parameters of stages 0 to 2, where the partitions of a group follow one another."""
        wholes = [flats.whole(kind, group) for group in range(len(self.layout.groups))]
        views = {}
        for name in self.names:
            (group, at), shape = self.layout.offsets[name], self.layout.shape(name)
            views[name] = wholes[group][at : at + shape.numel()].view(shape)
        return views


def deepspeed() -> Any:
    """The package. Raises UserError where it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"DeepSpeed's files name its classes, and it cannot be imported ({error}): pip install "
            "'sisa-dist[deepspeed]'"
        ) from None
    return deepspeed
