"""A Transformer upcycled to SISA: the same outputs, a term that is off and learns, any number of processes, a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from data_pipeline.loader import Loader
from data_pipeline.prepare import prepare
from distributed.grid import STYLES, VOCAB, Case, batch
from distributed.pool import run_job
from runs import QUICKSTART
from sisa_dist.config import AttentionConfig, ModelConfig, ParallelConfig, RunConfig, UserError, load_config
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.upcycle import recipes, upcycle
from sisa_dist.engine import Engine, build_engine
from sisa_dist.model import LM, build_model
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.run_data import open_data

STARTS_AS_NEW = ("wc.weight", "wtheta.weight", "decay.weight", "decay.bias", "lambda_raw")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gqa_untied": {"n_kv_heads": 2, "tie_embeddings": False, "head_dim": 12},
    "qwen": {"n_kv_heads": 1, "attention_bias": "qkv", "qk_norm": True},
    "neox": STYLES["neox"],
}


def transformer(**changes: Any) -> ModelConfig:
    values = dict(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, d_ff=48, mixer="attention", init_std=0.2)
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def made(table: Mapping[str, Recipe], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: recipe.make(*(source[needed] for needed in recipe.sources)) for name, recipe in table.items()}


def pair(options: dict[str, Any], *, path: str = "auto", d_s: int | list[int] = 8) -> tuple[LM, LM]:
    model = transformer(**options)
    old = build_model(model, seed=1)
    new = build_model(upcycle(model, d_s=d_s), attention=AttentionConfig(path=path, leaf=16), seed=5)  # type: ignore
    new.load_state_dict(made(recipes(model, d_s=d_s, seed=5), old.state_dict()), strict=True)
    return old, new


def tokens_of(length: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("path", ["dense", "bisected"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_transformers(name: str, path: str) -> None:
    """Not to the bit, and up to 4e-6 of logits of standard deviation 1.1: the Transformer's kernel is CPU flash, which
    sums a row of the softmax in blocks of its own. fp64 shows that this is all: 1e-14."""
    old, new = pair(MODELS[name], path=path)
    tokens = tokens_of(75)
    with torch.no_grad():
        want = old(tokens)
        assert want.std() > 0.3
        assert (new(tokens) - want).abs().max() < 5e-6
        assert (new.double()(tokens) - old.double()(tokens)).abs().max() < 1e-12


def test_the_term_adds_nothing_to_the_bit() -> None:
    """Against the same model with λ = 0, so the same kernel: what is added to the score is zero, not small."""
    _, new = pair({}, path="dense")
    tokens = tokens_of(75)
    with torch.no_grad():
        before = new(tokens)
        for block in new.blocks:
            block.mixer.importance.lambda_raw.fill_(-1e4)
        assert torch.equal(new(tokens), before)


@pytest.mark.parametrize("path", ["dense", "bisected"])
@pytest.mark.parametrize("name", MODELS)
def test_b_has_a_gradient_at_once_and_the_rest_after_a_step(name: str, path: str) -> None:
    old, new = pair(MODELS[name], path=path)
    tokens = tokens_of(75)

    def gradients(model: LM) -> dict[str, Tensor]:
        loss, count = model(tokens, tokens.roll(-1, 1))
        model.zero_grad()
        (loss / count).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]

    theirs, first = gradients(old), gradients(new)
    for parameter, gradient in first.items():
        if parameter.endswith(STARTS_AS_NEW):
            assert (gradient == 0).all(), parameter
        elif parameter.endswith("wb.weight"):
            assert gradient.abs().max() > 1e-5, parameter
        else:  # what the Transformer has learns as before
            scale = max(1e-3, theirs[parameter].abs().max().item())
            assert (gradient - theirs[parameter]).abs().max() < 1e-5 * scale, parameter
    torch.optim.AdamW(new.parameters(), lr=1e-2).step()
    second = gradients(new)
    for parameter, gradient in second.items():
        assert gradient.abs().max() > 0, parameter


def test_what_is_new_starts_as_in_a_new_model_and_the_rest_is_kept() -> None:
    model = transformer()
    old, new = pair({})
    fresh = build_model(upcycle(model, d_s=8), seed=5).state_dict()
    kept = old.state_dict()
    for name, tensor in new.state_dict().items():
        if name in kept:
            assert torch.equal(tensor, kept[name]), name
        elif name.endswith("wb.weight"):
            assert not tensor.any()
        else:
            assert name.endswith(STARTS_AS_NEW) and torch.equal(tensor, fresh[name]), name
    assert upcycle(model, d_s=8).d_ff == model.d_ff


def test_d_s_by_layer_and_refusals() -> None:
    mixed = upcycle(transformer(), d_s=[8, 0, 4])
    assert mixed.layer_mixers == ["sisa", "attention", "sisa"]
    old, new = pair({}, d_s=[8, 0, 4])
    assert (new(tokens_of(40)) - old(tokens_of(40))).abs().max() < 5e-6
    for model, d_s, says in (
        (mixed, 8, "sisa layers already"),
        (transformer(), [8, 8], "lists 2 layers, n_layers is 3"),
        (transformer(), 7, "set an even number"),
    ):
        with pytest.raises(UserError, match=says):
            upcycle(model, d_s=d_s)  # type: ignore[arg-type]


def fill(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Whole weights into an engine's own storage, each rank its part."""
    for name, stored in engine.state_tensors().items():
        if name.startswith("model."):
            whole = weights[name.removeprefix("model.")]
            part = (
                distribute_tensor(whole, stored.device_mesh, stored.placements)
                if isinstance(stored, DTensor)
                else whole
            )
            stored.copy_(part)


