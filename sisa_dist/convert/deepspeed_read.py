"""Reads DeepSpeed's native checkpoints of any ZeRO stage, data and tensor parallelism, one tensor at a time.

Slices of tensor parallelism are merged as the plan cut them, which DeepSpeed's own zero_to_fp32 refuses. It needs no
process group and no DeepSpeed, and unpickles only what deepspeed_files.py lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from sisa_dist.config import ModelConfig, OptimizerConfig, UserError, parse_config
from sisa_dist.convert.deepspeed_files import Files, as_deepspeed_writes, find_tag_folder, model_file, optimizer_file
from sisa_dist.convert.deepspeed_layout import optimizer_groups
from sisa_dist.convert.deepspeed_ranks import MOMENTS, PlainRank, Rank, ZeroRank
from sisa_dist.convert.recipe import check_specs
from sisa_dist.model import LM, build_model
from sisa_dist.parallel.apply import Slice, slices_of

CLIENT_STATE = "sisa_dist"  # our key in what DeepSpeed calls client_state


def is_deepspeed(path: str | Path) -> bool:
    """Whether `path` is what `save_checkpoint` wrote: its folder, or one tag's in it."""
    return find_tag_folder(Path(path)) is not None


def open_deepspeed(path: str | Path, *, model: ModelConfig | None) -> DeepSpeedSource:
    """The checkpoint at `path`, the newest of a folder of several.

    `model` is needed for tp > 1 where the checkpoint is not one that `write_deepspeed` wrote; given, the checkpoint
    must hold that model. None and tp 1: any model, under the names it has. Opens headers only.
    Raises UserError where a file is missing or cannot be read, or the model is another.
    """
    return DeepSpeedSource(Path(path), model)


class DeepSpeedSource:
    """Tensors `model.X`, `exp_avg.X` and `exp_avg_sq.X`, whole and fp32; buffers and frozen ones in their own dtype.

    A tied weight has one name. `notes` says what the checkpoint holds and this source does not.
    """

    def __init__(self, path: Path, model: ModelConfig | None) -> None:
        folder = find_tag_folder(path)
        if folder is None:
            raise UserError(f"{path}: no DeepSpeed checkpoint here: give its folder, the one with the file latest")
        self.path, self.notes = folder, []  # type: tuple[Path, list[str]]
        files = Files(folder)
        sharded = any(folder.glob("zero_pp_rank_*_model_states.pt"))
        first = model_file(3 if sharded else 1, dp_rank=0, tp_rank=0)
        header = files.header(first)
        if header.get("module") is None or any(folder.glob("*expert_*")):
            raise UserError(f"{folder}: saved by a pipeline or a mixture of experts of DeepSpeed's: not read")
        with as_deepspeed_writes(files, first):
            self.dp, self.tp = int(header["dp_world_size"]), int(header["mp_world_size"])
        zero = any(folder.glob("*_optim_states.pt")) or header.get("param_shapes") is not None
        self._find_all(folder, sharded=sharded, zero=zero)
        self.config_text: str | None = (header.get(CLIENT_STATE) or {}).get("config")
        if model is None and self.config_text is not None:
            model = parse_config(yaml.safe_load(self.config_text), source=str(folder)).model
        if model is None and self.tp > 1:
            raise UserError(
                f"{folder}: {self.tp} tensor-parallel ranks, and the files do not say how the model was cut: give the "
                "run's config"
            )
        lm = _on_meta(model) if model else None
        self._slices: Mapping[str, Slice] = slices_of(lm, self.tp) if lm else {}
        order = [name for _, names in optimizer_groups(lm, OptimizerConfig()) for name in names] if lm else None
        self._ranks: list[Rank] = []
        for tp_rank in range(self.tp):
            with as_deepspeed_writes(files, model_file(3 if sharded else 1, dp_rank=0, tp_rank=tp_rank)):
                self._ranks.append(
                    ZeroRank(files, stage=3 if sharded else 2, dp=self.dp, tp_rank=tp_rank)
                    if zero
                    else PlainRank(files, tp_rank=tp_rank, order=order)
                )
        self.stage = 3 if sharded else int((zero and _stage(files)) or 0)
        if lm:
            self._check_model()
        rank = self._ranks[0]
        if not rank.moments:
            self.notes.append(f"{folder}: no moments that can be named: weights only")
        self.step = int(header.get("global_steps") or 0) if rank.step is None else rank.step
        shapes = {name: part.shape for name, part in self._slices.items()} or dict(rank.shapes)
        self.specs = {
            f"{kind}.{name}": torch.empty(shape, dtype=torch.float32, device="meta")
            for kind in ("model", *(MOMENTS if rank.moments else ()))
            for name, shape in shapes.items()
        } | {f"model.{name}": tensor for name, tensor in rank.others.items()}

    def read(self, name: str) -> Tensor:
        kind, _, parameter = name.partition(".")
        first = self._ranks[0].read(kind, parameter)
        if self.tp == 1:
            return first
        part = self._slices[parameter]
        if part.tp_dim is None:
            for tp_rank in range(1, self.tp):
                if not torch.equal(self._ranks[tp_rank].read(kind, parameter), first):
                    raise UserError(
                        f"{self.path}: {name} should be alike on every tensor-parallel rank, and mp_rank_00 and "
                        f"mp_rank_{tp_rank:02d} differ: use another checkpoint"
                    )
            return first
        whole = first.new_empty(part.shape)
        whole[part.of(0, self.tp)] = first
        for tp_rank in range(1, self.tp):
            whole[part.of(tp_rank, self.tp)] = self._ranks[tp_rank].read(kind, parameter)
        return whole

    def _find_all(self, folder: Path, *, sharded: bool, zero: bool) -> None:
        for tp_rank in range(self.tp):
            for dp_rank in range(self.dp):
                names = [model_file(3 if sharded else 1, dp_rank=dp_rank, tp_rank=tp_rank)]
                if zero:
                    names.append(optimizer_file(dp_rank=dp_rank, tp_rank=tp_rank))
                for name in names:
                    if not (folder / name).is_file() and not (folder / f"bf16_{name}").is_file():
                        raise UserError(
                            f"{folder / name}: missing, of {self.dp} data × {self.tp} tensor-parallel ranks: copy "
                            "every rank's files, or use another checkpoint"
                        )

    def _check_model(self) -> None:
        """That every tp rank holds its slice of every parameter of the model, and nothing else."""
        wanted = {name: part.local_shape(self.tp) for name, part in self._slices.items()}
        for tp_rank, rank in enumerate(self._ranks):
            held = {name: torch.empty(shape, device="meta") for name, shape in rank.shapes.items()}
            check_specs(held | dict(rank.others), wanted, what=f"{self.path}, mp_rank_{tp_rank:02d}")


def _stage(files: Files) -> int:
    """1 or 2, which differ in nothing on disk but this; DeepSpeed's bf16 optimizer, which says nothing, is stage 1."""
    name = next(path.name for path in sorted(files.folder.glob("*_optim_states.pt")))
    return int(files.header(name)["optimizer_state_dict"].get("zero_stage", 1))


def _on_meta(model: ModelConfig) -> LM:
    with torch.device("meta"):
        return build_model(model)
