"""The model: initial values, loss, gradients, causality, document isolation and decoding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sisa_dist.config import ModelConfig
from sisa_dist.model import LM, build_model, generate
from sisa_dist.model import loss as loss_module
from sisa_dist.model.init import Normal, _key
from sisa_dist.model.loss import Vocabulary, cross_entropy_sum, score_targets
from sisa_dist.model.rope import rope_tables


def tiny(**changes: object) -> ModelConfig:
    values = dict(vocab_size=61, vocab_multiple=16, d_model=32, n_layers=2, n_heads=4, d_ff=48, mixer="sisa", d_s=8)
    values |= {"d_s": None} if changes.get("mixer") == "attention" else {}
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


VARIANTS = {
    "sisa": {},
    "attention": {"mixer": "attention"},
    "gqa": {"n_kv_heads": 2},
    "attention_gqa": {"mixer": "attention", "n_kv_heads": 1},
    "mixed": {"mixer": ["sisa", "attention"], "d_s": [16, 0]},
    "heterogeneous": {"d_s": [4, 16]},
    "untied_bounded": {"tie_embeddings": False, "log_alpha_min": -0.5},
    "qk_norm": {"mixer": ["sisa", "attention"], "d_s": [8, 0], "qk_norm": True},
    "neox": {
        "mixer": ["sisa", "attention"],
        "d_s": [8, 0],
        "norm": "layernorm",
        "mlp": "gelu",
        "attention_bias": "all",
        "mlp_bias": True,
        "rotary_fraction": 0.25,
        "parallel_residual": True,
    },
}


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def strong_decay(model: LM) -> LM:
    """b_α up to +0.7: log α around −1.1 nats a token, where the one-reference form overflows within 80 tokens."""
    for block in model.blocks:
        if hasattr(block.mixer, "decay"):
            torch.nn.init.uniform_(block.mixer.decay.bias, -4.0, 0.7)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_every_gradient_equal_plain_cross_entropy(name: str) -> None:
    model = build_model(tiny(**VARIANTS[name])).double()
    tokens, labels = tokens_of(2, 37), tokens_of(2, 37, seed=1)
    labels[0, :5] = -100
    logits = model(tokens)
    assert logits.shape == (2, 37, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss, count = model(tokens, labels)
    assert count == 2 * 37 - 5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    # The loss is reduced in fp32 whatever the model: 1e-5 of each gradient's largest entry.
    for (parameter_name, _), got, want in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), expected_grads, strict=True
    ):
        assert want.abs().max() > 0, parameter_name
        error = (got - want).abs().max() / want.abs().max()
        assert error < 1e-5, (parameter_name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_the_whole_one_whatever_the_chunk(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(3)
    h, w = torch.randn(45, 24, generator=g).to(dtype), torch.randn(64, 24, generator=g).to(dtype)
    labels = torch.randint(0, 61, (45,), generator=g)
    labels[::7] = -100
    results = []
    for rows, times, chunks in ((7, 0, 7), (7, 1, 3), (100, 0, 1)):
        monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 64 * rows)
        monkeypatch.setattr(loss_module, "_TIMES_HIDDEN", times)
        assert len(loss_module._chunks(h, w, training=True)) == chunks
        assert len(loss_module._chunks(h, w)) == (7 if rows == 7 else 1)  # where no head's gradient is formed
        hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = cross_entropy_sum(hh, ww, labels, Vocabulary(61))
        (loss * 0.25).backward()
        results.append((loss.detach(), hh.grad, ww.grad))
    hh, ww = h.float().requires_grad_(), w.float().requires_grad_()
    expected = F.cross_entropy((hh @ ww[:61].t()), labels, reduction="sum", ignore_index=-100)
    (expected * 0.25).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: logits are rounded to 8 bits once
    for result in results:
        for got, want in zip(result, (expected.detach(), hh.grad, ww.grad), strict=True):
            assert got is not None and want is not None
            assert (got.float() - want).abs().max() <= tolerance * want.abs().max()
    assert (results[0][2][61:] == 0).all()  # type: ignore[index]  # padding rows learn nothing


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = loss_module._logits

    def spy(*args: object) -> torch.Tensor:
        logits = real(*args)  # type: ignore[arg-type]
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(loss_module, "_logits", spy)
    model = build_model(tiny(vocab_size=5000, vocab_multiple=128))
    tokens = torch.randint(0, 5000, (2, 1024))
    loss, _ = model(tokens, tokens)
    loss.backward()
    assert len(sizes) > 1 and max(sizes) <= loss_module._CHUNK_ELEMENTS


def test_scores_are_log_softmax_and_argmax() -> None:
    h, w, labels = torch.randn(9, 8), torch.randn(16, 8), torch.tensor([0, 1, 2, 3, 4, 5, 6, -100, 7])
    logits = (h @ w.t())[:, :11]
    labels[0] = logits[0].argmax()
    log_prob, is_argmax = score_targets(h, w, labels, Vocabulary(11))
    expected = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected[7] = 0
    torch.testing.assert_close(log_prob, expected)
    assert is_argmax.tolist() == [
        bool(label == -100 or label == row.argmax()) for label, row in zip(labels, logits, strict=True)
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_later_tokens_never_change_earlier_logits(name: str) -> None:
    model = strong_decay(build_model(tiny(**VARIANTS[name])))
    tokens = tokens_of(1, 150)
    changed = tokens.clone()
    changed[:, 101:] = (changed[:, 101:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :101], after[:, :101], rtol=0, atol=1e-6)
    assert (before[:, 101:] - after[:, 101:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sisa", "attention", "gqa", "mixed"])
def test_documents_packed_side_by_side_are_apart(name: str) -> None:
    model = strong_decay(build_model(tiny(**VARIANTS[name]))).double()
    tokens, labels = tokens_of(1, 90), tokens_of(1, 90, seed=1)
    doc_ids = torch.tensor([[0] * 31 + [1] * 1 + [2] * 58])
    packed, _ = model(tokens, labels, doc_ids_BT=doc_ids)
    packed_grads = torch.autograd.grad(packed, list(model.parameters()))
    spans = [slice(0, 31), slice(31, 32), slice(32, 90)]
    apart = sum(model(tokens[:, s], labels[:, s])[0] for s in spans)
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=0)
    for got, want in zip(packed_grads, torch.autograd.grad(apart, list(model.parameters())), strict=True):
        assert (got - want).abs().max() <= 1e-6 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_and_chunked_decoding_equal_the_full_run(name: str) -> None:
    model = strong_decay(build_model(tiny(**VARIANTS[name])))
    tokens = tokens_of(2, 70)
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache()
        sizes = [9, 1, 1, 12, *[1] * 47]
        assert sum(sizes) == 70
        parts, start = [], 0
        for size in sizes:
            parts.append(model(tokens[:, start : start + size], cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "temperature", "top_p"),
    [
        pytest.param(1200, 0.0, 1.0, marks=pytest.mark.slow),
        pytest.param(4096, 0.0, 1.0, marks=pytest.mark.slow),
        (300, 1.0, 1.0),
        (300, 1.0, 0.5),
        pytest.param(4096, 1.0, 0.9, marks=pytest.mark.slow),
    ],
)
def test_a_long_generation_equals_the_full_run(
    length: int, temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every logit that decoding saw, token by token, is the full run's over the same tokens, and the tokens are its."""
    model = strong_decay(build_model(tiny(init_std=0.1)))
    seen = []
    real = LM.forward

    def spy(self: LM, *args: object, **kwargs: object) -> torch.Tensor:
        logits = real(self, *args, **kwargs)  # type: ignore[arg-type]
        seen.append(logits)
        return logits  # type: ignore[return-value]

    prompt = tokens_of(1, 7)
    with monkeypatch.context() as patch:
        patch.setattr(LM, "forward", spy)
        options = dict(max_new_tokens=length - 7, temperature=temperature, top_p=top_p)
        made = torch.stack(list(generate(model, prompt, **options)), 1)  # type: ignore[arg-type]
    assert len(set(made[0].tolist())) > (1 if temperature else 0)
    with torch.no_grad():
        full = model(torch.cat((prompt, made), 1))[:, 6:-1]
    torch.testing.assert_close(torch.cat(seen, 1), full, rtol=0, atol=1e-5)
    probability = full.softmax(-1)
    chosen = probability.gather(2, made[..., None])
    # Mass of the likelier tokens; two as likely as rounding lets one tell may stand either way round.
    ahead = (probability * (probability > chosen * (1 + 1e-3))).sum(-1)
    assert ahead.max() < (top_p + 1e-4 if temperature else 1e-9)
    if temperature:  # and the nucleus was reached into
        assert ahead.max() > 0.9 * top_p


