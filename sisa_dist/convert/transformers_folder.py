"""A Hugging Face folder: `config.json`, safetensors shards with their index, and the architecture's own files.

Which tensor becomes which is the architecture's own table (`formats.ARCHITECTURES`). Pickled weights are not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sisa_dist.config import UserError
from sisa_dist.convert.formats import architecture, architecture_for
from sisa_dist.convert.hf_folder import tokenizer_files
from sisa_dist.convert.opened import TOKENIZER, Opened, Target
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
    tokenizer = path / TOKENIZER
    files = {TOKENIZER: tokenizer.read_bytes()} if tokenizer.is_file() else {}
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
        files=files,
        model_type=config["model_type"],
        foreign=foreign,
        check=check,
        context=context if isinstance(context, int) and context > 0 else None,
    )


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
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = opened.run_config().training.seq_len  # what it was trained at
    folder.mkdir()
    trained_here = opened.state()["step"] > 0
    files = tokenizer_files(opened.tokenizer, begins_with_eos=trained_here) | getattr(module, "files", dict)()
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
