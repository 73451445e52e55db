"""A Hugging Face folder: `config.json`, safetensors shards with their index, and the architecture's own files.

Which tensor becomes which is the architecture's own table (`formats.ARCHITECTURES`). Pickled weights are not read.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import Tokenizer, find_tokenizer
from data_pipeline.tokenizer_json import JsonTokenizer
from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.formats import architecture, architecture_for
from sisa_dist.convert.hf_folder import json_tokenizer_files, tokenizer_files
from sisa_dist.convert.opened import Opened, Target
from sisa_dist.convert.recipe import Converted, TensorSource
from sisa_dist.convert.safetensors_io import INDEX, SafetensorsFiles, write_shards
from sisa_dist.convert.tensors import from_ours, to_ours

HOLDS_MOMENTS, MASTERS = False, False
_CONFIG = "config.json"


def matches(path: Path) -> bool:
    return (path / _CONFIG).is_file()


def open_checkpoint(path: Path) -> Opened:
    """Raises UserError for an architecture without a mapping, for pickled weights and for damage."""
    config = _read_config(path)
    try:
        module = architecture(config.get("model_type"))
        model = module.read_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    foreign = stored(path)
    dropped: frozenset[str] = getattr(module, "dropped", lambda model: frozenset())(model)
    source = Converted(foreign, to_ours(module.imports(model)), dropped=dropped)
    head, embedding = getattr(module, "HEAD", ""), getattr(module, "EMBEDDING", "")

    def check(moments: bool) -> None:
        if model.tie_embeddings and head in foreign.specs and not torch.equal(*map(foreign.read, (head, embedding))):
            raise UserError(
                f"{path}: tie_word_embeddings is true and {head} is not {embedding}: set tie_word_embeddings to false "
                "in config.json, which transformers too takes it for"
            )

    context = config.get("max_position_embeddings")
    return Opened(
        path,
        "hf",
        model,
        source,
        files=_tokenizer_files(path, model),
        model_type=config["model_type"],
        foreign=foreign,
        check=check,
        context=context if isinstance(context, int) and context > 0 else None,
    )


def _tokenizer_files(path: Path, model: ModelConfig) -> dict[str, bytes]:
    """The folder's tokenizer as a checkpoint keeps it; nothing, and a warning, where it is none we can use."""
    if find_tokenizer(path) is None:
        return {}
    try:
        return Tokenizer.load(path, max_vocab_size=model.vocab_size).files
    except UserError as error:
        warnings.warn(f"{error}; the model is taken without it", stacklevel=2)
        return {}


def type_of(path: Path) -> Any:
    """The model_type its config names."""
    return _read_config(path).get("model_type")


def stored(path: Path) -> TensorSource:
    """The folder's tensors under its own names, of any architecture."""
    if not (path / INDEX).is_file() and not (path / "model.safetensors").is_file():
        pickled = any(path.glob("pytorch_model*.bin"))
        why = (
            "its weights are pickled, which is not read: save it as safetensors"
            if pickled
            else "it has no weights: fetch it again, whole"
        )
        raise UserError(f"{path}: {why}")
    return SafetensorsFiles.of_folder(path)


def made(opened: Opened, target: Target) -> TensorSource:
    module, _ = architecture_for(opened.model, model_type=target.model_type)
    return Converted(opened.source, from_ours(module.exports(opened.model)))


def write(folder: Path, opened: Opened, source: TensorSource, target: Target) -> None:
    module, config = architecture_for(opened.model, model_type=target.model_type)
    matrices = max(source.specs.values(), key=lambda spec: spec.numel()).dtype  # gains may be wider
    config["dtype"] = str(matrices).removeprefix("torch.")
    scaling = opened.model.rope_scaling
    if "max_position_embeddings" in config and not (scaling and scaling.rope_type == "dynamic"):
        config["max_position_embeddings"] = opened.run_config().training.seq_len  # what it was trained at
    folder.mkdir()
    trained_here = opened.state()["step"] > 0
    tokenizer = opened.tokenizer
    if isinstance(tokenizer, JsonTokenizer):
        files = json_tokenizer_files(tokenizer, begins_with_eos=trained_here)
    else:
        files = tokenizer_files(None if tokenizer is None else tokenizer.model, begins_with_eos=trained_here)
    files |= getattr(module, "files", dict)()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_shards(folder, source, most=target.shard_bytes)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{_CONFIG}: cannot be read ({error}): use another copy") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}/{_CONFIG}: it is no mapping: use another copy")
    return config
