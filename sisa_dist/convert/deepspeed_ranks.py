"""What one tensor-parallel rank's files hold: its slices of every parameter, put together over data ranks.

ZeRO-1 to 3 keep masters and moments as flat partitions, stage 0 as whole tensors. It knows nothing of a model's plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.convert.deepspeed_files import Files, as_deepspeed_writes, model_file, optimizer_file
from sisa_dist.convert.deepspeed_layout import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroRank:
    """Stages 1 to 3. Masters are read, never the copies in bf16 that forward uses.

    `shapes`: this rank's slices. `others`: tensors that no optimizer holds (buffers, frozen ones), as meta tensors.
    `step`: Adam's count, None before its first.
    """

    def __init__(self, files: Files, *, stage: int, dp: int, tp_rank: int) -> None:
        self._files, self._stage, self._dp, self._tp_rank = files, stage, dp, tp_rank
        self._checked: set[int] = set()
        self._prefix = "bf16_" if (files.folder / f"bf16_{optimizer_file(dp_rank=0, tp_rank=tp_rank)}").exists() else ""
        header = files.header(self._model_file(0))
        groups = [dict(group) for group in header["param_shapes"]]
        self.shapes = {name: torch.Size(shape) for group in groups for name, shape in group.items()}
        self.step: int | None = None
        state = self._optimizer(0)
        self._layout = Layout.of(groups, stage=stage, dp=dp, paddings=state.get("param_alignment_paddings"))
        self.moments = all(self._adam(state, group).keys() >= set(MOMENTS) for group in range(len(groups)))
        self._check(0)
        module, shared = header["module"], header.get("shared_params") or {}
        self._frozen = dict(header.get("frozen_param_shapes") or {}) if stage == 3 else {}
        self.others = {
            name: torch.empty(shape, dtype=header["frozen_param_fragments"][name].dtype, device="meta")
            for name, shape in self._frozen.items()
        }
        for name, tensor in module.items():
            held = name in header["buffer_names"] if stage == 3 else name not in self.shapes and name not in shared
            if held:
                self.others[name] = tensor.to("meta")

    def read(self, kind: str, name: str) -> Tensor:
        """`kind`: model, exp_avg or exp_avg_sq. A tensor of its own memory."""
        if name in self._frozen:
            parts = [self._touch(self._model_file(rank))["frozen_param_fragments"][name] for rank in range(self._dp)]
            whole = torch.cat([part.detach().flatten() for part in parts])[: math.prod(self._frozen[name])]
            return whole.view(self._frozen[name])
        if name in self.others:
            tensor = self._touch(self._model_file(0))["module"][name].detach().clone()
            self._files.touched(tensor.nbytes)
            return tensor
        flat = torch.empty(math.prod(self.shapes[name]))
        for span in self._layout.spans(name):
            self._check(span.rank)
            self._files.verify(self._optimizer_file(span.rank))
            held = self._flat(self._optimizer(span.rank), kind, span.group)
            flat[span.first : span.first + span.numel] = held[span.start : span.start + span.numel].detach()
            self._files.touched(span.numel * flat.itemsize)
        return flat.view(self.shapes[name])

    def _flat(self, state: Mapping[str, Any], kind: str, group: int) -> Tensor:
        if kind != "model":
            return self._adam(state, group)[kind]
        return state["fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"][group]

    def _adam(self, state: Mapping[str, Any], group: int) -> Mapping[str, Any]:
        """The optimizer's state of one flat partition; empty before its first step."""
        base = state["optimizer_state_dict" if self._stage == 3 else "base_optimizer_state"]
        if isinstance(base, list):  # elastic_checkpoint
            return base[group]
        ids = [number for group in base["param_groups"] for number in group["params"]]
        return base["state"].get(ids[group], {})

    def _check(self, rank: int) -> None:
        """That a data rank's file is of this save: as many elements as the parameters need, and the same step."""
        if rank in self._checked:
            return
        name = self._optimizer_file(rank)
        with as_deepspeed_writes(self._files, name):
            self._check_state(rank, self._optimizer(rank), name)
        self._checked.add(rank)

    def _check_state(self, rank: int, state: Mapping[str, Any], name: str) -> None:
        for group, size in enumerate(self._layout.partitions):
            lean = size - self._layout.padding(rank, group)
            for kind in ("model", *(MOMENTS if self.moments else ())):
                flat = self._flat(state, kind, group)
                if flat.dtype != torch.float32:
                    raise UserError(f"{self._files.folder / name}: {kind} is {flat.dtype}: only fp32 is read")
                if flat.numel() not in (size, lean):
                    raise UserError(
                        f"{self._files.folder / name}: {kind} has {flat.numel()} elements in group {group}, the "
                        f"parameters need {size} on {self._dp} data ranks: a file of another save, or of a layout "
                        "that is not known here"
                    )
        step = step_of(self._adam(state, 0), state)
        if rank == 0:
            self.step = step
        elif step != self.step:
            raise UserError(
                f"{self._files.folder / name}: step {step}, data rank 0 is at {self.step}: files of two saves"
            )

    def _optimizer(self, rank: int) -> Mapping[str, Any]:
        name = self._optimizer_file(rank)
        with as_deepspeed_writes(self._files, name):
            return self._files.header(name)["optimizer_state_dict"]

    def _touch(self, name: str) -> Mapping[str, Any]:
        self._files.verify(name)
        return self._files.header(name)

    def _optimizer_file(self, rank: int) -> str:
        return self._prefix + optimizer_file(dp_rank=rank, tp_rank=self._tp_rank)

    def _model_file(self, rank: int) -> str:
        return model_file(self._stage, dp_rank=rank, tp_rank=self._tp_rank)


