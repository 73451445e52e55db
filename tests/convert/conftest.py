"""A small checkpoint with moments, and a foreign architecture of the tests' own whose names and layout differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.tokenizer import train_tokenizer
from sisa_dist.checkpoint import write_checkpoint
from sisa_dist.config import ModelConfig, parse_config
from sisa_dist.convert import formats
from sisa_dist.convert.recipe import Recipe
from sisa_dist.model import LM, build_model
from sisa_dist.training.memory_meter import MemoryMeter

MODEL: dict[str, Any] = {
    "vocab_size": 300,  # 84 rows of padding
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "mixer": ["sisa", "attention", "sisa"],
    "d_s": [8, 0, 4],
    "qk_norm": True,
}
STATE = {"step": 7, "cursor": 21, "tokens": 1000, "seconds": 2.5, "fingerprint": "abc", "guard": [1.0, 2.0]}


@dataclass(frozen=True)
class Made:
    folder: Path
    model: LM
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = "the quick brown fox jumps over the lazy dog, and the dog sleeps on and on\n" * 20
    return train_tokenizer([text], path, vocab_size=300).model


@pytest.fixture
def make_checkpoint(tmp_path: Path, tokenizer: bytes) -> Callable[..., Made]:
    """make_checkpoint(name="a", moments=True, **model settings): a checkpoint folder with values all over the place."""

    def make(name: str = "step_00000007", *, moments: bool = True, **settings: Any) -> Made:
        tree = {
            "name": "told apart",
            "model": MODEL | settings,
            "training": {"steps": 1000, "seq_len": 64, "global_batch_tokens": 64},
        }
        config = parse_config(tree, source="test")
        model = build_model(config.model, seed=3)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # gains too, so that a lost one shows
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        tensors = {f"model.{key}": value.detach() for key, value in model.named_parameters()}
        for kind in ("exp_avg", "exp_avg_sq") if moments else ():
            for key, value in model.named_parameters():
                tensors[f"{kind}.{key}"] = torch.randn(value.shape, generator=noise)
        files = {
            "config.yaml": json.dumps(config.model_dump()).encode(),
            "state.json": json.dumps(STATE | {"weights_only": not moments}).encode(),
            "tokenizer.model": tokenizer,
            "data.json": b'{"fingerprint": "abc"}',
        }
        folder = tmp_path / name
        write_checkpoint(folder, tensors, files=files, no_dist=True)
        return Made(folder, model.eval(), tensors)

    return make


class RealMemory(MemoryMeter):
    """Live bytes of what is really there: meta tensors have a size and no memory."""

    def _see(self, storage: torch.UntypedStorage, purpose: Any) -> None:
        if storage.device.type != "meta":
            super()._see(storage, purpose)


@pytest.fixture
def real_memory() -> type[RealMemory]:
    return RealMemory


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The architecture "toy": other names, q and k in one tensor, matrices transposed, no padding rows."""
    module = ModuleType("toy_architecture")
    module.MODEL_TYPES = ("toy",)  # type: ignore[attr-defined]

    def read_config(config: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**config["ours"])

    def write_config(model: ModelConfig) -> dict[str, Any]:
        return {"model_type": "toy", "ours": model.model_dump()}

    def names(model: ModelConfig) -> list[str]:
        with torch.device("meta"):
            return [name for name, _ in build_model(model).named_parameters()]

    def exports(model: ModelConfig) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {}
        for name in names(model):
            if name.endswith("wq.weight"):
                made = Recipe((name, name.replace("wq", "wk")), lambda q, k: torch.cat((q, k)))
                found["x." + name.replace("wq", "wqk")] = made
            elif name == "embed.weight":
                found["x." + name] = Recipe((name,), lambda w: w[: model.vocab_size])
            elif name.endswith("mlp.up.weight"):
                found["x." + name] = Recipe((name,), lambda w: w.t())
            elif not name.endswith("wk.weight"):
                found["x." + name] = Recipe((name,))
        return found

    def imports(model: ModelConfig) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {}
        rows, padding = model.n_heads * model.width_per_head, model.padded_vocab_size - model.vocab_size
        for name in names(model):
            if name.endswith("wq.weight"):
                found[name] = Recipe(("x." + name.replace("wq", "wqk"),), lambda w: w[:rows])
            elif name.endswith("wk.weight"):
                found[name] = Recipe(("x." + name.replace("wk", "wqk"),), lambda w: w[rows:])
            elif name == "embed.weight":
                found[name] = Recipe(("x." + name,), lambda w: F.pad(w, (0, 0, 0, padding)))
            elif name.endswith("mlp.up.weight"):
                found[name] = Recipe(("x." + name,), lambda w: w.t())
            else:
                found[name] = Recipe(("x." + name,))
        return found

    for function in (read_config, write_config, exports, imports):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "toy_architecture", module)
    monkeypatch.setattr(formats, "ARCHITECTURES", {"toy": "toy_architecture"})
    return module
