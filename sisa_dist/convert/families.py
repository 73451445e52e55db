"""What reading and writing other families' Transformers shares: a checked view of config.json, names, vocabulary.

`llama.py` and `neox.py` say what is particular to each. Nothing here opens a file or imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.config.mixers import MultipliersConfig
from sisa_dist.convert.recipe import Recipe
from sisa_dist.model import build_model

_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", lambda value: type(value) is int and abs(value) < 1 << 40),
    float: ("a number", lambda value: type(value) in (int, float) and abs(value) < 1e300),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    dict: ("a mapping", lambda value: isinstance(value, dict)),
    list: ("a list", lambda value: isinstance(value, list)),
}


class Fields:
    """A config.json, key by key. What our model cannot be is refused by the key's name, never passed over.

    So is a value of another kind than the one asked for: Python would take the text "false" for true.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.family = str(config.get("model_type"))

    def need(self, key: str, kind: type = int) -> Any:
        value = self._config.get(key)
        if value is None:
            raise UserError(f"config.json: {key} is missing: is this a whole {self.family} config?")
        return self.checked(key, value, kind)

    def get(self, key: str, default: Any, kind: type | None = None) -> Any:
        """`default` is transformers' own for an absent or null key; the value is of its kind, or of `kind`."""
        value = self._config.get(key)
        return default if value is None else self.checked(key, value, kind or type(default))

    def checked(self, key: str, value: Any, kind: type) -> Any:
        """`value`, if it is of its kind."""
        what, fits = _KINDS[kind]
        if not fits(value):
            raise UserError(f"config.json: {key} is {value!r} and must be {what}: mend it, or fetch the file again")
        return value

    def only(self, key: str, *known: Any) -> None:
        """Raises UserError where the key says something else; absent or null is well."""
        value = self._config.get(key)
        if value is not None and not known:
            raise UserError(
                f"config.json: {key} is set, and our model has none: this {self.family} checkpoint cannot be "
                "converted, name the original"
            )
        if value is not None and value not in known:
            raise UserError(
                f"config.json: {key} {value!r} has no counterpart in our model, only {' or '.join(map(repr, known))} "
                f"has: this {self.family} checkpoint cannot be converted"
            )

    def __contains__(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._config

    def model(self, **values: Any) -> ModelConfig:
        """Raises UserError where the values make no model of ours."""
        return model_of(values, source=f"config.json of a {self.family} model")


def model_of(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """A ModelConfig, or a UserError of one line that starts with `source`."""
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{part}: " for part in problem["loc"][:1])
        said = problem["msg"].removeprefix("Value error, ")  # ours, with what to set
        remedy = "" if said != problem["msg"] else f", not {problem['input']!r}: mend it, or fetch the file again"
        raise UserError(f"{source}: {where}{said}{remedy}") from None


def refuse(family: str, model: ModelConfig, **wanted: Any) -> None:
    """Raises UserError naming the first key of `model` that is not as a model of `family` must be."""
    if set(model.layer_ffns) != {"sequential"}:
        raise UserError(f"model.ffn is {model.ffn!r} and a {family} model has 'sequential': no such export")
    if model.ssmax is not None:
        raise UserError(f"model.ssmax has no place in a {family} model: export to consolidated safetensors")
    if "multipliers" not in wanted and model.multiplier_options != MultipliersConfig():
        raise UserError(f"model.multipliers have no place in a {family} model: no such export")
    for key, value in wanted.items():
        if getattr(model, key) != value:
            raise UserError(
                f"model.{key} is {getattr(model, key)!r} and a {family} model has {value!r}: no such export"
            )


def refuse_mixers(family: str, model: ModelConfig) -> None:
    """Raises UserError where a layer is not plain attention."""
    if "sisa" in model.layer_mixers:
        raise UserError(f"model.mixer has sisa layers and a {family} model has none: export it as a sisa model")
    for mixer in sorted(set(model.layer_mixers) - {"attention"}):
        raise UserError(
            f"model.mixer has {mixer} layers and a {family} model has none: export to consolidated safetensors"
        )


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by our name, and of the buffers that a checkpoint holds with them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_model(model).state_dict().items()}


def buffer_names(model: ModelConfig) -> frozenset[str]:
    """Of them, those that no optimizer moves: they have no moments."""
    with torch.device("meta"):
        return frozenset(name for name, _ in build_model(model).named_buffers())


def translated(name: str, *, whole: Mapping[str, str], blocks: str, block: Mapping[str, str]) -> str:
    """Their name of our parameter: `whole` outside the blocks, `block` inside, behind `blocks`.N."""
    if name in whole:
        return whole[name]
    _, layer, inside = name.split(".", 2)
    return f"{blocks}.{layer}.{block[inside]}"


VOCABULARY = ("embed.weight", "head.weight")


def renamed(ours: str, theirs: str, model: ModelConfig, *, export: bool) -> Recipe:
    """One tensor under another name; of the embedding and the head padding rows are cut, or filled with zeros."""
    vocabulary: Callable[[Tensor], Tensor] = _cut(model) if export else _pad(model)
    sources = (ours if export else theirs,)
    return Recipe(sources, vocabulary) if ours in VOCABULARY else Recipe(sources)


def check_rows(weight_VD: Tensor, model: ModelConfig) -> None:
    """Raises UserError where the vocabulary has not the rows its config says: padding would hide what is missing."""
    if weight_VD.shape[0] != model.vocab_size:
        raise UserError(
            f"config.json: vocab_size is {model.vocab_size} and the embedding or head has {weight_VD.shape[0]} rows: "
            "fetch the checkpoint again, or set vocab_size to what is there"
        )


def _cut(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    return lambda weight_VD: weight_VD[: model.vocab_size]


def _pad(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    def pad(weight_VD: Tensor) -> Tensor:
        check_rows(weight_VD, model)
        padding = model.padded_vocab_size - model.vocab_size
        return torch.cat((weight_VD, weight_VD.new_zeros(padding, weight_VD.shape[1])))

    return pad
