"""`training.profile` traces the steps it names, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training.test_golden import CONFIG

from distributed.ranks import run_ranks
from sisa_dist.config import ProfileConfig, RunConfig, UserError, parse_config
from sisa_dist.training import profile
from sisa_dist.training.trainer import train


def profiled(config: RunConfig, start: int, number: int, **training: object) -> RunConfig:
    chosen = {"profile": ProfileConfig(start=start, steps=number)}
    return config.model_copy(update={"training": config.training.model_copy(update=chosen | training)})


def _train(config: RunConfig) -> None:
    train(config, quiet=True)


def _traced(folder: Path) -> dict[str, int]:
    """Optimizer steps in each trace."""
    found = {}
    for path in folder.glob("*.json"):
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        found[path.name] = sum(str(event.get("name", "")).startswith("Optimizer.step") for event in events)
    return found


def test_the_named_steps_are_traced_on_every_rank(tiny: RunConfig, tmp_path: Path) -> None:
    config = profiled(tiny, 3, 2, steps=5, micro_batch_size=1)
    run_ranks(_train, 2, tmp_path / "ranks", config)
    assert _traced(Path(tiny.output_dir) / "profile") == {"steps_3-4_rank_0.json": 2, "steps_3-4_rank_1.json": 2}


def test_a_run_that_ends_inside_them_keeps_what_it_traced(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from sisa_dist.engine.fsdp import FSDP2Engine

    real = FSDP2Engine.train_step

    def train_step(engine: FSDP2Engine, *args: object, **kwargs: object) -> object:
        if engine.mesh.pulse.step == 5:
            raise KeyboardInterrupt
        return real(engine, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(FSDP2Engine, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(profiled(tiny, 4, 3), quiet=True)
    assert _traced(Path(tiny.output_dir) / "profile") == {"steps_4-4_rank_0.json": 1}


def test_other_runs_never_start_the_profiler(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = profile.profile
    monkeypatch.setattr(profile, "profile", lambda **kwargs: started.append(1) or real(**kwargs))
    train(tiny, quiet=True)
    assert not started and not (Path(tiny.output_dir) / "profile").exists()
    # What changes no result may change on resume.
    train(profiled(tiny, 8, 1), quiet=True)
    assert not started, "step 8 is done"


def test_steps_behind_the_last_are_refused() -> None:
    training = CONFIG["training"] | {"profile": {"start": 20, "steps": 2}}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"profile\.start 20 \+ steps 2 reach behind training\.steps 20"):
        parse_config(CONFIG | {"training": training}, source="profile")