def scores(config: RunConfig, weights: Mapping[str, Tensor]) -> Tensor:
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    fill(engine, weights)
    whole = batch(Case("tp1", "sisa", 4, "uniform", "fp32"), 0)
    return engine.score(whole.tokens, whole.labels)[0]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_same_under_tensor_parallelism(kv_heads: int) -> None:
    config = Case("tp1", "attention", kv_heads, "uniform", "fp32").config()
    source = build_model(config.model, seed=1).state_dict()
    grown = made(recipes(config.model, d_s=8), source)
    cut = config.model_copy(
        update={
            "model": upcycle(config.model, d_s=8),
            "parallel": ParallelConfig(tp=2, sequence_parallel=True),
        }
    )
    want = scores(config, source)
    for got in run_job(2, scores, cut, grown):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def importance(model: LM, tokens: Tensor) -> tuple[float, float]:
    """(‖W_B‖ over all layers, the root mean square of λ·e^{g_i−g_j}·C_iᵀR(Φ_j−Φ_i)B_j over the causal pairs)."""
    seen: list[Tensor] = []
    norm = torch.stack([block.mixer.wb.weight.norm() for block in model.blocks]).norm().item()

    def see(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, _, C, B, log_alpha, theta, lam = (tensor.detach() for tensor in arguments)
        g, phase = log_alpha.cumsum(-1), theta.cumsum(2)
        turn = torch.polar(torch.ones_like(phase), phase)  # pairs (2m, 2m+1) as complex numbers
        C, B = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn for x in (C, B))
        term = lam[:, None, None] * (g[..., :, None] - g[..., None, :]).clamp(max=0).exp() * (C @ B.mH).real
        seen.append(term[..., *torch.tril_indices(term.shape[-1], term.shape[-1])].square().mean())

    hooks = [block.mixer.score.register_forward_hook(see) for block in model.blocks]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return norm, torch.stack(seen).mean().sqrt().item()


@pytest.mark.slow
def test_a_run_upcycled_half_way_goes_on_and_the_term_wakes_up(tmp_path: Path) -> None:
    """150 steps of a Transformer on the sources of Python, then 200 as itself and 200 as SISA on the same batches."""
    overrides = [
        "model.mixer=attention",
        "model.d_s=null",
        f"output_dir={tmp_path}",
        "training.global_batch_tokens=2048",
    ]
    overrides += ["training.micro_batch_size=8", "model.vocab_size=2048", "model.d_model=128", "model.d_ff=320"]
    overrides += ["training.seq_len=256", "data.tokenizer.sample_bytes=1000000"]
    config = load_config(QUICKSTART, overrides)
    prepare(config, quiet=True)
    data = open_data(config)
    loader = Loader(
        data.train,
        seq_len=config.training.seq_len,
        global_batch_windows=config.training.global_batch_windows,
        micro_batch_size=config.training.micro_batch_size,
        seed=config.seed,
        dp_rank=0,
        dp_size=1,
        lanes=config.data.lanes,
    )
    with loader.steps(0) as stream:
        batches = [next(stream).micro_batches for _ in range(350)]

    def engine_of(model: ModelConfig) -> Engine:
        changed = config.model_copy(update={"model": model})
        return build_engine(changed, init_mesh(config.parallel, device="cpu"))

    def run(engine: Engine, first: int, last: int) -> list[float]:
        return [engine.train_step(batches[step], min(1.0, (step + 1) / 30) * 1e-3).loss for step in range(first, last)]

    before = engine_of(config.model)
    pretrained = run(before, 0, 150)
    source = {name: p.detach().clone() for name, p in before.model.named_parameters()}  # type: ignore[attr-defined]
    same = engine_of(config.model)
    fill(same, source)
    grown = engine_of(upcycle(config.model, d_s=32))
    fill(grown, made(recipes(config.model, d_s=32), source))
    tokens = batches[0][0].tokens
    rows = [(150, *importance(grown.model, tokens))]  # type: ignore[attr-defined]
    transformer_losses = run(same, 150, 350)
    sisa_losses = []
    for first, last in ((150, 151), (151, 160), (160, 200), (200, 275), (275, 350)):
        sisa_losses += run(grown, first, last)
        rows.append((last, *importance(grown.model, tokens)))  # type: ignore[attr-defined]
    print(f"\nTransformer {pretrained[0]:.3f} → {pretrained[-1]:.3f} in 150 steps; then")
    for step in (0, 1, 2, 5, 10, 50, 100, 199):
        print(f"step {150 + step}: Transformer {transformer_losses[step]:.4f}, SISA {sisa_losses[step]:.4f}")
    for step, norm, size in rows:
        print(f"before step {step}: ‖W_B‖ {norm:.4f}, importance term rms {size:.4f}")
    last_50 = [sum(losses[-50:]) / 50 for losses in (transformer_losses, sisa_losses)]
    print(f"mean of the last 50: Transformer {last_50[0]:.4f}, SISA {last_50[1]:.4f}")
    assert abs(sisa_losses[0] - transformer_losses[0]) < 1e-5
    gaps = [b - a for a, b in zip(transformer_losses, sisa_losses, strict=True)]
    assert max(gaps) < 0.1  # no jump: on the same batch it is never much above the Transformer
    assert last_50[1] < last_50[0] + 0.02
    sizes = [size for _, _, size in rows]
    assert rows[0][1:] == (0.0, 0.0) and sizes == sorted(sizes)
    assert sizes[-1] > 0.1