class PlainRank:
    """Stage 0: whole tensors, and AdamW's state by number. Attributes as those of ZeroRank.

    `order` names the optimizer's parameters; None: the module's order where there is a single group, for then it is
    that. `moments` is False where their names cannot be known.
    """

    def __init__(self, files: Files, *, tp_rank: int, order: Sequence[str] | None) -> None:
        self._files, self._name = files, model_file(0, dp_rank=0, tp_rank=tp_rank)
        header = files.header(self._name)
        tensors, buffers = header["module"], header["buffer_names"]
        adam = header["optimizer"]
        if not isinstance(adam, dict) or not {"state", "param_groups"} <= adam.keys():
            raise UserError(
                f"{files.folder / self._name}: stage 0 under DeepSpeed's own bf16 or fp16, whose masters are not read: "
                "save under zero_optimization.stage 1"
            )
        seen: set[tuple[Any, ...]] = set()
        names = []
        for name, tensor in tensors.items():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
            if tensor.numel() == 0 or place not in seen:  # else a second name of a tied weight
                names.append(name)
            seen.add(place)
        self.others = {name: tensors[name].to("meta") for name in names if name in buffers}
        self.shapes = {name: tensors[name].shape for name in names if name not in buffers}
        ids = [number for group in adam["param_groups"] for number in group["params"]]
        if order is None and len(adam["param_groups"]) == 1:
            order = list(self.shapes)
        self._ids = dict(zip(order, ids, strict=True)) if order is not None and len(order) == len(ids) else {}
        self.moments = bool(self._ids) and all(
            all(kind in state and state[kind].shape == self.shapes.get(name) for kind in MOMENTS)
            for name, state in ((name, adam["state"].get(number, {})) for name, number in self._ids.items())
        )
        self.step = step_of(adam["state"].get(ids[0], {}), adam)

    def read(self, kind: str, name: str) -> Tensor:
        self._files.verify(self._name)
        header = self._files.header(self._name)
        tensor = header["module"][name] if kind == "model" else header["optimizer"]["state"][self._ids[name]][kind]
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._files.touched(copy.nbytes)
        return copy


def step_of(adam: Mapping[str, Any], optimizer: Mapping[str, Any]) -> int | None:
    """AdamW keeps its count with the moments; some of DeepSpeed's own keep it in the group."""
    base = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict", optimizer))
    groups = base.get("param_groups", ()) if isinstance(base, dict) else ()
    step = adam.get("step", groups[0].get("step") if groups else None)
    return None if step is None else int(step)


Rank = ZeroRank | PlainRank
