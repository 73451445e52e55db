"""A run of stages, trained: joined to the bit, reset, killed, refused, from another model's weights."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import QUICKSTART, Stages, assert_same_tensors, losses, staged, tensors
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import DataConfig, Run, RunConfig, UserError, load_config
from sisa_dist.engine.deepspeed import DeepSpeedEngine
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.run_data import open_data, open_loader
from sisa_dist.training.show_step import served_in
from sisa_dist.training.signals import NextStage, Requeue
from sisa_dist.training.stages import check_stages, stage_to_train
from sisa_dist.training.trainer import train


def same_as_one_run(tiny: RunConfig, folder: Path) -> Run:
    """Its cosine goes over the 8 steps of `tiny`."""
    return staged(
        tiny,
        folder,
        [{"name": "a", "steps": 3}, {"name": "b", "steps": 5}],
        schedule={"first_step": 0, "end_step": 8},
    )


# What a stage may change in one process: length, batch, RoPE, learning rate, schedule.
LONGER: Stages = [
    {"name": "short", "steps": 4},
    {
        "name": "long",
        "steps": 5,
        "model": {"rope_theta": 80000.0},
        "training": {"seq_len": 128, "global_batch_tokens": 512},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
    },
]


def longer(moments: str = "keep") -> Stages:
    return [LONGER[0], {**LONGER[1], "moments": moments}]


@pytest.fixture(scope="module")
def whole(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run that trained `longer(moments)` in one sitting."""

    @functools.cache
    def trained(moments: str) -> Path:
        folder = tmp_path_factory.mktemp(moments)
        return train(staged(load_config(QUICKSTART, tiny_overrides), folder, longer(moments)), quiet=True)

    return trained


def test_stages_of_the_same_settings_are_one_run_to_the_bit(tiny: RunConfig, tmp_path: Path) -> None:
    one = train(tiny, quiet=True)
    run = same_as_one_run(tiny, tmp_path / "stages")
    many = train(run, quiet=True)
    assert losses(many) == losses(one)
    assert_same_tensors(list_checkpoints(one)[-1], list_checkpoints(many)[-1])
    records = read_metrics(many)["train"]
    assert [record["stage"] for record in records] == [1] * 3 + [2] * 5
    assert [record["lr"] for record in records] == [record["lr"] for record in read_metrics(one)["train"]]
    tokens = [record["tokens"] for record in records]
    assert tokens == [record["tokens"] for record in read_metrics(one)["train"]]
    assert all(record["stage"] == 1 for record in read_metrics(many)["checkpoint"] if record["step"] <= 3)


