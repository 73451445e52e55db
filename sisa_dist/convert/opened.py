"""A checkpoint of any format, as the framework sees it: its model, tensors under our names, what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import TOKENIZER_FILES, Tokenizer
from sisa_dist.config import ModelConfig, RunConfig, UserError, parse_config
from sisa_dist.convert.families import parameter_shapes
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
    check: Callable[[bool], None] = lambda moments: (
        None
    )  # reads its files, or those that weights alone need, for damage

    def __post_init__(self) -> None:
        """Raises UserError naming the first tensor that is missing, left over or of another shape."""
        shapes = parameter_shapes(self.model)
        wanted = {MODEL + name: shape for name, shape in shapes.items()}
        if has_moments(self.source):
            wanted |= {moment + name: shape for moment in MOMENTS for name, shape in shapes.items()}
        check_specs(self.source.specs, wanted, what=str(self.path))

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
            try:
                found = json.loads(self.files[STATE])
            except ValueError as error:
                raise UserError(f"{self.path}: its {STATE} cannot be read ({error}): use another checkpoint") from None
            if not isinstance(found, dict):
                raise UserError(f"{self.path}: its {STATE} is no mapping: use another checkpoint")
        return {**found, "weights_only": not self.has_moments}

    def run_config(self) -> RunConfig:
        """The run's config; of a foreign model, one that names the model and says nothing of how to train it."""
        if self.config is not None:
            return self.config.model_copy(update={"model": self.model})
        tree = {
            "model": self.model.model_dump(),
            "training": {"steps": 1, "seq_len": 2048, "global_batch_tokens": 2048},
            "schedule": {"warmup_steps": 0},
        }
        return parse_config(tree, source=str(self.path))

    def without_moments(self) -> Opened:
        return replace(self, source=weights_of(self.source)) if self.has_moments else self


def fp32_parameters(model: ModelConfig) -> frozenset[str]:
    """Names, with `model.`, of what is fp32 in every forward: gains, decays, λ. bf16 would round 1.0011 to 1.0."""
    with torch.device("meta"):
        modules = build_model(model).named_modules()
    return frozenset(
        f"{MODEL}{module_name}.{name}"
        for module_name, module in modules
        if getattr(module, "fp32_in_forward", False)
        for name, _ in module.named_parameters()
    )
