"""A comparison of two tiny systems, end to end; killed and run again; what its checks and its page say."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare
import compare_pool
import compare_run
import pytest
import torch
from compare_plan import Comparison, load_bases
from compare_results import check
from compare_run import is_done
from compare_systems import TOLERANCE, VARIANTS, choose, match, missing, parameters, systems
from compare_task import accuracy_of, make_task, train_task
from rich.console import Console

from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import RunConfig, UserError
from sisa_dist.config.mixers import MIXER_NAMES
from sisa_dist.engine import build_engine
from sisa_dist.evaluation.harness import write_results
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.signals import Requeue

TEXTS = sorted((Path(__file__).parents[2] / "data_pipeline").glob("*.py"))[:20]
MODEL = ("d_model=32", "n_layers=2", "n_heads=2", "d_ff=80")
TINY = [f"{task}.model.{key}" for task in ("text", "recall", "parity") for key in MODEL]
TINY += [
    "text.model.vocab_size=400",
    "text.data.validation_fraction=0.3",
    "text.data.workers=1",
    "text.training.seq_len=128",
    "text.training.micro_batch_size=2",
    "text.training.global_batch_tokens=256",
    "text.evaluation.niah_items=3",
    "text.evaluation.niah_context=96",
    "text.evaluation.perplexity_windows=6",
    "text.training.eval_windows=2",
    "recall.training.seq_len=12",
    "recall.training.micro_batch_size=8",
    "parity.training.micro_batch_size=8",
    "recall.training.global_batch_tokens=96",
    "parity.training.seq_len=8",
    "parity.training.global_batch_tokens=64",
]
STEPS = {"steps": 4, "eval_every": 2, "checkpoint_every": 2}
TINY += [f"{task}.training.{key}={value}" for task in ("text", "recall", "parity") for key, value in STEPS.items()]
TINY += [f"{task}.schedule.warmup_steps=1" for task in ("text", "recall", "parity")]
TINY += [
    "text.training.keep_every=2",
    "text.schedule.decay_steps=1",
    "recall.schedule.decay_steps=1",
    "parity.schedule.decay_steps=1",
]
SETTINGS = [f"--set={override}" for override in TINY]
TASKS = ["text", "recall", "parity"]


def tiny_bases(folder: Path) -> dict[str, RunConfig]:
    return load_bases(TASKS, TINY, text=None, folder=folder, scale=1.0)


def contents(out: Path) -> dict[str, Any]:
    return json.loads((out / "comparison.json").read_text(encoding="utf-8"))


def test_end_to_end_killed_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, blimp, lambada = tmp_path / "out", tmp_path / "blimp", tmp_path / "lambada.jsonl"
    blimp.mkdir()
    (blimp / "a.jsonl").write_text('{"sentence_good": "He is.", "sentence_bad": "He are it."}\n' * 3, encoding="utf-8")
    lambada.write_text('{"text": "the end of a line"}\n{"text": "a row of a table"}\n', encoding="utf-8")
    command = ["--systems", "attention,sisa", "--seeds", "1", "--jobs", "1", "--out", str(out), *SETTINGS]
    for path in TEXTS:
        (tmp_path / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    command += ["--text", str(tmp_path / "*.txt")]
    trained: list[str] = []
    real = compare_run.execute

    def execute(folder: Path) -> None:
        measuring = "measured" in folder.parts
        if not measuring and len(trained) == 3:
            raise KeyboardInterrupt
        real(folder)
        trained.extend([] if measuring else [str(folder.relative_to(out))])

    monkeypatch.setattr(compare_pool, "execute", execute)
    assert compare.main(command) == 130
    first = list(trained)
    assert first == ["text/attention/seed0", "text/sisa/seed0", "recall/attention/seed0"]
    assert "6 of 6 runs are left" in capsys.readouterr().out
    before = {name: (out / name / "result.json").read_bytes() for name in first}

    trained.clear()
    monkeypatch.setattr(compare_pool, "execute", lambda folder: (real(folder), trained.append(folder.name)))
    assert compare.main(command) == 0
    assert "3 of 6 runs are left" in capsys.readouterr().out and len(trained) == 3
    assert before == {name: (out / name / "result.json").read_bytes() for name in first}

    # An evaluation that was not asked for then: no step is done again, only its own figures come in.
    more = [*command, "--blimp", str(blimp), "--lambada", str(lambada)]
    assert compare.main(more) == 0
    assert "2 of 6 runs are left" in capsys.readouterr().out
    for name in first[:2]:
        result, old = json.loads((out / name / "result.json").read_bytes()), json.loads(before[name])
        assert result.pop("asked")["lambada"]["path"] == str(lambada) and old.pop("asked")["lambada"]["path"] is None
        assert len(result.pop("lambada")["hits"]) == 2 and len(result.pop("blimp")["hits"]) == 3
        assert result == old and [found["step"] for found in old["niah"]] == [2, 4]
        assert len(list_checkpoints(out / name)) == 1
    assert compare.main(more) == 0
    assert "0 of 6 runs are left" in capsys.readouterr().out

    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "http" not in page.replace("https://", "http")
    assert all(word in page for word in ("attention", "sisa", "undertrained", "held-out perplexity", "BLiMP, %"))
    found = contents(out)
    assert [len(found[task]) for task in TASKS] == [2, 2, 2]
    for task in TASKS:
        for row in found[task]:
            assert abs(row["excess"]) <= TOLERANCE and row["peak_bytes"] > 4 * 4 * row["parameters"]
            assert row["rank"] is None and row["undertrained"]  # after four steps nothing has converged
            for figure in row["figures"].values():
                assert figure["low"] <= figure["mean"] <= figure["high"]

    other = [argument.replace("text.training.steps=4", "text.training.steps=5") for argument in command]
    assert compare.main(other) == 2
    assert "begun with another training.steps (4, now 5)" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_beside_each_other_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of processes: this tree, not an installed one
    comparison = Comparison(tmp_path, tiny_bases(tmp_path), ["attention"], 2, [1.0], {})
    good, bad = (comparison.job("parity", "attention", seed, 1.0) for seed in (0, 1))
    small = bad.config.model_copy(update={"model": bad.config.model.model_copy(update={"vocab_size": 3})})
    bad = replace(bad, config=small)
    failed = compare_pool.run_jobs([bad, good], 2, Console(quiet=True), what="training")
    assert list(failed) == [bad] and "the task has 4 ids: set it (exit code 2, see" in failed[bad]
    assert good.done() and not bad.done()


def test_a_task_goes_on_inside_a_run(tmp_path: Path) -> None:
    """Asked to stop in the middle and begun again, it trains the same steps to the bit."""
    config = match(tiny_bases(tmp_path)["parity"], "sisa").config
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})

    def run(name: str) -> list[tuple[int, float]]:
        folder = tmp_path / name
        train_task(config.model_copy(update={"output_dir": str(folder)}), "parity", folder)
        metrics = read_metrics(folder)
        assert [record["step"] for record in metrics["evaluation"]] == [2, 4, 6, 8, 9]
        return [(record["step"], record["loss"]) for record in metrics["train"]]

    from sisa_dist.evaluation.parity import Parity

    batch = Parity.batch

    def stops(self: Parity, number: int, size: int, **named: Any) -> Any:
        if number == 4 and not named.get("held_out"):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, number, size, **named)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parity, "batch", stops)
        with pytest.raises(Requeue):
            run("stopped")
    signal.signal(signal.SIGTERM, before)  # a process that was asked to stop keeps the handler
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path / "stopped")][-1] == 5
    assert run("stopped") == run("whole")


def test_every_mixer_has_a_system_of_equal_size(tmp_path: Path) -> None:
    offered = systems()
    assert set(MIXER_NAMES) <= offered.keys()
    assert all(name in offered or missing(keys) for name, keys in VARIANTS.items())
    for task, base in load_bases(TASKS, [], text=None, folder=tmp_path, scale=1.0).items():
        for name in offered:
            found = match(base, name)
            assert parameters(found.config) == found.parameters, (task, name)
            without_mlp = "mlp" in offered[name]
            assert abs(found.excess) <= (0.1 if without_mlp else TOLERANCE), (task, name)
            model, seq_len = found.config.model, base.training.seq_len
            if "hymba" in model.layer_mixers:  # a window that hides something, and a layer that hides nothing
                windows = [model.window_of(layer) for layer in range(model.n_layers)]
                assert None in windows and min(w for w in windows if w is not None) < seq_len, task
            if "ssmax" in name:
                assert model.ssmax == seq_len
    jamba = match(base, "jamba").config.model
    assert jamba.layer_mixers == ["mamba", "attention"] and jamba.mamba_options.norms and not jamba.rotary_channels


def test_every_system_takes_a_step(tmp_path: Path) -> None:
    """At the sizes that are trained, and scores a sequence of twice the length."""
    base = load_bases(["recall"], [], text=None, folder=tmp_path, scale=1.0)["recall"]
    training = base.training.model_copy(update={"micro_batch_size": 2, "global_batch_tokens": 48})
    task = make_task("recall", training.seq_len)
    for name in systems():
        config = match(base, name).config.model_copy(update={"training": training})
        engine = build_engine(config, init_mesh(config.parallel, device=config.device))
        before = {key: tensor.clone() for key, tensor in engine.state_tensors().items()}
        result = engine.train_step([task.batch(0, 2, seed=0)], 1e-3)
        assert math.isfinite(result.loss) and result.grad_norm > 0 and not result.skipped, name
        moved = [key for key, tensor in engine.state_tensors().items() if not torch.equal(tensor, before[key])]
        assert moved, name
        (found,) = accuracy_of(engine, "recall", 2 * training.seq_len, sequences=1)
        assert 0 <= found <= 1, name


def test_names_that_are_not_there() -> None:
    assert choose(None, everything=False) == [
        name for name in ("attention", "mamba3", "fox", "sisa") if name in MIXER_NAMES
    ]
    assert choose(["sisa", "attention", "sisa"], everything=False) == ["sisa", "attention"]
    assert choose(None, everything=True) == list(systems())
    with pytest.raises(UserError, match="no transformer: choose of"):
        choose(["transformer"], everything=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "text,sums"], "no sums: choose of text, recall, parity"),
        (["--seeds", "0"], "--seeds 0"),
        (["--set", "training.steps=1"], "begins with a task"),
        (["--lambada", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--scale", "nan"], "--scale nan: give a number above 0"),
        (["--lambada-items", "0"], "--lambada-items 0"),
        (["--systems", ""], "--systems: names nothing"),
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (
            ["--set", "recall.training.seq_len=60", "--set", "recall.training.global_batch_tokens=3840"],
            "recall.training.seq_len 60: of twice the length",
        ),
        (["--set", "recall.model.mlp=none", "--tasks", "recall"], "leave model.mlp as it is"),
        (["--set", "recall.model.d_ff=1", "--tasks", "recall", "--systems", "sisa"], "raise model.d_ff"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_an_evaluation_of_other_items_is_made_again(tmp_path: Path) -> None:
    asked = {"lambada": {"path": "a.jsonl", "items": 300}, "blimp": {"path": None, "items": 10}}
    write_results(tmp_path / "result.json", {"lambada": {"hits": [1]}, "asked": asked})
    assert is_done(tmp_path, asked)
    for change in ({"items": 5000}, {"path": "b.jsonl"}):
        assert not is_done(tmp_path, asked | {"lambada": asked["lambada"] | change})
    (tmp_path / "result.json").write_text('{"lambada"')
    assert not is_done(tmp_path, asked)


def test_the_same_factor_twice_is_one_run() -> None:
    assert compare._parser().parse_args(["--lr", "1,1.0,0.5"]).lr == [1.0, 0.5]
    with pytest.raises(SystemExit):
        compare._parser().parse_args(["--lr", "abc"])


def test_learning_rates_are_runs_of_their_own(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, tiny_bases(tmp_path), ["sisa"], 2, [1.0, 0.5], {})
    jobs = comparison.jobs()
    assert len(jobs) == len({job.folder for job in jobs}) == 2 * 2 * 3
    peaks = {(job.task, job.config.optimizer.lr) for job in jobs}
    assert peaks == {("text", 3e-3), ("text", 1.5e-3)} | {(t, lr) for t in TASKS[1:] for lr in (2e-3, 1e-3)}
    assert all(job.config.seed == job.seed for job in jobs)
    scaled = load_bases(["recall"], [], text=None, folder=tmp_path, scale=0.1)["recall"]
    whole = load_bases(["recall"], [], text=None, folder=tmp_path, scale=1.0)["recall"]
    assert scaled.training.steps == whole.training.steps // 10
    assert scaled.schedule.decay_steps == (whole.schedule.decay_steps or 0) // 10


def metrics(accuracies: list[float], *, skipped: int = 0) -> dict[str, Any]:
    steps = [{"step": step, "skipped": step <= skipped} for step in range(1, 101)]
    every = 100 // len(accuracies)
    found = [{"step": every * (n + 1), "accuracy": a, "validation_loss": a} for n, a in enumerate(accuracies)]
    return {"train": steps, "evaluation": found}


def test_the_convergence_check(tmp_path: Path) -> None:
    # Full rate until step 80: it is level from 64 to 80, or not.
    of_100 = [f"{task}.training.steps=100" for task in TASKS] + [
        "parity.schedule.decay_steps=20",
        "text.schedule.decay_steps=20",
    ]
    bases = load_bases(TASKS, [*TINY, *of_100], text=None, folder=tmp_path, scale=1.0)

    def of_parity(curve: list[float], last: float, **named: Any) -> str:
        return check("parity", bases["parity"], metrics(curve, **named), {"accuracies": [last, last]})

    rising = [0.1 * n for n in range(1, 11)]
    assert of_parity(rising, 0.95) == ""
    assert "still moved by +0.2" in of_parity(rising, 0.85)
    assert of_parity([0.7] * 10, 0.72) == ""
    assert "is that of chance (0.50)" in of_parity([0.5] * 10, 0.51)
    assert "2% of its steps were skipped" in of_parity(rising, 0.95, skipped=2)

    def of_text(curve: list[float], last: float) -> str:
        result = {"losses": [last, 9.0], "tokens": [10, 0], "unigram_perplexity": 100.0}
        return check("text", bases["text"], metrics(curve), result)

    assert of_text([5.0] * 5 + [4.0, 3.9, 3.9, 3.0, 2.5], 2.5) == ""  # what falls with the rate does not count
    assert "still fell by 0.50" in of_text([5.0] * 5 + [4.0, 4.0, 3.5, 3.0, 2.5], 2.5)
    assert "not below the unigram baseline's 4.61" in of_text([4.7] * 10, 4.7)