def test_a_stage_has_its_own_settings_and_counts_on(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(staged(tiny, tmp_path / "run", LONGER))
    records = read_metrics(folder)["train"]
    assert [(r["step"], r["stage"]) for r in records] == [(n, 1 if n < 5 else 2) for n in range(1, 10)]
    assert [r["tokens"] for r in records] == [*(256 * n for n in range(1, 5)), *(1024 + 512 * n for n in range(1, 6))]
    assert records[4]["lr"] == pytest.approx(1e-3) and records[-1]["lr"] < 2e-4
    state = read_state(list_checkpoints(folder)[-1])
    assert state.step == 9 and state.stage is not None and state.cursor == 5 * 4
    said = capsys.readouterr().out
    assert "stage short (1 of 2): steps 1 to 4\n  name: quickstart\n" in said
    assert "stage long (2 of 2): steps 5 to 9, moments kept\n" in said
    assert "* model.rope_theta: 80000.0  (was 10000.0)\n" in said and "* training.seq_len: 128  (was 64)\n" in said
    assert "  model.d_model: 32\n" in said and said.index("stage long") > said.index("step      4/4")


def test_reset_begins_with_moments_of_none_and_kept_does_not(tiny: RunConfig, tmp_path: Path) -> None:
    flat = {"warmup_steps": 0}
    stages: Stages = [{"name": "a", "steps": 4}, {"name": "b", "steps": 4, "moments": "reset"}]
    reset = train(staged(tiny, tmp_path / "reset", stages, schedule=flat), quiet=True)
    kept = train(staged(tiny, tmp_path / "kept", [stages[0], {"name": "b", "steps": 4}], schedule=flat), quiet=True)
    assert losses(reset)[:5] == losses(kept)[:5] and losses(reset)[5] != losses(kept)[5]
    state = read_state(list_checkpoints(reset)[-1])
    assert (state.step, state.forgotten, state.updates) == (8, 4, 4)
    assert read_state(list_checkpoints(kept)[-1]).updates == 8
    # Adam's first step after a reset goes by the sign of the gradient alone: at most lr each, decay apart.
    run = staged(tiny, tmp_path / "one", [stages[0], {**stages[1], "steps": 1}], schedule=flat)
    before, after = (tensors(checkpoint) for checkpoint in list_checkpoints(train(run, quiet=True))[-2:])
    lr = read_metrics(tmp_path / "one")["train"][-1]["lr"]
    moved = max(
        ((after[name] - before[name] * (1 - 0.1 * lr)).abs().max().item())
        for name in before
        if name.startswith("model.blocks.0.mixer.wq")
    )
    assert moved == pytest.approx(lr, rel=1e-3)


class Killed(Exception):
    pass


def killed_at(
    monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None], engine: type[Any] = FSDP2Engine
) -> None:
    """`do` before the `step`-th step from now, once."""
    right, calls = engine.train_step, [0]

    def train_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            do()
        return right(self, *arguments, **keywords)

    monkeypatch.setattr(engine, "train_step", train_step)


def die() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("step", "moments"),
    [
        (3, "keep"),
        (5, "reset"),
        *(pytest.param(step, "keep", marks=pytest.mark.slow) for step in (4, 5, 6, 9)),
        *(pytest.param(step, "reset", marks=pytest.mark.slow) for step in (3, 4, 6, 9)),
    ],
)
def test_killed_in_any_stage_it_goes_on_to_the_bit(
    tiny: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[str], Path],
    step: int,
    moments: str,
) -> None:
    run = staged(tiny, tmp_path / "killed", longer(moments))
    killed_at(monkeypatch, step, die)
    with pytest.raises(Killed):
        train(run, quiet=True)
    monkeypatch.undo()
    train(run, quiet=True)
    assert losses(tmp_path / "killed") == losses(whole(moments))
    assert_same_tensors(list_checkpoints(whole(moments))[-1], list_checkpoints(tmp_path / "killed")[-1])


@pytest.mark.parametrize(("step", "saved"), [(4, 4), (5, 6)])
def test_asked_to_stop_at_the_seam_it_saves_and_goes_on(
    tiny: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[str], Path],
    step: int,
    saved: int,
) -> None:
    """In the last step of a stage its evaluation is put off, and the next stage does not begin."""
    run = staged(tiny, tmp_path / "asked", LONGER)
    killed_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Requeue) as asked:
        train(run, quiet=True)
    assert asked.value.code == 75
    monkeypatch.undo()
    assert read_state(list_checkpoints(tmp_path / "asked")[-1]).step == saved
    train(run, quiet=True)
    assert losses(tmp_path / "asked") == losses(whole("keep"))
    evaluated = [
        [(record["step"], record["validation_loss"]) for record in read_metrics(folder)["evaluation"]]
        for folder in (whole("keep"), tmp_path / "asked")
    ]
    assert evaluated[0] == evaluated[1]


def test_an_evaluation_put_off_before_another_layout_is_done_once(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Path]
) -> None:
    run = staged(tiny, tmp_path / "run", [LONGER[0], {**LONGER[1], "engine": {"activation_checkpointing": True}}])
    killed_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Requeue):
        train(run, quiet=True)
    monkeypatch.undo()
    assert stage_to_train(run, tmp_path / "run").number == 1
    with pytest.raises(NextStage):
        train(run, quiet=True)
    assert stage_to_train(run, tmp_path / "run").number == 2
    train(run, quiet=True)
    assert losses(tmp_path / "run") == losses(whole("keep"))
    evaluated = [record["step"] for record in read_metrics(tmp_path / "run")["evaluation"]]
    assert evaluated == [record["step"] for record in read_metrics(whole("keep"))["evaluation"]]


