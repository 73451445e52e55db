"""`sisa doctor CONFIG` on several ranks: what it shows, and that it sees ranks that disagree."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distributed.pool import RankFailed, run_job
from sisa_dist.config import RunConfig, parse_config
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training import layout

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "model": {
        "vocab_size": 250,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 1,
        "d_ff": 48,
        "d_s": [8, 4, 0],
        "mixer": ["sisa", "sisa", "attention"],
    },
    "parallel": {"tp": 2, "sequence_parallel": True},
    "schedule": {"warmup_steps": 0},
    "training": {"steps": 1, "seq_len": 64, "global_batch_tokens": 256},
}


def _diagnose(config: RunConfig, fault: str | None) -> tuple[bool, str]:
    out = io.StringIO()
    second = dist.get_rank() == 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(mock.patch.dict("os.environ", {"COLUMNS": "160"}))
        if fault == "config" and second:
            config = parse_config(
                CONFIG | {"model": CONFIG["model"] | {"n_layers": 2, "d_s": 8, "mixer": "sisa"}}, source="x"
            )
        if fault == "code" and second:
            stack.enter_context(mock.patch.object(layout, "code_version", lambda: "edited"))
        if fault == "weights" and second:
            stack.enter_context(mock.patch.object(FSDP2Engine, "unequal_replicas", _perturbed))
        passed = layout.diagnose_layout(config)
    return passed, out.getvalue()


_real = FSDP2Engine.unequal_replicas


def _perturbed(engine: FSDP2Engine) -> dict[str, list[str]]:
    with torch.no_grad():
        engine.model.norm._parameters["weight"].to_local().mul_(1.5)  # type: ignore[union-attr]
    return _real(engine)


def test_doctor_shows_the_mesh_the_slices_and_the_backends() -> None:
    results = run_job(4, _diagnose, parse_config(CONFIG, source="test"), None)
    assert [passed for passed, _ in results] == [True] * 4
    assert [bool(text) for _, text in results] == [True, False, False, False]
    lines = [" ".join(line.replace("│", " ").split()) for line in results[0][1].splitlines()]
    assert any(line.startswith("3 ") and line.endswith("cpu 0 1 1") for line in lines), lines
    assert "embed.weight 256 × 32 dim 0: 0–127, 128–255 its own" in lines
    assert "blocks.*.mixer.wo.weight 32 × 32 dim 1: 0–15, 16–31 its own" in lines
    assert "blocks.*.mixer.wk.weight 8 × 32 all of it a part, summed over tp" in lines
    assert "blocks.0.mixer.wc.weight 32 × 32 dim 0: 0–15, 16–31 its own" in lines  # layers of other d_s apart
    assert any(line.startswith("sisa, d_s 8: 0 ") for line in lines)
    assert any(line.startswith("attention: 2 ") for line in lines)
    assert any("cpu_flash serves" in line for line in lines)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("config", "ranks 1 differ"), ("code", "ranks 1 differ"), ("weights", "1 differ: norm.weight")],
)
def test_doctor_fails_on_every_rank_where_one_disagrees(fault: str, message: str) -> None:
    results = run_job(4, _diagnose, parse_config(CONFIG, source="test"), fault)
    assert [passed for passed, _ in results] == [False] * 4
    assert message in results[0][1]


def test_a_layout_that_does_not_fit_is_refused() -> None:
    config = parse_config(CONFIG | {"parallel": {"tp": 3}}, source="test")
    with pytest.raises(
        RankFailed, match=r"parallel\.tp 3 does not divide n_heads 4: set parallel\.tp to one of \[1, 2, 4\]"
    ):
        run_job(2, _diagnose, config, None)


def test_doctor_shows_who_holds_which_experts() -> None:
    model = CONFIG["model"] | {"mlp": ["moe", "swiglu", "swiglu"], "moe": {"experts": 4}}
    config = parse_config(CONFIG | {"model": model, "parallel": {"dp": 4, "ep": 2}}, source="test")
    results = run_job(4, _diagnose, config, None)
    assert [passed for passed, _ in results] == [True] * 4
    lines = [" ".join(line.replace("│", " ").split()) for line in results[0][1].splitlines()]
    assert "blocks.0.mlp.experts.up 4 × 32 × 48 dim 0: 0–1, 2–3 its own" in lines, lines
    assert "experts: ep 2, then over the 2 that hold the same" in " ".join(results[0][1].split())


def test_doctor_shows_who_holds_which_positions() -> None:
    config = parse_config(CONFIG | {"parallel": {"tp": 2, "cp": 2}}, source="test")
    results = run_job(4, _diagnose, config, None)
    assert [passed for passed, _ in results] == [True] * 4
    lines = [" ".join(line.replace("│", " ").split()) for line in results[0][1].splitlines()]
    assert any(line.startswith("3 ") and line.endswith("cpu 0 1 1 1") for line in lines), lines
    assert any(line.startswith("1 ") and line.endswith("cpu 0 1 0 0") for line in lines), lines
    assert "0 0–15, 48–63" in lines and "1 16–31, 32–47" in lines
