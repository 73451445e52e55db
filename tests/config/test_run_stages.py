"""Stages as a file says them: resolved over the run, and refused in one line where they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sisa_dist.config import Run, UserError, load_config, load_run

RUN: dict[str, Any] = {
    "model": {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "d_s": 4},
    "schedule": {"warmup_steps": 2},
    "training": {"global_batch_tokens": 256, "micro_batch_size": 1},
}
STAGES: list[dict[str, Any]] = [
    {"name": "a", "steps": 10, "training": {"seq_len": 64}},
    {"name": "b", "steps": 5, "moments": "reset", "training": {"seq_len": 128}, "parallel": {"tp": 2, "dp": 3}},
]


def read(folder: Path, run: dict[str, Any], stages: Any, overrides: list[str] | None = None) -> Run:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, "stages": stages}), encoding="utf-8")
    return load_run(path, overrides or [])


def test_each_is_the_run_with_its_own_keys_over_it(tmp_path: Path) -> None:
    run = read(tmp_path, RUN, STAGES, ["stages.b.optimizer.lr=1e-5", "seed=3"])
    first, second = run.stages
    assert (first.first_step, first.end_step, first.moments, first.processes) == (0, 10, "keep", None)
    assert (second.first_step, second.end_step, second.moments, second.processes) == (10, 15, "reset", 6)
    assert (first.config.training.seq_len, second.config.training.seq_len) == (64, 128)
    assert (first.config.optimizer.lr, second.config.optimizer.lr) == (6e-4, 1e-5)
    assert {stage.config.seed for stage in run.stages} == {3} and not second.like(first) and first.like(first)
    assert (first.config.schedule.first_step, second.config.schedule.first_step) == (None, 10)
    assert [run.stage_of(step).name for step in (0, 9, 10, 14, 15, 99)] == ["a", "a", "b", "b", "b", "b"]
    (tmp_path / "again.yaml").write_text(run.text, encoding="utf-8")
    assert load_run(tmp_path / "again.yaml") == run
    with pytest.raises(UserError, match="a run of stages, and one config is wanted"):
        load_config(tmp_path / "run.yaml")


def test_a_config_without_stages_is_a_run_of_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "training": {**RUN["training"], "steps": 4, "seq_len": 64}}))
    run = load_run(path)
    assert not run.staged and run == Run.of(load_config(path))
    with pytest.raises(UserError, match="no stage is called b: the config has none"):
        run.named("b")


def test_a_profile_is_of_the_stage_it_lies_in(tmp_path: Path) -> None:
    run = read(tmp_path, {**RUN, "training": {**RUN["training"], "profile": {"start": 12}}}, STAGES)
    assert [stage.config.training.profile is None for stage in run.stages] == [True, False]


def over(stage: int, **keys: Any) -> list[dict[str, Any]]:
    return [{**entry, **keys} if number == stage else entry for number, entry in enumerate(STAGES)]


@pytest.mark.parametrize(
    ("run", "stages", "said"),
    [
        ({}, [], "stages: a list of mappings"),
        ({}, {"a": {"steps": 3}}, "stages: a list of mappings"),
        ({}, over(0, name=None), "stages: name None: every stage has a name"),
        ({}, over(0, name="b"), "stages: two are called b: rename one"),
        ({}, over(1, steps=0), "stage b: steps is 0: set how many"),
        ({}, over(1, steps=None), "stage b: steps is None: set how many"),
        ({}, over(1, moments="drop"), "stage b: moments is 'drop': set keep or reset"),
        ({}, over(0, moments="reset"), "stage a: moments reset has no effect, there are none before it"),
        ({}, over(1, trainign={}), "stage b: trainign: unknown key; did you mean training?"),
        ({}, over(1, training={"seq_len": 96}), "stage b: training: global_batch_tokens 256 is not a multiple"),
        ({}, over(1, output_dir="x"), "stage b: output_dir is of the whole run: set it outside the stages"),
        ({}, over(1, start={"weights": "x"}), "stage b: start.weights is of the whole run"),
        ({}, over(1, model={"init_std": 0.1}), "stage b: model.init_std is of the whole run"),
        ({}, over(1, training={"steps": 3}), "stage b: training.steps: set the stage's steps instead"),
        ({}, over(1, model={"d_ff": 32}), "stage b: model.d_ff gives the model other parameters than stage a has"),
        ({}, over(1, schedule={"first_step": 12}), "stage b: schedule.first_step 12 is behind its first step 10"),
        ({}, over(1, schedule={"warmup_steps": 6}), "stage b: schedule.warmup_steps + schedule.decay_steps = 6 exceed"),
        ({}, over(1, training={"profile": {"start": 3}, "seq_len": 128}), "stage b: training.profile.start 3 is not"),
        ({}, over(1, schedule={"warmup_steps": 2}), "stage b: schedule.warmup_steps has no effect, the run says 2 too"),
        ({"training": {"steps": 9}}, STAGES, "training.steps has no effect beside stages"),
        ({"training": {"seq_len": 32}}, STAGES, "training.seq_len has no effect: every stage says its own"),
        ({"training": {"profile": {"start": 16}}}, STAGES, "training.profile.start 16 is behind the last step 15"),
        ({"start": {"data": "continue"}}, STAGES, "start.data has no effect without start.resume"),
        ({"schedule": {"end_step": 12}}, STAGES, "stage b: schedule.end_step 12 is before its last step 15"),
    ],
)
def test_what_makes_no_sense_or_has_no_effect_is_one_line(
    tmp_path: Path, run: dict[str, Any], stages: Any, said: str
) -> None:
    tree = {**RUN, **{key: {**RUN.get(key, {}), **value} for key, value in run.items()}}
    with pytest.raises(UserError) as error:
        read(tmp_path, tree, stages)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'run.yaml'}: ") and ": :" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.c.steps=3", "--set stages.c.steps: no entry has the name c: it has a, b"),
        ("stages.a=3", "stages is a list: set the whole of it, or a key of an entry"),
        ("stages.a.steps.x=3", "steps is a value"),
        ("training.seq_len=32", "training.seq_len has no effect: every stage says its own"),
    ],
)
def test_an_override_that_hits_nothing_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, RUN, STAGES, [override])