def test_what_a_later_stage_evaluates_is_looked_at_before_the_first(tiny: RunConfig, tmp_path: Path) -> None:
    retrieval = {"every": 2, "lengths": [32]}
    run = staged(tiny, tmp_path / "run", [LONGER[0], {**LONGER[1], "evaluation": {"retrieval": retrieval}}])
    with pytest.raises(UserError, match=r"stage \w+: .*in 32 tokens there is no room"):
        train(run, quiet=True)
    assert not list_checkpoints(tmp_path / "run")


def test_a_damaged_end_of_a_stage_is_done_again(tiny: RunConfig, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    run = staged(tiny, tmp_path / "run", LONGER, training={"keep_last": 9})
    train(run, quiet=True)
    for checkpoint in list_checkpoints(tmp_path / "run"):
        if int(checkpoint.name[-1]) > 4:
            shutil.rmtree(checkpoint)
    torn = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    assert torn.parent.name.endswith("4")
    torn.write_bytes(torn.read_bytes()[:20])
    assert stage_to_train(run, tmp_path / "run").name == "long"
    train(run, quiet=True)
    assert losses(tmp_path / "run") == losses(whole("keep"))


def test_another_layout_ends_in_a_checkpoint_and_an_exit_code(
    tiny: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: Callable[[str], Path]
) -> None:
    stages: Stages = [LONGER[0], {**LONGER[1], "engine": {"activation_checkpointing": True}}]
    run = staged(tiny, tmp_path / "run", stages)
    with pytest.raises(NextStage) as ended:
        train(run)
    assert not list((tmp_path / "run" / "heartbeats").glob("*"))  # nothing failed
    assert ended.value.code == 76 and len(losses(tmp_path / "run")) == 4
    assert "stage long wants another layout" in capsys.readouterr().out
    assert stage_to_train(run, tmp_path / "run").name == "long"
    train(run, quiet=True)  # as another process would
    assert losses(tmp_path / "run") == losses(whole("keep"))


def test_a_run_goes_on_as_the_first_stage_of_another(tiny: RunConfig, tmp_path: Path) -> None:
    """start.resume: the steps behind it are the first stage's, and must have been done as that says."""
    straight = train(same_as_one_run(tiny, tmp_path / "straight"), quiet=True)
    first = tiny.model_dump()
    first["training"]["steps"], first["schedule"]["end_step"] = 3, 8
    first["output_dir"] = str(tmp_path / "first")
    source = train(RunConfig.model_validate(first), quiet=True)
    start = {"resume": str(source)}
    stages: Stages = [{"name": "a", "steps": 3}, {"name": "b", "steps": 5}]
    schedule = {"first_step": 0, "end_step": 8}
    run = staged(tiny, tmp_path / "branch", stages, start=start, schedule=schedule)
    with pytest.raises(UserError, match=r"started with schedule\.first_step=None, the config now says 0"):
        train(run, quiet=True)
    stage = {**stages[1], "schedule": {"first_step": 0}}
    run = staged(tiny, tmp_path / "branch", [stages[0], stage], start=start, schedule={"end_step": 8})
    train(run, quiet=True)
    assert losses(tmp_path / "branch") == losses(straight)[3:]


def test_stages_begin_with_another_run_s_weights(tiny: RunConfig, tmp_path: Path) -> None:
    source = list_checkpoints(train(tiny, quiet=True))[-1]
    stages: Stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "model": {"rope_theta": 5e5}}]
    run = staged(tiny, tmp_path / "stages", stages, start={"weights": str(source)}, schedule={"warmup_steps": 0})
    folder = train(run, quiet=True)
    assert read_state(list_checkpoints(folder)[-1]).step == 2
    assert not torch.equal(*(tensors(c)["model.embed.weight"] for c in list_checkpoints(folder)))


