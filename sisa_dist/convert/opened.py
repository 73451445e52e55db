"""A checkpoint of any format, as the framework sees it: its model, tensors under our names, what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import TOKENIZER_FILES, Tokenizer
from sisa_dist.checkpoint import parse_state
from sisa_dist.config import ModelConfig, RunConfig, UserError, parse_config
from sisa_dist.convert.families import buffer_names, parameter_shapes
from sisa_dist.convert.recipe import TensorSource, check_specs
from sisa_dist.convert.tensors import MODEL, MOMENTS, has_moments, weights_of
from sisa_dist.model import build_model

CONFIG, STATE, DATA = "config.yaml", "state.json", "data.json"


@dataclass(frozen=True)
class Target:
    """How a checkpoint is to be written, where its format leaves a choice."""

    model_type: str | None = None  # hf: the architecture to write it as; None: the first that can hold the model
    shard_bytes: int = 5_000_000_000  # hf: most a file holds
    zero_stage: int = 1  # deepspeed: the run it is for, by stage, data and tensor-parallel ranks
    dp: int = 1
    tp: int = 1


@dataclass(frozen=True)
class Opened:
    """Headers only: tensors are read through `source`, whose names are model.X, exp_avg.X and exp_avg_sq.X."""

    path: Path
    format: str
    model: ModelConfig
    source: TensorSource
    config: RunConfig | None = None  # of the run that made it; None: a foreign model
    files: dict[str, bytes] = field(default_factory=dict)  # state.json, data.json, the tokenizer's: what there is
    model_type: str | None = None  # of a foreign architecture, by its Hugging Face name
    foreign: TensorSource | None = None  # its tensors under its own names
    context: int | None = None  # tokens a foreign model was made for, where its config says
    check: Callable[[bool], None] = lambda moments: (
        None
    )  # reads its files, or those that weights alone need, for damage

    def __post_init__(self) -> None:
        """Raises UserError naming the first tensor that is missing, left over or of another shape, and where what lies
        beside the tensors is not what its name says."""
        check_beside(self.files, self.path)
        shapes = parameter_shapes(self.model)
        wanted = {MODEL + name: shape for name, shape in shapes.items()}
        if has_moments(self.source):
            moved = {name: shape for name, shape in shapes.items() if name not in buffer_names(self.model)}
            wanted |= {moment + name: shape for moment in MOMENTS for name, shape in moved.items()}
        check_specs(self.source.specs, wanted, what=str(self.path))
        for name, spec in self.source.specs.items():
            if not spec.dtype.is_floating_point:
                kind = str(spec.dtype).removeprefix("torch.")
                raise UserError(f"{self.path}: {name} is {kind}: quantised weights are not read, name the original")

    @property
    def has_moments(self) -> bool:
        return has_moments(self.source)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.of_files(self.files, self.path)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return {name: self.files[name] for name in TOKENIZER_FILES if name in self.files}

    def with_tokenizer(self, tokenizer: Tokenizer) -> Opened:
        others = {name: content for name, content in self.files.items() if name not in TOKENIZER_FILES}
        return replace(self, files={**others, **tokenizer.files})

    def state(self) -> dict[str, Any]:
        """The state.json of this checkpoint as it stands now: of a foreign model a beginning, marked without moments
        where there are none (a run can begin from it, none can resume)."""
        found: Any = {"step": 0, "cursor": 0, "tokens": 0, "seconds": 0.0, "fingerprint": ""}
        if STATE in self.files:
            found = json.loads(self.files[STATE])
        return {**found, "weights_only": not self.has_moments}

    def run_config(self) -> RunConfig:
        """The run's config; of a foreign model, one that names the model and says nothing of how to train it."""
        if self.config is not None:
            return self.config.model_copy(update={"model": self.model})
        tree = {
            "model": self.model.model_dump(),
            "training": {"steps": 1, "seq_len": self.context or 2048, "global_batch_tokens": self.context or 2048},
            "schedule": {"warmup_steps": 0},
        }
        return parse_config(tree, source=str(self.path))

    def without_moments(self) -> Opened:
        return replace(self, source=weights_of(self.source)) if self.has_moments else self


def check_beside(files: Mapping[str, bytes], path: Path) -> None:
    """Raises UserError where state.json or data.json is not one that a run could go on from."""
    if STATE in files:
        parse_state(files[STATE], source=f"{path}: {STATE}")
    if DATA in files:
        try:
            sound = isinstance(json.loads(files[DATA])["fingerprint"], str)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f"{path}: {DATA}: no mapping with a fingerprint: use another checkpoint")


def fp32_parameters(model: ModelConfig) -> frozenset[str]:
    """Names, with `model.`, of what is fp32 in every forward: gains, decays, λ. bf16 would round 1.0011 to 1.0."""
    with torch.device("meta"):
        modules = build_model(model).named_modules()
    return frozenset(
        f"{MODEL}{module_name}.{name}"
        for module_name, module in modules
        if getattr(module, "fp32_in_forward", False)
        for name in module.state_dict()
    )
