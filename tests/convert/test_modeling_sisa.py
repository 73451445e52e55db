"""The exported model computes what ours does, and trains, generates and pads as transformers expects."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hf_models import CASES, as_hf, exported, random_model, tiny, tokens_of
from transformers import DynamicCache

import sisa_dist.convert.modeling_sisa as modeling
from sisa_dist.convert import hf_sisa
from sisa_dist.convert.modeling_sisa import SisaCache, SisaConfig, SisaForCausalLM
from sisa_dist.convert.recipe import Recipe
from sisa_dist.model import LM, generate


def logits_of(model: SisaForCausalLM, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("decay", [0.05, 2.5])
@pytest.mark.parametrize("length", [1, 37, 129])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(case: str, length: int, decay: float) -> None:
    tokens = tokens_of(2, length)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = random_model(tiny(**CASES[case]), decay=decay, dtype=dtype)
        with torch.no_grad():
            wanted = model(tokens)
        found = logits_of(as_hf(model), tokens)
        assert found.shape == wanted.shape and found.dtype == dtype
        assert (found - wanted).abs().max() < tolerance * wanted.abs().max() and wanted.abs().max() > 1


def gradients(model: LM, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    loss, count = model(tokens, labels)
    (loss / count).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_ours(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "SCORES_AT_ONCE", 2 * 4 * 41 * 5)  # five rows at a time, recomputed in backward
    model = random_model(tiny(**CASES[case]), decay=0.3, dtype=torch.float64).train()
    tokens = tokens_of(2, 41)
    labels = tokens.clone()
    labels[0, 7:12] = -100
    shifted = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    wanted = gradients(model, tokens, shifted)
    twin = as_hf(model).train()
    loss = twin(tokens, labels=labels).loss
    loss.backward()
    with torch.no_grad():
        ours = model(tokens, shifted)
    # Both losses are formed in fp32, whatever the model.
    assert abs(loss.item() - (ours[0] / ours[1]).item()) < 2e-6
    names = hf_sisa._names(model.config)
    parameters = dict(twin.named_parameters())
    assert {names[n] for n in wanted} == parameters.keys()
    for name, gradient in wanted.items():
        if name in ("embed.weight", "head.weight"):
            gradient = gradient[: model.config.vocab_size]
        found = parameters[names[name]].grad
        assert gradient.abs().max() > 1e-6, name
        assert (found - gradient).abs().max() < 2e-6 * (1 + gradient.abs().max()), name


def test_gradient_checkpointing_changes_nothing() -> None:
    twin = as_hf(random_model(tiny(**CASES["mixed"]), dtype=torch.float64)).train()
    again = copy.deepcopy(twin)
    with warnings.catch_warnings():  # Trainer still calls it by this name
        warnings.simplefilter("ignore", FutureWarning)
        again.gradient_checkpointing_enable()
    tokens = tokens_of(2, 20)
    for model in (twin, again):
        model(tokens, labels=tokens).loss.backward()
    assert again.model.layers[0].gradient_checkpointing
    for (name, a), b in zip(twin.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), name


def padded(rows: list[torch.Tensor], side: str, junk: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    tokens, mask = torch.full((len(rows), longest), junk), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["grouped", "mixed"])
def test_padding_has_no_influence(case: str, side: str) -> None:
    twin = as_hf(random_model(tiny(**CASES[case]), decay=0.5, dtype=torch.float64))
    rows = [tokens_of(n, seed=n) for n in (23, 5, 14)]
    found = []
    for junk in (0, 41):
        tokens, mask = padded(rows, side, junk)
        found.append([z[m.bool()] for z, m in zip(logits_of(twin, tokens, attention_mask=mask), mask, strict=True)])
    for row, first, second in zip(rows, *found, strict=True):
        assert torch.equal(first, second)  # to the bit: what a padded token is does not matter
        assert (first - logits_of(twin, row[None])[0]).abs().max() < 1e-12


def test_padding_gets_no_gradient() -> None:
    twin = as_hf(random_model(tiny(**CASES["mixed"]), decay=0.5, dtype=torch.float64)).train()
    tokens, mask = padded([tokens_of(9), tokens_of(4)], "left", 0)
    embeds = twin.model.embed_tokens(tokens).detach().requires_grad_()
    logits = twin(inputs_embeds=embeds, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    assert torch.isfinite(embeds.grad).all()
    assert (embeds.grad[1, :5] == 0).all() and (embeds.grad[1, 5:] != 0).any(-1).all()


@pytest.mark.parametrize("case", ["paper", "grouped", "mixed", "attention"])
@pytest.mark.parametrize("decay", [0.02, 2.5])
def test_greedy_generation_is_ours_with_and_without_cache(case: str, decay: float) -> None:
    model = random_model(tiny(**CASES[case]), decay=decay)
    twin, prompt = as_hf(model), tokens_of(2, 11)
    wanted = torch.stack(list(generate(model, prompt, max_new_tokens=40)), dim=1)
    for use_cache in (True, False):
        found = twin.generate(prompt, max_new_tokens=40, do_sample=False, use_cache=use_cache, pad_token_id=0)
        assert torch.equal(found[:, 11:], wanted), use_cache


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "top_p": 0.9}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_sampling_and_beams_are_the_same_with_and_without_cache(settings: dict) -> None:
    twin = as_hf(random_model(tiny(**CASES["mixed"]), decay=0.3, dtype=torch.float64))
    tokens, mask = padded([tokens_of(9), tokens_of(4, seed=2)], "left", 0)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(
            twin.generate(
                tokens, attention_mask=mask, max_new_tokens=25, use_cache=use_cache, pad_token_id=0, **settings
            )
        )
    assert torch.equal(*found) and found[0].shape == (2, 34)


def test_generation_with_padding_is_each_row_alone() -> None:
    twin = as_hf(random_model(tiny(**CASES["mixed"]), decay=0.3, dtype=torch.float64))
    rows = [tokens_of(9), tokens_of(4, seed=2)]
    tokens, mask = padded(rows, "left", 5)
    together = twin.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for row, found in zip(rows, together, strict=True):
        alone = twin.generate(row[None], max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert torch.equal(found[9:], alone[0, len(row) :])


@pytest.mark.parametrize("case", ["grouped", "mixed"])
def test_chunks_through_the_cache_are_the_full_run(case: str) -> None:
    twin = as_hf(random_model(tiny(**CASES[case]), decay=1.5, dtype=torch.float64))
    tokens, mask = padded([tokens_of(40), tokens_of(29)], "left", 3)
    wanted = logits_of(twin, tokens, attention_mask=mask)
    cache, start, found = SisaCache(twin.config), 0, []
    for end in (17, 18, 19, 33, 40):
        step = logits_of(
            twin, tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        found.append(step)
        start = end
        assert cache.get_seq_length() == end
    assert (torch.cat(found, dim=1) - wanted)[mask.bool()].abs().max() < 1e-12


def test_a_cache_can_be_repeated_selected_and_emptied() -> None:
    twin = as_hf(random_model(tiny(), dtype=torch.float64))
    tokens = tokens_of(2, 8)
    cache = twin(tokens[:, :5], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = logits_of(twin, tokens[:, 5:].flip(0), past_key_values=cache, use_cache=True)
    assert torch.allclose(swapped.flip(0), logits_of(twin, tokens)[:, 5:], atol=1e-12)
    cache.reset()
    assert torch.equal(
        logits_of(twin, tokens, past_key_values=cache, use_cache=True), logits_of(twin, tokens, use_cache=False)
    )
    with pytest.raises(NotImplementedError, match="cannot be cut"):
        cache.crop(-2)


def test_a_long_text_at_strong_decay_is_exact() -> None:
    """At 3 nats a token the sums reach 6000: an fp32 sum, or one reference for all, would be wrong."""
    model = random_model(tiny(n_layers=1), decay=3.0)
    tokens = tokens_of(1, 2000)
    with torch.no_grad():
        wanted = model.double()(tokens)
    twin = as_hf(model.float())
    assert (logits_of(twin, tokens) - wanted).abs().max() < 2e-5
    cache = SisaCache(twin.config)
    logits_of(twin, tokens[:, :1990], past_key_values=cache, use_cache=True)
    for i in range(1990, 2000):
        step = logits_of(twin, tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert (step[0, 0] - wanted[0, i]).abs().max() < 2e-5


def test_autocast_leaves_decay_and_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    attend = modeling.attend

    def spy(q: torch.Tensor, C: torch.Tensor, g_q: torch.Tensor, *rest: object) -> torch.Tensor:
        dtypes.append((q.dtype, C.dtype, g_q.dtype))
        return attend(q, C, g_q, *rest)

    monkeypatch.setattr(modeling, "attend", spy)
    twin = as_hf(random_model(tiny(n_layers=1)))
    decays = []
    softplus = modeling.F.softplus
    monkeypatch.setattr(modeling.F, "softplus", lambda x: decays.append(x) or softplus(x))
    exact = logits_of(twin, tokens_of(1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits_of(twin, tokens_of(1, 9))
    assert dtypes == [(torch.float32, torch.float32, torch.float64)] * 2
    assert torch.equal(decays[0], decays[2]) and decays[2].dtype == torch.float32  # x is the norm's, fp32 here
    assert 1e-4 < (rounded - exact).abs().max() < 0.2


def test_hidden_states_logits_to_keep_and_tuples() -> None:
    twin = as_hf(random_model(tiny()))
    tokens = tokens_of(2, 6)
    out = twin(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(twin.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(logits_of(twin, tokens, logits_to_keep=1), out.logits[:, -1:])
    assert torch.equal(twin(tokens, use_cache=False, return_dict=False)[0], out.logits)


def test_what_it_cannot_do_is_refused() -> None:
    twin = as_hf(random_model(tiny()))
    tokens = tokens_of(2, 6)
    with pytest.raises(ValueError, match="SisaCache"):
        twin(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        twin(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="attention maps"):
        twin(tokens, output_attentions=True)
    with pytest.raises(TypeError, match="unheard"):
        twin(tokens, unheard=True)
    with pytest.raises(ValueError, match="layer_d_s"):
        SisaConfig(num_hidden_layers=2, layer_d_s=[4])


def test_new_models_start_as_ours_do() -> None:
    twin = SisaForCausalLM(SisaConfig(vocab_size=89, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    mixer = twin.model.layers[0].self_attn
    assert (mixer.decay_proj.bias == -5).all() and (mixer.lambda_raw == -1).all()
    assert 0.008 < mixer.ssm_theta_proj.weight.std() < 0.012 and 0.018 < mixer.ssm_c_proj.weight.std() < 0.022
    assert (twin.model.norm.weight == 1).all()


def test_a_swapped_recipe_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """B and C have one shape where every head has its own keys: only the numbers can tell."""
    model = random_model(tiny())
    tokens = tokens_of(2, 12)
    with torch.no_grad():
        wanted = model(tokens)
    honest = hf_sisa.exports

    def swapped(config: object) -> dict[str, Recipe]:
        recipes = dict(honest(config))
        b, c = (f"model.layers.1.self_attn.ssm_{x}_proj.weight" for x in "bc")
        recipes[b], recipes[c] = recipes[c], recipes[b]
        return recipes

    assert (logits_of(as_hf(model), tokens) - wanted).abs().max() < 1e-5
    monkeypatch.setattr(hf_sisa, "exports", swapped)
    assert (logits_of(as_hf(model), tokens) - wanted).abs().max() > 1e-3


def test_padding_rows_that_are_not_cut_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny())
    assert exported(model)["model.embed_tokens.weight"].shape[0] == 89
    honest = hf_sisa.exports
    monkeypatch.setattr(hf_sisa, "exports", lambda c: {n: Recipe(r.sources) for n, r in honest(c).items()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        as_hf(model)
