"""The tables of formats and of foreign architectures. Both are modules, imported when they are needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from sisa_dist.config import ModelConfig, RunConfig, UserError
from sisa_dist.convert.opened import Opened, Target
from sisa_dist.convert.recipe import Recipes, TensorSource

FORMATS = {  # in the order in which a path is tried
    "native": "sisa_dist.convert.native",
    "safetensors": "sisa_dist.convert.consolidated",
    "hf": "sisa_dist.convert.transformers_folder",
    "deepspeed": "sisa_dist.convert.zero_folder",
}
ARCHITECTURES = {  # by the model_type of config.json, in the order in which an export tries them
    "llama": "sisa_dist.convert.llama",
    "mistral": "sisa_dist.convert.llama",
    "qwen2": "sisa_dist.convert.llama",
    "qwen3": "sisa_dist.convert.llama",
    "gpt_neox": "sisa_dist.convert.neox",
    "mamba2": "sisa_dist.convert.mamba2",
    "jamba": "sisa_dist.convert.jamba",
    "falcon_h1": "sisa_dist.convert.falcon_h1",
    "sisa": "sisa_dist.convert.hf_sisa",
}


class Format(Protocol):
    """A module that reads and writes one format."""

    HOLDS_MOMENTS: bool
    MASTERS: bool  # its weights are fp32, always

    def matches(self, path: Path) -> bool:
        """Does what lies at `path` look like it? Opens nothing large."""

    def open_checkpoint(self, path: Path) -> Opened:
        """Headers only. Raises UserError where it is damaged or not a model we know."""

    def made(self, opened: Opened, target: Target) -> TensorSource:
        """The tensors that `write` will write, under the format's own names."""

    def write(self, path: Path, opened: Opened, source: TensorSource, target: Target) -> None:
        """Writes `source`, what `made` gave or a view of it, and all that belongs beside it, to the new `path`."""

    def stored(self, path: Path) -> TensorSource:
        """What `write` wrote, under the same names."""


class Architecture(Protocol):
    """A module that maps a foreign architecture's tensors to ours, which here are without the prefix `model.`.

    It may also have `HEAD` and `EMBEDDING` (their names, where a tied head may be stored too), `dropped(model) ->
    frozenset[str]` (foreign tensors that hold no weights), `files() -> dict[str, bytes]` (what lies beside weights,
    config and tokenizer) and `reference_logits(folder, tokens_BT)`.
    """

    MODEL_TYPES: tuple[str, ...]

    def read_config(self, hf_config: dict[str, Any]) -> ModelConfig:
        """Raises UserError for what our models cannot be."""

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json. Raises UserError for what the architecture cannot be."""

    def imports(self, model: ModelConfig) -> Recipes: ...

    def exports(self, model: ModelConfig) -> Recipes: ...


def format_module(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"no format {name}: give one of {', '.join(FORMATS)}")
    return cast(Format, importlib.import_module(FORMATS[name]))


def detect(path: Path) -> str:
    """The format of what lies at `path`."""
    if not path.exists():
        raise UserError(f"{path}: nothing is there: name a checkpoint")
    for name in FORMATS:
        if format_module(name).matches(path):
            return name
    raise UserError(f"{path}: not a checkpoint of a known format ({', '.join(FORMATS)}): name another, or its folder")


def open_checkpoint(path: Path, *, format: str | None = None, config: RunConfig | None = None) -> Opened:
    """`config`: the run's, for DeepSpeed checkpoints that do not hold it.

    Raises UserError where it is damaged, of no known format or of no known architecture.
    """
    name = format or detect(path)
    if config is None:
        return format_module(name).open_checkpoint(path)
    if name != "deepspeed":
        raise UserError(f"{path}: a {name} checkpoint says itself which model it is: leave --config out")
    from sisa_dist.convert.zero_folder import open_with

    return open_with(path, config)


def architecture(model_type: Any) -> Architecture:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {model_type!r} has no mapping to our models: those known are {', '.join(ARCHITECTURES)}"
        )
    return cast(Architecture, importlib.import_module(ARCHITECTURES[model_type]))


def architecture_for(model: ModelConfig, *, model_type: str | None) -> tuple[Architecture, dict[str, Any]]:
    """(module, config.json) to write `model` as: the architecture asked for, else the first that can hold it."""
    if model_type is not None:
        module = architecture(model_type)
        config = module.write_config(model)
        if config["model_type"] != model_type:
            raise UserError(f"--model-type {model_type}: this model is one of type {config['model_type']}: give that")
        return module, config
    refusals: dict[str, str] = {}
    for name, path in ARCHITECTURES.items():
        if path in refusals:
            continue
        module = architecture(name)
        try:
            return module, module.write_config(model)
        except UserError as error:
            refusals[path] = str(error)
    raise UserError(f"no known architecture can hold this model: {'; '.join(refusals.values())}")


def reference_logits(module: Architecture, folder: Path, tokens_BT: Tensor) -> Tensor:
    """[B, T, vocab_size] fp32 of the model in `folder`, run whole by transformers in fp32, not by us."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would be drawn through ours
    own = getattr(module, "reference_logits", None)
    if own is not None:
        return own(folder, tokens_BT)
    # No code of the folder is run: these are transformers' own classes.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(tokens_BT).logits.float()