def test_sampling_repeats_by_seed_and_top_p_keeps_the_nucleus() -> None:
    model = build_model(tiny(init_std=0.5))
    prompt = tokens_of(2, 5)

    def run(**options: float) -> list[list[int]]:
        return torch.stack(list(generate(model, prompt, max_new_tokens=30, **options)), 1).tolist()  # type: ignore

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1)
    assert run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, top_p=1e-9, seed=3) == run()  # the nucleus of nothing is the argmax
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model, prompt[:, :0], max_new_tokens=1))


def test_initial_values_are_the_papers() -> None:
    model = build_model(ModelConfig(vocab_size=2048, d_model=256, n_layers=1, n_heads=4, d_ff=256, d_s=64))
    mixer = model.blocks[0].mixer
    assert (mixer.decay.bias == -5).all() and (mixer.importance.lambda_raw == -1).all()
    assert math.isclose(mixer.importance()[0].item(), 0.313, abs_tol=1e-3)
    assert (model.norm.weight == 1).all()
    for weight, std in ((mixer.wq.weight, 0.02), (mixer.wtheta.weight, 0.01), (mixer.decay.weight, 0.02)):
        assert abs(weight.std().item() / std - 1) < 0.1
    assert abs(model.embed.weight.std().item() / 0.02 - 1) < 0.01
    half_life = math.log(2) / math.log1p(math.exp(-5.0))
    assert abs(half_life - 103) < 1


