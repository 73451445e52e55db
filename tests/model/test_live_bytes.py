"""What a long sequence holds: chunks and offload change no gradient, and nothing grows with the square of T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model import LM, build_model, memory
from sisa_dist.training.memory_meter import MemoryMeter

SHAPES: dict[str, dict[str, Any]] = {
    "swiglu": {"mlp_bias": True},
    "gelu": {"mlp": "gelu", "mlp_bias": True, "parallel_residual": True},
    "parallel": {"ffn": "parallel"},
    "ssm_gated": {"ffn": "ssm_gated"},
    "experts_beside": {"mlp": ["moe", "swiglu"], "moe": {"experts": 4, "balance_weight": 0.1}},
}


def model_of(**shape: Any) -> LM:
    base: dict[str, Any] = dict(vocab_size=61, d_model=32, n_layers=2, n_heads=4, d_ff=64, mixer="sisa", d_s=8)
    return build_model(ModelConfig(**base | {"init_std": 0.1} | shape), attention=AttentionConfig(leaf=16))


def gradients(model: LM, tokens: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss, _ = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | found


def set_all(model: LM, **values: Any) -> None:
    for block in model.blocks:
        for name, value in values.items():
            assert hasattr(block, name)
            setattr(block, name, value)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_offload_change_no_gradient(shape: str) -> None:
    model = model_of(**SHAPES[shape]).double()
    with torch.no_grad():
        for parameter in model.parameters():  # U of ssm_gated and biases are 0 at first
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(0))
    plain = gradients(model, tokens)
    logits = model(tokens)
    for settings in (
        {"mlp_chunk": 16},  # 50 tokens: the last chunk is short
        {"mlp_chunk": 16, "activation_checkpointing": True},
        {"mlp_chunk": 1000, "activation_checkpointing": True, "activation_offload": True},
    ):
        set_all(model, mlp_chunk=None, activation_checkpointing=False, activation_offload=False)
        set_all(model, **settings)
        got = gradients(model, tokens)
        for name, want in plain.items():
            torch.testing.assert_close(got[name], want, rtol=1e-10, atol=1e-12, msg=f"{settings}: {name}")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), logits, rtol=1e-10, atol=1e-12)


def test_a_lost_chunk_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().double()
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(0))
    plain = gradients(model, tokens)
    real = memory.checkpoint
    monkeypatch.setattr(memory, "checkpoint", lambda mlp, x, **named: real(mlp, x.detach(), **named))
    set_all(model, mlp_chunk=16)
    got = gradients(model, tokens)
    torch.testing.assert_close(got["loss"], plain["loss"])
    wrong = [name for name in plain if not torch.allclose(got[name], plain[name], rtol=1e-6)]
    assert "blocks.0.norm2.weight" in wrong and "embed.weight" in wrong


def peak(T: int, *, mixer: str = "sisa", d_ff: int = 128, **settings: Any) -> int:
    """Most bytes that stood at once in a forward and backward of T tokens, weights and gradients among them."""
    torch.manual_seed(0)
    model = model_of(
        d_model=16, n_layers=1, n_heads=1, d_ff=d_ff, mixer=mixer, d_s=8 if mixer == "sisa" else None, vocab_size=128
    )
    set_all(model, **settings)
    tokens = torch.randint(61, (1, T))
    with MemoryMeter() as meter:
        meter.mark(model.parameters(), "states")
        loss, _ = model(tokens, tokens)
        loss.backward()
    return max(sum(found.values()) for found in meter.peaks.values())


def test_a_chunked_mlp_holds_less() -> None:
    plain, chunked = peak(2048, d_ff=1024), peak(2048, d_ff=1024, mlp_chunk=256)
    # gate, up, silu and the product in fp32: of them one chunk is left.
    assert plain - chunked > 0.7 * 4 * 1024 * 2048 * 4


def check_linear(mixer: str, start: int, factor: int) -> None:
    before, after = peak(start, mixer=mixer), peak(start * factor, mixer=mixer)
    print(mixer, start, before, start * factor, after)
    assert after <= 1.05 * factor * before
    assert after < (start * factor) ** 2  # a mask of one byte for every pair would be as much


@pytest.mark.parametrize("mixer", ["sisa", "attention"])
def test_nothing_grows_with_the_square(mixer: str) -> None:
    check_linear(mixer, 2048, 4)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["sisa", "attention"])
def test_nothing_grows_with_the_square_up_to_64k_tokens(mixer: str) -> None:
    check_linear(mixer, 8192, 8)
