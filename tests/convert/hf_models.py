"""Tiny random models and their Hugging Face folders, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.convert import hf_sisa
from sisa_dist.convert.modeling_sisa import SisaConfig, SisaForCausalLM
from sisa_dist.convert.recipe import Converted
from sisa_dist.model import LM, build_model

CASES: dict[str, dict] = {
    "paper": {},
    "grouped": {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False},
    "mixed": {"mixer": ["sisa", "attention", "sisa"], "d_s": [4, 0, 12], "n_layers": 3, "n_kv_heads": 1},
    "clamped": {"log_alpha_min": -0.4, "head_dim": 6, "rope_theta": 500.0, "norm_eps": 1e-4, "vocab_multiple": 1},
    "attention": {"mixer": "attention", "d_s": None, "n_kv_heads": 2},
}


class Held:
    """Tensors in memory as a TensorSource."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.specs = {name: tensor.to("meta") for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def tiny(**changes: object) -> ModelConfig:
    fields: dict = {
        "vocab_size": 89,
        "vocab_multiple": 16,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 40,
        "d_s": 8,
    }
    return ModelConfig(**{**fields, **changes})


def random_model(config: ModelConfig, *, decay: float = 0.05, dtype: torch.dtype = torch.float32) -> LM:
    """Weights of order one, so that every term weighs in; log α is about −decay, unevenly."""
    path = "dense" if dtype == torch.float64 else "auto"  # the oracle, where digits count
    model = build_model(config, attention=AttentionConfig(path=path)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("decay.bias"):
                parameter.copy_(torch.tensor(decay).expm1().log() + 0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                # Angles of a radian a token would make fp32's rounding of them grow with the length, in both models.
                parameter.copy_(noise * (0.1 if "wtheta" in name else 1.0) / parameter.shape[1] ** 0.5)
        model.embed.weight[config.vocab_size :] = 7.0  # padding rows must not matter
        if not config.tie_embeddings:
            model.head.weight[config.vocab_size :] = 7.0
    return model.eval()


def exported(model: LM) -> dict[str, Tensor]:
    source = Held({name: p.detach() for name, p in model.named_parameters()})
    converted = Converted(source, hf_sisa.exports(model.config))
    return {name: converted.read(name) for name in converted.specs}


def as_hf(model: LM) -> SisaForCausalLM:
    """The model in its Hugging Face form, in memory, with a strict loading of the exported tensors."""
    settings = {k: v for k, v in hf_sisa.write_config(model.config).items() if k != "auto_map"}
    twin = SisaForCausalLM(SisaConfig(**settings)).to(model.embed.weight.dtype)
    missing, unexpected = twin.load_state_dict(exported(model), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.config.tie_embeddings else set())
    return twin.eval()


def write_weights(folder: Path, model: LM) -> Path:
    """config.json and one file of weights. What else belongs in a folder is `hf_folder`'s."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_sisa.write_config(model.config)))
    save_file(exported(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_of(*shape: int, seed: int = 0, vocab: int = 89) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
