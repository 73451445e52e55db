"""Training on one process: resumes to the bit, survives kills, refuses what does not fit, learns."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sisa_dist
from data_pipeline.loader import Batch
from data_pipeline.tokenizer import Tokenizer
from runs import assert_same_tensors, losses
from sisa_dist.checkpoint import list_checkpoints, load_weights, read_state
from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.engine import build_engine
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train


def changed(config: RunConfig, **sections: dict) -> RunConfig:
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def test_resume_equals_an_unbroken_run_to_the_bit(tiny: RunConfig, tmp_path: Path) -> None:
    straight = tiny.model_copy(update={"output_dir": str(tmp_path / "straight")})
    train(straight, quiet=True)
    # Stops after 6 of 8 steps (the last checkpoint is at 6), as a kill between two steps would.
    crashing = _CrashAt(7)
    with pytest.raises(KeyboardInterrupt), crashing:
        train(tiny, quiet=True)
    run = Path(tiny.output_dir)
    assert [read_state(c).step for c in list_checkpoints(run)] == [3, 6]
    train(tiny, quiet=True)
    assert losses(run) == losses(Path(straight.output_dir))
    assert [step for step, *_ in losses(run)] == list(range(1, 9))
    assert_same_tensors(list_checkpoints(run)[-1], list_checkpoints(Path(straight.output_dir))[-1])
    metrics = read_metrics(run)
    assert metrics["evaluation"][-1]["validation_loss"] < metrics["train"][0]["loss"]
    assert len(metrics["layers"][-1]["lambda"]) == 2 and 50 < metrics["layers"][-1]["half_life"][0] < 200


class _CrashAt:
    """Interrupts the run at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> None:
        from sisa_dist.engine.fsdp import FSDP2Engine

        self.real, calls = FSDP2Engine.train_step, 0

        def train_step(engine: FSDP2Engine, *args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == self.step:
                raise KeyboardInterrupt
            return self.real(engine, *args, **kwargs)  # type: ignore[arg-type]

        FSDP2Engine.train_step = train_step  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        from sisa_dist.engine.fsdp import FSDP2Engine

        FSDP2Engine.train_step = self.real  # type: ignore[method-assign]


def _killed_runs(config: RunConfig, folder: Path, kills: int, seed: int) -> None:
    path = folder / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sisa_dist.cli", "train", str(path)]
    rng = random.Random(seed)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    for _ in range(kills):
        before = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_size > before:
                break
            time.sleep(0.01)
        # From the first step on, at any moment: inside steps, evaluations and saves alike.
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for checkpoint in list_checkpoints(Path(config.output_dir)):
            sisa_dist.load_model(checkpoint)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_nothing(tiny: RunConfig, tmp_path: Path, kills: int) -> None:
    config = changed(tiny, training={"steps": 12 * kills, "checkpoint_every": 2, "eval_every": 7})
    straight = config.model_copy(update={"output_dir": str(tmp_path / "straight")})
    train(straight, quiet=True)
    _killed_runs(config, tmp_path, kills, seed=kills)
    assert [row[0] for row in losses(Path(config.output_dir))] == list(range(1, 12 * kills + 1))
    assert losses(Path(config.output_dir)) == losses(Path(straight.output_dir))
    assert_same_tensors(list_checkpoints(Path(config.output_dir))[-1], list_checkpoints(Path(straight.output_dir))[-1])


def test_two_at_once_in_one_run_folder_are_refused_and_a_kill_frees_it(tiny: RunConfig, tmp_path: Path) -> None:
    config = changed(tiny, training={"steps": 100_000})
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "sisa_dist.cli", "train", str(tmp_path / "run.yaml")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert first.stdout is not None and "step" in first.stdout.readline()
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        first.kill()
        first.wait()
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "another process is training in this run folder" in second.stderr
    train(tiny, accept_changes=True, quiet=True)
    assert not (Path(tiny.output_dir) / ".lock").exists()


def test_a_half_written_checkpoint_is_never_seen(tiny: RunConfig) -> None:
    run = Path(tiny.output_dir)
    (run / "checkpoints" / ".step_00000099.tmp").mkdir(parents=True)
    assert list_checkpoints(run) == []
    train(tiny, quiet=True)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


def test_a_save_removes_what_a_kill_left_and_nothing_else(tiny: RunConfig) -> None:
    folder = Path(tiny.output_dir) / "checkpoints"
    for stale in (".step_00000099.tmp", ".step_00000097.old"):
        (folder / stale / "inside").mkdir(parents=True)
    (folder / ".DS_Store").write_bytes(b"Finder")
    (folder / ".nfs0001").mkdir()
    train(tiny, quiet=True)
    assert sorted(p.name for p in folder.iterdir()) == [".DS_Store", ".nfs0001", "step_00000006", "step_00000008"]


def test_a_metrics_line_cut_by_a_kill_is_dropped_on_resume(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    metrics = Path(tiny.output_dir) / "metrics.jsonl"
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    train(changed(tiny, training={"steps": 10}), accept_changes=True, quiet=True)
    assert [row[0] for row in losses(Path(tiny.output_dir))] == list(range(1, 11))


def test_the_metrics_of_one_folder_are_of_one_run(tiny: RunConfig) -> None:
    """A run whose checkpoints were removed starts anew, and so does its metrics.jsonl."""
    run = train(tiny, quiet=True)
    shutil.rmtree(run / "checkpoints")
    train(changed(tiny, optimizer={"lr": 1e-3}, training={"steps": 3}), quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["step"], r["lr"] <= 1e-3) for r in lines if r["kind"] == "train"] == [(1, True), (2, True), (3, True)]
    assert {r["step"] for r in lines} == {1, 2, 3}


def test_accumulation_and_micro_batches_change_nothing_but_rounding(tiny: RunConfig, tmp_path: Path) -> None:
    one = changed(tiny, training={"micro_batch_size": 4, "steps": 4})
    four = changed(tiny, training={"micro_batch_size": 1, "steps": 4}).model_copy(
        update={"output_dir": str(tmp_path / "four")}
    )
    for config in (one, four):
        train(config, quiet=True)
    for a, b in zip(losses(Path(one.output_dir)), losses(Path(four.output_dir)), strict=True):
        assert a[0] == b[0] and a[3] == b[3]
        assert abs(a[1] - b[1]) < 1e-5 and abs(a[2] - b[2]) < 1e-4 * a[2]


def test_unequal_valid_tokens_are_divided_once(tiny: RunConfig) -> None:
    """A micro-batch with few labels weighs by its tokens, not as much as a full one."""
    tokens = torch.randint(0, 290, (4, 32))
    labels = torch.randint(0, 290, (4, 32))
    labels[2:, 3:] = -100

    def norm(parts: list[slice]) -> tuple[float, float, int]:
        engine = build_engine(tiny, init_mesh(tiny.parallel, device="cpu"))
        result = engine.train_step([Batch(tokens[p], labels[p], None) for p in parts], 1e-3)
        return result.loss, result.grad_norm, result.tokens

    whole, split = norm([slice(0, 4)]), norm([slice(0, 2), slice(2, 4)])
    assert whole[2] == split[2] == 70
    assert split == pytest.approx(whole, rel=1e-5)


def test_bf16_keeps_fp32_masters_and_fp32_in_forward(tiny: RunConfig) -> None:
    config = changed(tiny, engine={"precision": "bf16"})
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    assert {t.dtype for t in engine.state_tensors().values()} == {torch.float32}
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in engine.model.named_modules():  # type: ignore[attr-defined]
        own = [p for p, _ in module.named_parameters(recurse=False)]
        if own:

            def hook(module: torch.nn.Module, inputs: object, own: list = own, name: str = name) -> None:
                seen.setdefault(name, set()).update(getattr(module, p).dtype for p in own)

            module.register_forward_pre_hook(hook)
    residual: set[torch.dtype] = set()
    for block in engine.model.blocks:  # type: ignore[attr-defined]
        block.register_forward_hook(lambda m, i, out: residual.add(out.dtype))
    tokens = torch.randint(0, 290, (2, 32))
    before = {n: t.clone() for n, t in engine.state_tensors().items() if n.endswith(("decay.bias", "lambda_raw"))}
    engine.train_step([Batch(tokens, tokens, None)], 6e-4)
    assert residual == {torch.bfloat16}
    exact = ("norm1", "norm2", "norm", "decay", "importance")
    for name, dtypes in seen.items():
        assert dtypes == {torch.float32 if name.split(".")[-1] in exact else torch.bfloat16}, name
    assert len(seen) >= 20
    # The parameters that a pure bf16 run never moves do move.
    for name, old in before.items():
        if name.startswith("model."):
            assert not torch.equal(engine.state_tensors()[name].full_tensor(), old.full_tensor()), name  # type: ignore


def test_optimizer_groups_are_the_papers(tiny: RunConfig) -> None:
    engine = build_engine(tiny, init_mesh(tiny.parallel, device="cpu"))
    names = {id(p): n for n, p in engine.model.named_parameters()}  # type: ignore[attr-defined]
    groups = {
        names[id(p)]: (group["weight_decay"], group["lr_ratio"])
        for group in engine.optimizer.param_groups  # type: ignore[attr-defined]
        for p in group["params"]
    }
    assert groups.keys() == set(names.values())
    assert groups["blocks.0.mixer.importance.lambda_raw"] == (0.0, 0.1)
    assert groups["blocks.0.mixer.decay.bias"] == groups["blocks.1.norm1.weight"] == groups["norm.weight"] == (0.0, 1.0)
    assert groups["blocks.0.mixer.decay.weight"] == groups["embed.weight"] == (0.1, 1.0)


def test_biases_and_gains_of_other_blocks_are_not_decayed(tiny: RunConfig) -> None:
    config = changed(tiny, model={"norm": "layernorm", "mlp": "gelu", "attention_bias": "all", "mlp_bias": True})
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    decayed = {
        id(p)
        for group in engine.optimizer.param_groups  # type: ignore[attr-defined]
        for p in group["params"]
        if group["weight_decay"]
    }
    for name, parameter in engine.model.named_parameters():  # type: ignore[attr-defined]
        assert (id(parameter) in decayed) == (parameter.ndim == 2), name


def test_a_changed_config_or_data_set_does_not_continue_a_run(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    longer = changed(tiny, training={"steps": 10})
    with pytest.raises(UserError, match=r"training\.steps=8, the config now says 10"):
        train(longer, quiet=True)
    with pytest.raises(UserError, match=r"model\.d_s=8"):
        train(changed(tiny, model={"d_s": 16}), quiet=True)
    train(longer, accept_changes=True, quiet=True)
    assert read_state(list_checkpoints(Path(tiny.output_dir))[-1]).step == 10
    reseeded = tiny.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="not the data"):
        train(changed(reseeded, training={"steps": 12}), accept_changes=True, quiet=True)


def test_another_models_checkpoint_is_refused(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    other = changed(tiny, model={"d_s": 16})
    mesh, tokenizer = init_mesh(other.parallel, device="cpu"), Tokenizer.load(checkpoint / "tokenizer.model")
    with pytest.raises(UserError, match=r"another model: its model\.d_s is 8, the config says 16"):
        load_weights(checkpoint, build_engine(other, mesh), model=other.model, tokenizer=tokenizer, mesh=mesh)


def test_load_model_scores_and_generates(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    model, tokenizer = sisa_dist.load_model(tiny.output_dir)
    mesh = init_mesh(tiny.parallel, device="cpu")
    engine = build_engine(tiny, mesh)
    newest = list_checkpoints(Path(tiny.output_dir))[-1]
    load_weights(newest, engine, model=tiny.model, tokenizer=tokenizer, mesh=mesh)
    ids = torch.tensor([tokenizer.encode("from __future__ import annotations\n")])
    labels = torch.cat((ids[:, 1:], torch.full((1, 1), -100)), 1)
    expected, _ = engine.score(ids, labels)
    got = model(ids).log_softmax(-1)[:, :-1].gather(2, labels[:, :-1, None])[..., 0]
    torch.testing.assert_close(got, expected[:, :-1], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="no checkpoint here"):
        sisa_dist.load_model(Path(tiny.output_dir) / "absent")


def test_diverged_training_stops_and_saves_nothing(tiny: RunConfig) -> None:
    ruin = {"optimizer": {"lr": 1e30, "grad_clip": None}, "schedule": {"warmup_steps": 0}}
    config = changed(tiny, **ruin, training={"max_skipped_steps": 3})
    with pytest.raises(UserError, match=r"diverged .*; lower optimizer\.lr and run again, it starts anew"):
        train(config, quiet=True)
    assert list_checkpoints(Path(tiny.output_dir)) == []
    train(changed(tiny, training={"steps": 3}), quiet=True)  # what the message advises
    with pytest.raises(UserError, match=r"run with --accept-changes, it resumes from step_00000003"):
        train(config, accept_changes=True, quiet=True)
    train(tiny, accept_changes=True, quiet=True)
    assert read_state(list_checkpoints(Path(tiny.output_dir))[-1]).step == 8
    model, _ = sisa_dist.load_model(tiny.output_dir)
    assert all(torch.isfinite(p).all() for p in model.parameters())