def test_biases_start_at_zero_and_gains_at_one() -> None:
    model = build_model(tiny(**VARIANTS["neox"]))
    found = {name: p for name, p in model.named_parameters() if p.ndim == 1 and "decay" not in name}
    assert sum(name.endswith("bias") for name in found) == 2 * 8 + 1
    for name, parameter in found.items():
        value = 0 if name.endswith("bias") else -1 if "lambda" in name else 1
        assert (parameter == value).all(), name


def test_a_block_is_its_equations() -> None:
    """Written out with PyTorch's own functions: two residual forms, two norms, two MLPs, channels that do not turn."""
    options = dict(mixer="attention", norm="layernorm", attention_bias="qkv", rotary_fraction=0.5)
    h = torch.randn(2, 9, 32)
    for parallel, mlp in ((True, "gelu"), (False, "swiglu")):
        model = build_model(tiny(**options, mlp=mlp, mlp_bias=True, parallel_residual=parallel))
        block = model.blocks[0]
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        p = dict(block.named_parameters())

        def norm(x: torch.Tensor, name: str, p: dict = p) -> torch.Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

        def linear(x: torch.Tensor, name: str, p: dict = p) -> torch.Tensor:
            return x @ p[f"{name}.weight"].t() + p.get(f"{name}.bias", torch.zeros(()))

        def turn(x: torch.Tensor) -> torch.Tensor:  # [B, T, H, 8]: channels 0, 1 turn with 2, 3
            angle = torch.arange(9.0)[:, None, None] * torch.tensor([1.0, 0.01])
            z = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angle), angle)
            return torch.cat((z.real, z.imag, x[..., 4:]), -1)

        def attention(x: torch.Tensor) -> torch.Tensor:
            q, k, v = (linear(x, f"mixer.w{kind}").view(2, 9, 4, 8) for kind in "qkv")
            score = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k)) / math.sqrt(8)
            score = score.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1)
            return linear(torch.einsum("bhij,bjhd->bihd", score, v).flatten(2), "mixer.wo")

        def feed(x: torch.Tensor, mlp: str = mlp) -> torch.Tensor:
            up = linear(x, "mlp.up")
            if mlp == "gelu":
                return linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), "mlp.down")
            gate = linear(x, "mlp.gate")
            return linear(gate * gate.sigmoid() * up, "mlp.down")

        mixed = h + attention(norm(h, "norm1"))
        want = mixed + feed(norm(h if parallel else mixed, "norm2"))
        tables = rope_tables(0, 9, channels=4, theta=10_000.0, device=h.device)
        torch.testing.assert_close(block(h, tables), want, rtol=1e-4, atol=1e-4)


def test_initial_values_depend_on_seed_name_and_index_alone() -> None:
    a, b = build_model(tiny(), seed=1), build_model(tiny(n_layers=1, vocab_size=40), seed=1)
    assert torch.equal(a.blocks[0].mixer.wq.weight, b.blocks[0].mixer.wq.weight)
    assert torch.equal(a.embed.weight[:48], b.embed.weight)
    assert not torch.equal(a.blocks[0].mixer.wq.weight, a.blocks[1].mixer.wq.weight)
    assert not torch.equal(a.embed.weight, build_model(tiny(), seed=2).embed.weight)
    # Two keys that are one as floats: half of all keys lie past 2^63, where numpy would round them.
    near = [Normal(1.0).draw((2**64 - 2**11 + bit).to_bytes(8, "little"), 0, 8) for bit in (0, 1)]
    assert (near[0] != near[1]).all()
    key = _key(0, "x")
    whole = Normal(1.0).draw(key, 0, 200_000)
    for start, stop in ((0, 1), (65_530, 65_540), (131_071, 199_999), (70_000, 70_000)):
        assert (Normal(1.0).draw(key, start, stop) == whole[start:stop]).all()


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = strong_decay(build_model(tiny()))
    tokens = tokens_of(2, 65)

    def grads() -> list[torch.Tensor]:
        loss, _ = model(tokens, tokens)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain = grads()
    for block in model.blocks:
        block.activation_checkpointing = True
    for got, want in zip(grads(), plain, strict=True):
        assert torch.equal(got, want)