def test_changed_stages_do_not_go_on_unseen(tiny: RunConfig, tmp_path: Path) -> None:
    train(staged(tiny, tmp_path / "run", LONGER), quiet=True)

    def refused(said: str, *stages: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=said) as error:
            train(staged(tiny, tmp_path / "run", list(stages)), quiet=True)
        assert "\n" not in str(error.value)

    refused(r"stages\.long\.moments='keep', .* 'reset'", LONGER[0], {**LONGER[1], "moments": "reset"})
    refused(r"stages\.short\.training\.steps=4, .* 5", {**LONGER[0], "steps": 5}, LONGER[1])
    refused(r"stages=\['short', 'long'\], .* \['short'\]", LONGER[0])
    more = staged(tiny, tmp_path / "run", [*LONGER, {**LONGER[1], "name": "more", "steps": 1}])
    train(more, accept_changes=True, quiet=True)
    assert losses(tmp_path / "run")[-1][0] == 10


def test_a_step_of_any_stage_is_shown_as_it_was_served(tiny: RunConfig, tmp_path: Path) -> None:
    run = staged(tiny, tmp_path / "run", LONGER, training={"keep_last": 9})
    train(run, quiet=True)
    assert all(served_in(run, step).checked for step in range(1, 10))
    for checkpoint in list_checkpoints(tmp_path / "run")[-2:]:
        shutil.rmtree(checkpoint)
    assert served_in(run, 9).checked  # from where the stage before ended


def test_a_later_stage_that_cannot_begin_is_said_at_once(tiny: RunConfig, tmp_path: Path) -> None:
    absent = {"data": {"folder": str(tmp_path / "nowhere")}}
    run = staged(tiny, tmp_path / "run", [LONGER[0], {"name": "b", "steps": 2, **absent}])
    with pytest.raises(UserError, match=r"stage b: .*nowhere"):
        train(run, quiet=True)
    assert list_checkpoints(tmp_path / "run") == []
    run = staged(tiny, tmp_path / "run", [LONGER[0], {"name": "b", "steps": 2, "parallel": {"tp": 3}}])
    with pytest.raises(UserError, match=r"stage b: .*tp 3"):
        train(run, quiet=True)


def test_a_later_stage_that_reads_too_much_is_said_at_once(tiny: RunConfig, tmp_path: Path) -> None:
    """Counted from what the stages before will have left."""
    source = {"folder": tiny.data.folder, "weight": 1}
    epoch = open_loader(tiny, open_data(tiny)).windows_per_epoch // tiny.training.global_batch_windows

    def check(most: float) -> None:
        second = {"name": "b", "steps": 2, "data": {"mixture": {"ours": {"max_epochs": most}}}}
        plain = tiny.model_copy(update={"data": DataConfig(mixture={"ours": source})})
        run = staged(plain, tmp_path / "run", [{"name": "a", "steps": epoch}, second])
        check_stages(run, first=run.stages[0], dp_size=1)

    with pytest.raises(UserError, match=r"stage b: data\.mixture\.ours: 1\.\d\d epochs are planned"):
        check(1.0)
    check(1.5)


@pytest.mark.slow
def test_deepspeed_trains_one_stage_after_another(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Path]
) -> None:
    """Its second engine in one process; killed in the second stage, it goes on to the bit."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it
    zero = {"kind": "deepspeed", "zero_stage": 1}
    straight = train(staged(tiny, tmp_path / "straight", longer("reset"), engine=zero), quiet=True)
    for ours, theirs in zip(losses(straight), losses(whole("reset")), strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=2e-5) and ours[3] == theirs[3]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 8, die, DeepSpeedEngine)
        train(staged(tiny, tmp_path / "killed", longer("reset"), engine=zero), quiet=True)
    train(staged(tiny, tmp_path / "killed", longer("reset"), engine=zero), quiet=True)
    assert losses(tmp_path / "killed") == losses(straight)
