"""Is it the same model, tokenizer, data? Where not, the first difference, by name, before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import TOKENIZER_FILES, Tokenizer
from sisa_dist.checkpoint.manifest import read_manifest
from sisa_dist.config import ModelConfig, UserError, load_config

_log = logging.getLogger(__name__)

# Keys of ModelConfig that leave names and shapes of parameters alone: a new stage may change them, and it is said.
FUNCTION_KEYS = ("init_std", "log_alpha_min", "norm_eps", "rope_theta")


def check_model(checkpoint: Path, model: ModelConfig) -> None:
    """Raises UserError where `model` has other parameters than the checkpoint's. Another function of them is said."""
    stored = load_config(checkpoint / "config.yaml").model.model_dump()
    for key, wanted in model.model_dump().items():
        if key in FUNCTION_KEYS and key != "init_std" and stored[key] != wanted:
            _log.warning(
                "%s: model.%s is %r there and %r here: the model computes something else from here on",
                checkpoint,
                key,
                stored[key],
                wanted,
            )
        if key not in FUNCTION_KEYS and stored[key] != wanted:
            raise UserError(
                f"{checkpoint}: another model: its model.{key} is {stored[key]!r}, the config says {wanted!r}: set "
                f"model.{key} to what it is there, or name another checkpoint"
            )


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where token ids mean something else here than in the checkpoint.

    An imported model may have come without one that can be read: then nothing can be compared, which is said.
    """
    if read_manifest(checkpoint).keys().isdisjoint(TOKENIZER_FILES):
        _log.warning("%s: holds no tokenizer: that its token ids mean the same as here is yours to know", checkpoint)
        return
    stored = Tokenizer.load(checkpoint)
    if stored.sha256 == tokenizer.sha256:
        return
    raise UserError(
        f"{checkpoint}: another tokenizer than {tokenizer.path}: {_first_piece(stored, tokenizer)}: prepare the "
        f"data with data.tokenizer.path={stored.path}, or name another checkpoint"
    )


def check_data(checkpoint: Path, described: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint's place in the data counts in another order than `Loader.describe()`."""
    path = checkpoint / "data.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["fingerprint"] == described["fingerprint"]:
            return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): use another checkpoint") from None
    raise UserError(
        f"{checkpoint}: not the data it was trained on: {_first_value(stored, described)}: give the old data, or start "
        f"anew from its weights (another output_dir, start.weights={checkpoint})"
    )


def _first_piece(stored: Tokenizer, here: Tokenizer) -> str:
    if stored.vocab_size != here.vocab_size:
        return f"{stored.vocab_size} ids there, {here.vocab_size} here"
    for i in range(stored.vocab_size):
        if stored.piece(i) != here.piece(i):
            return f"id {i} is {stored.piece(i)!r} there, {here.piece(i)!r} here"
    return "the same pieces, but other scores or settings"


def _first_value(stored: Any, here: Any, name: str = "") -> str:
    if isinstance(stored, dict) and isinstance(here, Mapping):
        for key in sorted(stored.keys() | here.keys(), key=lambda key: (key == "shards", key)):  # the many last
            if key != "fingerprint" and stored.get(key) != here.get(key):
                return _first_value(stored.get(key), here.get(key), f"{name}.{key}" if name else key)
    return f"{name} is {stored!r} there, {here!r} here" if name else "its contents or their order differ"
