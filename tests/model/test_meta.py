"""Meta tokens stand before every document; Hymba's against a layer written out from its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixer_cases import config_of as case_of
from sisa_dist.config import ModelConfig, UserError
from sisa_dist.model import build_model
from sisa_dist.model.meta import at_tokens, spread_labels, with_meta_tokens
from sisa_dist.model.rope import rope_tables
from sisa_dist.parallel.plan import check_tp


def config_of(**changes: Any) -> ModelConfig:
    return case_of("hymba", **changes)


def test_they_stand_before_every_document() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    doc_ids = torch.tensor([[2, 2, 4, 9], [0, 0, 0, 0]])
    found = with_meta_tokens(tokens, doc_ids, count=2, first_id=50)
    assert found.tokens.tolist() == [
        [50, 51, 5, 6, 50, 51, 7, 50, 51, 8],
        [50, 51, 50, 51, 50, 51, 5, 6, 7, 8],
    ]
    assert found.doc_ids is not None
    assert found.doc_ids.tolist() == [[2, 2, 2, 2, 4, 4, 4, 9, 9, 9], [-1, -1, -1, -1, 0, 0, 0, 0, 0, 0]]
    assert torch.equal(at_tokens(found.tokens, found), tokens)
    assert spread_labels(tokens, found, ignore=-1)[1].tolist() == [-1, -1, -1, -1, -1, -1, 5, 6, 7, 8]
    plain = with_meta_tokens(tokens, None, count=2, first_id=50)
    assert plain.doc_ids is None and plain.tokens.tolist() == [[50, 51, 5, 6, 7, 8]] * 2


def test_one_document_is_the_row_without_ids() -> None:
    model, tokens = build_model(config_of()).double(), torch.randint(0, 61, (2, 19))
    ids = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens, doc_ids_BT=ids), model(tokens), rtol=0, atol=1e-12)
    labels = tokens.roll(-1, 1)
    score, _ = model(tokens, labels, per_token=True)
    wanted = model(tokens).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(score.double(), wanted.double(), rtol=0, atol=1e-6)
    loss, count = model(tokens, labels)
    torch.testing.assert_close(loss.double(), -wanted.sum().double(), rtol=1e-6, atol=0)
    assert count == labels.numel()
    torch.testing.assert_close(model(tokens, last_only=True)[:, -1], model(tokens)[:, -1], rtol=0, atol=1e-12)


def test_they_learn_and_are_never_predicted() -> None:
    config = config_of(tie_embeddings=False)
    model, tokens = build_model(config), torch.randint(0, 61, (2, 19))
    logits = model(tokens)
    assert logits.shape[-1] == 61
    logits.square().sum().backward()
    gradient = model.embed.weight.grad
    assert gradient is not None and gradient[61:65].abs().amax(1).gt(0).all() and not gradient[65:].any()
    assert model.head.weight.grad is not None and not model.head.weight.grad[61:].any()


def test_they_are_rows_of_the_padding_where_it_has_room() -> None:
    assert config_of(vocab_size=60).padded_vocab_size == 64  # 60 and 4
    assert config_of(vocab_size=61).padded_vocab_size == 80
    assert config_of(mixer="mamba", hymba=None).padded_vocab_size == 64


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_is_its_equation(layer: int) -> None:
    """Window in layer 0, global in layer 1."""
    config = config_of()
    model, generator = build_model(config, seed=3).double(), torch.Generator().manual_seed(1)
    mixer: Any = model.blocks[layer].mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    u = torch.randn(1, 30, 32, generator=generator, dtype=torch.float64).requires_grad_()
    rope = rope_tables(0, 30, channels=2, theta=1e4, device=torch.device("cpu"))
    p = dict(mixer.named_parameters())

    def heads(kind: str, width: int) -> Tensor:
        return (u[0] @ p[f"w{kind}.weight"].T).view(30, -1, width).transpose(0, 1)

    cos, sin = (x.double() for x in rope)

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., :1], x[..., 1:2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2:]), -1)

    q, k, v = turned(heads("q", 8)), turned(heads("k", 8)), heads("v", 16)
    k, v = (x.repeat_interleave(2, 0) for x in (k, v))
    i, j = torch.arange(30)[:, None], torch.arange(30)
    visible = (j <= i) & ((i - j < 7) | (j < 4) | torch.tensor(layer == 1))
    attended = (((q @ k.mT) / 8**0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
    carried = mixer.mamba(u, rope)[0]

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[name]

    both = normed(attended, "attention_norm.weight") + normed(carried, "ssm_norm.weight")
    want, got = (both / 2) @ p["wout.weight"].T, mixer(u, rope)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    direction = torch.randn_like(want)
    found = [torch.autograd.grad((y * direction).sum(), [u, *p.values()]) for y in (got, want)]
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hymba": {"global_layers": [2]}}, "hymba.global_layers has layer 2, n_layers is 2"),
        ({"ssm": {"width": 42}}, "hymba: 42 channels of ssm are no multiple of n_heads 4"),
        ({"mixer": "mamba"}, "hymba is set but"),
        ({"ssm": {"conv": 0}}, "ssm.conv is 0 and hymba has a convolution"),
    ],
)
def test_what_is_no_hymba_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_of(**changes)


def test_tp_must_deal_them_out() -> None:
    with pytest.raises(UserError, match=r"parallel.tp 4 does not divide hymba.meta_tokens 2.* a multiple of 4"):
        check_tp(config_of(hymba={"meta_tokens": 2}), 4)
    assert config_of(n_layers=7, hymba=None).window_of(0) is None
    assert [config_of(n_layers=7, hymba=None).window_of(layer) for layer in range(7)].count(None) == 3


def test_no_document_begins_behind_a_caches_first_chunk() -> None:
    model, tokens = build_model(config_of()), torch.randint(0, 61, (2, 6))
    cache, ids = model.new_cache(), torch.tensor([[0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5]])
    model(tokens, doc_ids_BT=ids, cache=cache)
    model(tokens[:, :1], doc_ids_BT=ids[:, -1:], cache=cache)
    with pytest.raises(UserError, match="a document begins behind the cache's first chunk"):
        model(tokens[:, :2], doc_ids_BT=torch.tensor([[1, 2], [5, 5]]), cache=cache)
