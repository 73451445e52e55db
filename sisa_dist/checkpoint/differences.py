"""Is it the same model, tokenizer, data? Where not, the first difference, by name, before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.loader import Loader
from data_pipeline.tokenizer import TOKENIZER_FILES, Tokenizer
from sisa_dist.checkpoint.manifest import read_manifest
from sisa_dist.checkpoint.state import TrainState
from sisa_dist.config import ModelConfig, UserError, load_config
from sisa_dist.config.parameters import first_leaf, other_function, other_parameters

_log = logging.getLogger(__name__)


def check_model(checkpoint: Path, model: ModelConfig) -> list[str]:
    """Raises UserError where `model` has other parameters than the checkpoint's. Another function of them is said.

    Returns the keys by which the function is another.
    """
    stored = load_config(checkpoint / "config.yaml").model
    changed = other_function(stored, model)
    for key in changed:
        _log.warning(
            "%s: model.%s is %r there and %r here: the model computes something else from here on",
            checkpoint,
            key,
            getattr(stored, key),
            getattr(model, key),
        )
    other = other_parameters(stored, model)
    if other is not None:
        leaf, there, here = first_leaf(stored, model, other)
        raise UserError(
            f"{checkpoint}: another model: its {leaf} is {there!r}, the config says {here!r}: set {leaf} to what it is "
            "there, or name another checkpoint"
        )
    return changed


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


def read_data(checkpoint: Path) -> dict[str, Any]:
    """What its cursor counts in: `Loader.describe()` of the run that wrote it."""
    path = checkpoint / "data.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["fingerprint"].encode()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): use another checkpoint") from None
    return stored


def check_data(checkpoint: Path, described: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint's place in the data counts in another order than `Loader.describe()`."""
    stored = read_data(checkpoint)
    if stored["fingerprint"] != described["fingerprint"]:
        raise UserError(
            f"{checkpoint}: not the data it was trained on: {_first_value(stored, described)}: give the old data, "
            "go on in the new order with what is unread (start.data=continue), or start anew from its weights "
            f"(another output_dir, start.weights={checkpoint})"
        )


def carry_data(checkpoint: Path, state: TrainState, loader: Loader) -> TrainState:
    """`state` at the begin of a stage of `loader`'s order, over what the checkpoint's left unread.

    The state as it is where the orders are the same. Raises UserError where they are not of the same data.
    """
    stored, described = read_data(checkpoint), loader.describe()
    if stored["fingerprint"] == described["fingerprint"]:
        return state
    try:
        stage = loader.stage.carry(stored, state.stage, state.cursor)
    except UserError as error:
        raise UserError(
            f"{checkpoint}: its data cannot be continued: {error}, or start anew from its weights (another output_dir, "
            f"start.weights={checkpoint})"
        ) from None
    changes = _changes(stored["order"], described["order"]) + _sources(stored["order"], described["order"], stage)
    _log.info("step %d: stage %d of the data begins: %s", state.step, stage["number"] + 1, "; ".join(changes))
    return replace(state, cursor=0, stage=stage, fingerprint=described["fingerprint"])


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Of two orders, what differs but for the sources."""
    keys = sorted((old.keys() | new.keys()) - {"source", "mixture", "mixture_version", "packing_version"})
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _sources(old: Mapping[str, Any], new: Mapping[str, Any], stage: Mapping[str, Any]) -> list[str]:
    """Which sources are called otherwise, come in, or are read no more; `stage` has the old ones by their new names."""
    before, shares = (order.get("mixture") or {order["source"]: None} for order in (old, new))
    carried = dict(zip(before, stage["sources"], strict=True))
    told = [f"source {name} is now called {called}" for name, called in carried.items() if name != called]
    told += [f"source {name} comes in" for name in shares if name not in stage["sources"]]
    told += [f"source {name} is read no more" for name, share in shares.items() if share == 0]
    kept = {name: before[old_name] for old_name, name in carried.items()}
    if kept != {name: shares[name] for name in kept}:
        told.append(f"shares were {kept}, are {dict(shares)}")
    return told


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
