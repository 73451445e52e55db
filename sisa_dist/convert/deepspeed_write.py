"""Writes what DeepSpeed's `load_checkpoint` reads, for a stated ZeRO stage and topology, one tensor at a time.

Every rank's flat partitions are laid out in scratch files and saved from there, so memory stays at about one tensor
whatever the model; the disk holds up to twice the checkpoint meanwhile. Only our LM with our optimizer's groups is
written: the order of parameters in those groups is all that says which element is whose.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sisa_dist.config import RunConfig, UserError, sync
from sisa_dist.convert.deepspeed_files import model_file, optimizer_file
from sisa_dist.convert.deepspeed_layout import Group, Layout, optimizer_groups, sub_groups
from sisa_dist.convert.deepspeed_ranks import MOMENTS
from sisa_dist.convert.deepspeed_states import States, deepspeed
from sisa_dist.convert.recipe import TensorSource, check_specs
from sisa_dist.engine.deepspeed_config import deepspeed_config
from sisa_dist.model import build_model
from sisa_dist.parallel.apply import Slice, slices_of

KINDS = ("model", *MOMENTS)


def write_deepspeed(
    source: TensorSource,
    path: str | Path,
    *,
    config: RunConfig,
    step: int,
    stage: int,
    dp: int,
    tp: int,
    progress: Callable[[str], None],
) -> None:
    """Write `source` (`model.X` and, all or none, `exp_avg.X` and `exp_avg_sq.X`) as a checkpoint with tag and latest.

    An engine of `config`'s model and optimizer, ZeRO `stage`, `dp` data and `tp` tensor-parallel ranks loads it and
    goes on. `step` counts the steps that moved weights. Without moments they are zeros and Adam's own count starts at
    0, as in a new run. `path` must not exist; it appears whole. Each tensor and file is said to `progress`.
    Raises UserError where source and model differ, the topology does not fit, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists: give a folder that does not")
    states, slices, moments = _plan(source, config, step=step, stage=stage, dp=dp, tp=tp)
    if not moments:
        progress("the source has no moments: zeros are written, and Adam's count of steps starts at 0")
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # what a kill left
    try:
        _write(source, beside, states, slices, progress)
        beside.rename(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose a place with room") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _plan(
    source: TensorSource, config: RunConfig, *, step: int, stage: int, dp: int, tp: int
) -> tuple[States, Mapping[str, Slice], bool]:
    """All that is decided, and checked, before anything is written."""
    if stage not in (0, 1, 2, 3) or min(dp, tp) < 1:
        raise UserError(f"stage {stage}, dp {dp}, tp {tp}: a stage is 0 to 3, dp and tp are at least 1")
    with torch.device("meta"):
        model = build_model(config.model)
    slices = slices_of(model, tp)
    moments = any(name.startswith(MOMENTS) for name in source.specs)
    kinds = KINDS if moments else ("model",)
    wanted = {f"{kind}.{name}": part.shape for kind in kinds for name, part in slices.items()}
    check_specs(source.specs, wanted, what="the source")
    deepspeed()
    engine = config.engine.model_copy(update={"kind": "deepspeed", "zero_stage": stage})
    settings = deepspeed_config(config.model_copy(update={"engine": engine}), dp_size=dp, cuda=False)
    zero = settings["zero_optimization"]
    for key in ("round_robin_gradients", "parameter_alignment"):
        if zero.get(key):
            raise UserError(
                f"engine.deepspeed_config.zero_optimization.{key} lays parameters out in a way that is not written: "
                "remove it"
            )
    optimizer = optimizer_groups(model, config.optimizer)
    groups: list[Group] = [{name: slices[name].local_shape(tp) for name in names} for _, names in optimizer]
    owners = list(range(len(groups)))
    if stage == 3:
        groups, owners = sub_groups(groups, dp=dp, largest=int(zero.get("sub_group_size", 1_000_000_000)))
    states = States(
        config=config,
        settings=settings,
        layout=Layout.of(groups, stage=stage, dp=dp if stage else 1),
        stage=stage,
        dp=dp,
        tp=tp,
        step=step,
        adam_step=step if moments else 0,
        names=list(slices),
        optimizer=optimizer,
        owners=owners,
    )
    return states, slices, moments


def _write(
    source: TensorSource,
    folder: Path,
    states: States,
    slices: Mapping[str, Slice],
    progress: Callable[[str], None],
) -> None:
    tag = f"global_step{states.step}"
    (folder / tag).mkdir(parents=True)
    scratch = [_Scratch(folder / f"scratch{tp_rank}", states.layout) for tp_rank in range(states.tp)]
    for name in source.specs:
        progress(name)
        kind, _, parameter = name.partition(".")
        whole = source.read(name).float()
        for tp_rank, flats in enumerate(scratch):
            flats.write(kind, parameter, whole[slices[parameter].of(tp_rank, states.tp)])
    del whole
    for tp_rank, flats in enumerate(scratch):
        for dp_rank in range(states.dp if states.stage == 3 else 1):
            name = model_file(states.stage, dp_rank=dp_rank, tp_rank=tp_rank)
            progress(name)
            _save(states.model(flats), folder / tag / name)
        for dp_rank in range(states.dp if states.stage else 0):
            name = optimizer_file(dp_rank=dp_rank, tp_rank=tp_rank)
            progress(name)
            _save(states.optimizer_state(flats, dp_rank), folder / tag / name)
        flats.remove()
    (folder / "latest").write_text(tag, encoding="utf-8")
    for written in (folder / "latest", folder / tag, folder):
        sync(written)


class _Scratch:
    """The flat groups of one tp rank as files [dp, partition] fp32 by kind and group; what is not written is zero."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        folder.mkdir()
        self._files: dict[tuple[str, int], IO[bytes]] = {}
        for kind in KINDS:
            for group, size in enumerate(layout.partitions):
                file = (folder / f"{kind}{group}").open("w+b")
                file.truncate(layout.dp * size * 4)
                self._files[kind, group] = file

    def write(self, kind: str, name: str, local: Tensor) -> None:
        """Lay a parameter's slice where the layout has it."""
        flat = local.contiguous().view(-1).numpy()
        for span in self._layout.spans(name):
            file = self._files[kind, span.group]
            file.seek((span.rank * self._layout.partitions[span.group] + span.start) * 4)
            file.write(flat[span.first : span.first + span.numel].data)

    def whole(self, kind: str, group: int) -> Tensor:
        return self._mapped(kind, group, 0, self._layout.dp)

    def partition(self, kind: str, group: int, dp_rank: int) -> Tensor:
        return self._mapped(kind, group, dp_rank, 1)

    def _mapped(self, kind: str, group: int, first: int, partitions: int) -> Tensor:
        file, size = self._files[kind, group], self._layout.partitions[group]
        file.flush()
        # Copy on write, though nobody writes: torch takes no read-only memory.
        where: Any = dict(dtype=np.float32, mode="c", offset=first * size * 4, shape=partitions * size)
        return torch.from_numpy(np.memmap(file, **where))

    def remove(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder)


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how its writer says that the disk is full
        raise OSError(f"{path.name}: {str(error).splitlines()[0]}") from None
    sync(path)
