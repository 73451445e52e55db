"""Gates of a learned d_s: their law, their gradients, what a closed one leaves of its channels, and the budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mixer_cases import BASE, CASES
from sisa_dist.config import AttentionConfig, ModelConfig, UserError, parse_config
from sisa_dist.engine.gates import noise
from sisa_dist.model import LM, build_model
from sisa_dist.model.gates import BETA, GAMMA, START, ZETA, Gates


def config(**d_s: Any) -> ModelConfig:
    said = {"learned": True, "max": 16, "budget": 6.0, **d_s}
    return ModelConfig(**(BASE | {"mixer": "sisa", "n_kv_heads": 2, "d_s": {k: v for k, v in said.items() if v}}))


def gates(share: float = 0.0, **d_s: Any) -> Gates:
    """Of two layers of eight pairs, log α all over the place, in fp64."""
    found = Gates(config(**d_s)).double()
    with torch.no_grad():
        found.log_alpha.copy_(torch.linspace(-4, 4, 16, dtype=torch.float64).view(8, 2).t())
        found.step.zero_()
        found.share.fill_(share)
    return found


def model(share: float = 0.0, dtype: torch.dtype = torch.float64, **d_s: Any) -> LM:
    found = build_model(config(**d_s), attention=AttentionConfig(leaf=8), seed=1).to(dtype)
    assert found.gates is not None
    found.gates.load_state_dict(gates(share, **d_s).state_dict())
    return found


def tokens() -> Tensor:
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))


def test_draws_follow_the_law() -> None:
    """Mean number of open gates against its formula, and the middle of a gate against the equations, over draws."""
    found = gates()
    total = torch.zeros(2)
    for step in range(1000):
        found.noise_LP = noise(3, step, torch.Size((2, 8)))
        z_LP, _ = found()
        total += 2 * (z_LP > 0).sum(1).float() / 1000
    assert found.seen is not None
    torch.testing.assert_close(total, found.seen.expected_L.float(), rtol=0, atol=0.2)
    u, log_alpha = 0.3, found.log_alpha[0, 3].item()
    found.noise_LP = torch.full((2, 8), u)
    s = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + log_alpha) / BETA))
    found.settings = found.settings.model_copy(update={"budget": None, "penalty": 1.0})  # τ = 0
    assert found()[0][0, 3].item() == pytest.approx(min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA)), abs=1e-6)


def test_noise_is_of_seed_step_and_place_alone() -> None:
    shape = torch.Size((2, 8))
    u = noise(3, 5, shape)
    assert torch.equal(u, noise(3, 5, shape)) and ((u >= 0) & (u < 1)).all() and u.unique().numel() == 16
    assert not torch.equal(u, noise(3, 6, shape)) and not torch.equal(u, noise(4, 5, shape))


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("d_s", [{}, {"budget": None, "penalty": 0.3}], ids=["budget", "penalty"])
def test_gradients_are_those_of_differences(share: float, d_s: dict[str, Any]) -> None:
    found = gates(share, **d_s)
    found.noise_LP = noise(1, 1, torch.Size((2, 8)))
    weight = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(log_alpha: Tensor) -> Tensor:
        z_LP, cost = torch.func.functional_call(found, {"log_alpha": log_alpha})
        return (weight * z_LP).sum() + cost

    torch.autograd.gradcheck(value, (found.log_alpha.detach().requires_grad_(),), eps=1e-7, atol=1e-5)
    (gradient,) = torch.autograd.grad(value(found.log_alpha), found.log_alpha)
    assert gradient.abs().max() > 1e-3
    if "budget" not in d_s:  # what all have in common is nothing to choose by
        assert gradient.sum().abs() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.7, 0.799])
def test_the_budget_is_met_in_every_step(share: float) -> None:
    found = gates(share)
    found()
    assert found.seen is not None
    begins = 16 / (1 + math.exp(BETA * math.log(-GAMMA / ZETA) - START))
    target = begins + (6 - begins) * min(1.0, share / 0.5)
    assert found.seen.expected_L.mean().item() == pytest.approx(target, abs=1e-6)
    with torch.no_grad():
        found.log_alpha += 3  # of all alike: no gate is another for it
    moved, _ = found()
    torch.testing.assert_close(moved, gates(share)()[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("penalty", [None, 2.0])
def test_forward_reads_no_value(penalty: float | None) -> None:
    """Which would wait for the device in every step, and could not be rehearsed on tensors without values."""
    with FakeTensorMode():
        found = Gates(config(penalty=penalty, budget=None if penalty else 6.0))
        z_LP, cost = found()
        (z_LP.sum() + cost).backward()
        assert found.log_alpha.grad is not None


def test_evaluation_has_no_noise_and_hardens_with_training() -> None:
    middles, mean = [], []
    for share in (0.3, 0.5, 0.65, 0.79, 0.8, 1.0):
        found = gates(share)
        found.noise_LP = noise(1, 1, torch.Size((2, 8)))
        with torch.no_grad():
            z_LP, _ = found()
            assert torch.equal(z_LP, found()[0])
        middles.append(int(((z_LP > 0) & (z_LP < 1)).sum()))
        mean.append(2 * float((z_LP > 0).sum()) / 2)
        if share < 0.6:
            assert not torch.equal(found()[0], z_LP), "training draws"
    assert middles[0] > middles[2] > 0 and middles[1] > middles[2] and middles[4:] == [0, 0]
    assert mean[4:] == [6.0, 6.0], "exactly the budget"


@pytest.mark.parametrize("until", [0.8, 0.9, 1.0])
def test_gates_are_hard_at_the_end_wherever_it_begins(until: float) -> None:
    for begins in range(5, round(100 * until), 7):
        found = gates(until, anneal_from=begins / 100, anneal_until=until)
        z_LP = found.values()
        assert z_LP.sum() == 6 and ((z_LP == 0) | (z_LP == 1)).all(), begins


def test_a_budget_loses_no_pair_to_rounding() -> None:
    settings = config(budget=9.2).model_dump() | {"n_layers": 25}
    found = Gates(ModelConfig(**settings)).double()
    with torch.no_grad():
        found.log_alpha.normal_()
        found.share.fill_(1.0)
    assert found.values().sum() == 115  # 9.2 · 25 / 2, in doubles a little less


def test_hard_gates_are_the_largest_and_have_no_gradient() -> None:
    found = gates(0.8)
    z_LP, cost = found()
    assert z_LP.sum() == 6 and z_LP[found.log_alpha >= found.log_alpha.flatten().sort().values[-6]].all()
    (z_LP.sum() + cost).backward()
    assert found.log_alpha.grad is not None and not found.log_alpha.grad.any()
    assert torch.equal(gates(0.8, budget=None, penalty=1.0)()[0] > 0, found.log_alpha > 0)


@pytest.mark.parametrize("mixer", ["sisa", "sigmoid_sisa"])
def test_a_closed_gate_leaves_nothing_of_its_channels(mixer: str) -> None:
    settings = config().model_dump() | {"mixer": mixer}
    lm = build_model(ModelConfig(**settings), attention=AttentionConfig(leaf=8), seed=1).double()
    assert lm.gates is not None
    lm.gates.load_state_dict(gates(0.5).state_dict())
    (closed, *_), z_LP = (lm.gates.values()[0] == 0).nonzero()[:, 0].tolist(), lm.gates.values()
    opened = int(z_LP[0].argmax())
    before = lm(tokens())
    for pair, moves in ((closed, False), (opened, True)):
        with torch.no_grad():
            for name, heads, width in (("wb", 2, 2), ("wc", 4, 2), ("wtheta", 2, 1)):
                weight = getattr(lm.blocks[0].mixer, name).weight
                weight.view(heads, -1, 32)[:, width * pair : width * (pair + 1)] += 0.3
        assert ((lm(tokens()) - before).abs().max() > 1e-4) == moves


def test_a_gate_multiplies_b_by_its_value() -> None:
    lm = model()
    assert lm.gates is not None
    z_LP = lm.gates.values()
    plain = build_model(config().model_copy(update={"d_s": 16}), attention=AttentionConfig(leaf=8), seed=1).double()
    plain.load_state_dict({n: x for n, x in lm.state_dict().items() if not n.startswith("gates")})
    with torch.no_grad():
        for block, z_P in zip(plain.blocks, z_LP, strict=True):
            block.mixer.wb.weight.mul_(z_P.repeat_interleave(2).repeat(2)[:, None])  # type: ignore[union-attr, operator]
    torch.testing.assert_close(lm(tokens()), plain(tokens()), rtol=0, atol=1e-12)


def test_decoding_has_the_gates_of_evaluation() -> None:
    lm = model()
    assert lm.gates is not None
    lm.gates.noise_LP = noise(1, 1, torch.Size((2, 8)))
    cache = lm.new_cache()
    with torch.no_grad():
        want = lm(tokens())
        got = torch.cat([lm(part, cache=cache) for part in tokens().split([17, 1, 1, 21], dim=1)], dim=1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_the_cost_is_in_the_gradient_once_a_label_and_not_in_the_loss() -> None:
    lm = model(0.3, budget=None, penalty=2.0)
    assert lm.gates is not None
    labels = tokens().roll(-1, 1)
    labels[0, :7] = -100
    with torch.no_grad():
        want = lm(tokens(), labels)[0]
    loss, count = lm(tokens(), labels)
    torch.testing.assert_close(loss, want, rtol=0, atol=1e-10)
    (loss / count).backward()
    found = lm.gates.log_alpha.grad
    lm.gates.part = 0.0
    assert found is not None
    lm.zero_grad()
    loss, count = lm(tokens(), labels)
    (loss / count).backward()
    without = lm.gates.log_alpha.grad
    assert without is not None and without.abs().max() > 1e-6, "the text's own gradient"
    lm.gates.part = 1.0
    (cost,) = torch.autograd.grad(lm.gates()[1], lm.gates.log_alpha)
    torch.testing.assert_close(found, without + cost, rtol=0, atol=1e-10)


def test_a_budget_is_met_by_the_pairs_that_matter() -> None:
    """Gates alone, against costs of closing that are known."""
    found = gates().float()
    steps, generator = 400, torch.Generator().manual_seed(0)
    with torch.no_grad():
        found.log_alpha.fill_(2.5)
    worth_LP = 1e-3 * torch.randn(2, 8, generator=generator).mul(1.5).exp() * torch.tensor([[10.0], [1.0]])
    adam = torch.optim.Adam([found.log_alpha], lr=0.06, betas=(0.9, 0.95))
    for step in range(steps):
        found.noise_LP = noise(0, step, torch.Size((2, 8)))
        z_LP, cost = found()
        adam.zero_grad()
        ((worth_LP * (1 - z_LP)).sum() + cost).backward()
        adam.step()
        found.share.fill_((step + 1) / steps)
    z_LP = found.values()
    assert z_LP.sum() == 6 and z_LP[0].sum() > z_LP[1].sum()
    best = worth_LP.flatten().topk(6).values.sum()
    assert (worth_LP * z_LP).sum() > 0.95 * best


@pytest.mark.parametrize(
    ("d_s", "says"),
    [
        ({"learned": True, "max": 12, "budget": 4}, "max 12 is not a multiple of 8.*set 8 or 16"),
        ({"learned": True, "max": 16, "budget": 16}, "budget 16 is not from 2 to below max 16"),
        ({"learned": True, "max": 16}, "give either budget.*or penalty"),
        ({"learned": True, "max": 16, "budget": 4, "penalty": 1.0}, "give either budget.*or penalty"),
        ({"learned": True, "max": 16, "budget": 4, "anneal_from": 0.9}, "anneal_from 0.9 is not before anneal_until"),
        ({"learned": True, "max": 16, "buget": 4}, r"model.d_s.buget: unknown key; did you mean budget"),
        ({"learned": False, "max": 16, "budget": 4}, r"model.d_s.learned: "),
        ({"max": 16, "budget": 4}, r"model.d_s.learned: missing"),
        ("32", r"model.d_s: .*integer"),
        ([8, "x"], r"model.d_s.1: .*integer"),
    ],
)
def test_what_does_not_fit_is_one_line(d_s: Any, says: str) -> None:
    tree = {
        "model": BASE | {"mixer": "sisa", "d_s": d_s},
        "training": {"steps": 1, "seq_len": 8, "global_batch_tokens": 8},
        "schedule": {"warmup_steps": 0},
    }
    with pytest.raises(UserError, match=f"^here: .*{says}") as raised:
        parse_config(tree, source="here")
    assert "\n" not in str(raised.value)


def test_learned_d_s_does_not_go_with_what_reads_every_channel() -> None:
    tree: dict[str, Any] = {"training": {"steps": 1, "seq_len": 8, "global_batch_tokens": 8}}
    tree |= {"schedule": {"warmup_steps": 0}, "model": BASE | CASES["learned_d_s"] | {"ffn": "ssm_gated"}}
    with pytest.raises(UserError, match=r"ffn of layer 0 is ssm_gated.*d_s is learned: set ffn"):
        parse_config(tree, source="here")
    tree["model"] = BASE | CASES["learned_d_s"] | {"mixer": "attention", "n_kv_heads": None}
    with pytest.raises(UserError, match="d_s is set but no layer's mixer is sisa"):
        parse_config(tree, source="here")
