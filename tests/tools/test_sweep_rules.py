"""From a grid to its runs: parameters, budgets, laws, names, hashes; what does not fit; the plan; the next runs."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import ds_grid
import pandas
import pytest
import run_sweep
from equal_parameters import parameters
from sweep_grid import load_grid
from sweep_next import size_of
from sweep_plan import scored_tokens
from sweep_results import write_tables
from sweep_rules import SweepRun, config_hash, make_runs
from sweeps import SIZES, tree, write

from sisa_dist.config import dump_config, parse_config
from sisa_dist.model.flops import training_flops_per_token

ROOT = Path(__file__).parents[2]
SCALING = ROOT / "configs" / "scaling"


def runs_of(tmp_path: Path, **over: Any) -> list[SweepRun]:
    return make_runs(load_grid(write(tmp_path, tree(tmp_path / "out", **over))))


def block(**keys: Any) -> dict[str, Any]:
    return {"name": "all", "mixers": ["attention", "sisa"], "d_s": [8], "tokens": [2048]} | keys


@pytest.mark.parametrize("name", ["laptop", "1b"])
def test_the_grids_that_come_with_it(name: str) -> None:
    """Every mixer and d_s of a size has its parameters to 0.5 %, and the sizes are what the files say."""
    grid = load_grid(SCALING / f"{name}.yaml")
    runs = make_runs(grid)
    assert len(runs) >= 24 and len({run.name for run in runs}) == len({run.config_hash for run in runs}) == len(runs)
    sizes: dict[str, set[int]] = {}
    for run in runs:
        sizes.setdefault(run.shape.size, set()).add(run.shape.parameters)
    for run in (runs[0], runs[-1]):
        assert parameters(run.config) == run.shape.parameters
    assert sizes.keys() == grid.sizes.keys() and all(max(found) / min(found) < 1.005 for found in sizes.values())
    budgets = {size: {round(math.log(r.tokens), 1) for r in runs if r.shape.size == size} for size in sizes}
    assert sum(len(found) >= 3 for found in budgets.values()) >= 4
    assert {(run.shape.mixer, run.shape.d_s) for run in runs} > {("attention", None), ("sisa", 8), ("sisa", 16)}
    assert max(run.shape.parameters_non_embedding for run in runs) > {"laptop": 1.4e6, "1b": 2.5e9}[name]
    # At one size and budget nothing but the mixer and d_s differs.
    same: dict[tuple[str, str], set[tuple[float, int]]] = {}
    for run in runs:
        training = run.config.training
        at = run.shape.size, run.name.split("_")[-2]
        same.setdefault(at, set()).add((run.config.optimizer.lr, training.global_batch_tokens))
        assert run.config.model.d_ff % grid.d_ff_multiple == 0
    assert all(len(found) == 1 for found in same.values())
    if name == "laptop":
        assert sum(run.flops for run in runs) == pytest.approx(1.252e14, rel=1e-3)


def test_a_d_s_sweep_of_the_paper_is_ds_grids(tmp_path: Path) -> None:
    sizes = {"50m": {"d_model": 512, "n_layers": 6, "n_heads": 8, "d_ff": 2048}}
    base = {"model": {"vocab_size": 50277, "vocab_multiple": 1}, "training": {"seq_len": 2048, "micro_batch_size": 8}}
    points = ds_grid.POINTS["50m"]
    asked = block(mixers=["sisa"], d_s=points, tokens_per_parameter=[20])
    del asked["tokens"]
    for run, d_s in zip(runs_of(tmp_path, sizes=sizes, base=base, batch=524288, grids=[asked]), points, strict=True):
        found, theirs = run.config.model, ds_grid.point("50m", d_s, [], tmp_path).config.model
        assert (found.d_ff, found.layer_d_s) == (theirs.d_ff, theirs.layer_d_s)
        assert found.model_dump(exclude={"d_s"}) == theirs.model_dump(exclude={"d_s"})
        assert run.tokens == round(20 * run.shape.parameters / 524288) * 524288


def test_budgets_laws_and_fractions(tmp_path: Path) -> None:
    grids = [block(tokens=[1e4, 1e5]), {"mixers": ["sisa"], "d_s": [8, 12], "flops": [1e10], "seeds": [0, 3]}]
    grids.append({"mixers": ["attention"], "tokens_per_parameter": [2], "lr": [1e-3, 2e-3], "batch": [512]})
    laws = {
        "lr": {"coefficient": 2.0, "parameters": -0.5, "at_most": 9e-3},
        "batch": {"coefficient": 0.05, "tokens": 0.9},
    }
    runs = {run.name: run for run in runs_of(tmp_path, grids=grids, warmup=0.1, count="non_embedding", **laws)}
    assert len(runs) == 4 + 4 + 2
    short, long = runs["a_attention_t1e4_s0"], runs["a_sisa_ds8_t1e5_s0"]
    assert short.config.training.global_batch_tokens == 256  # of 199, the nearest multiple of 2 windows of 64
    assert long.config.training.global_batch_tokens == 1536 and long.config.training.steps == 65
    assert short.config.optimizer.lr == pytest.approx(9e-3)
    assert long.config.schedule.warmup_steps == 6 and long.config.training.eval_every == 33
    slices = [run for name, run in runs.items() if "_c1e10_" in name]
    assert {(run.shape.d_s, run.config.seed) for run in slices} == {(8, 0), (8, 3), (12, 0), (12, 3)}
    for run in slices:
        assert run.flops == pytest.approx(1e10, rel=0.2) and run.shape.flops_per_token == training_flops_per_token(
            run.config.model, 64
        )
    twice = runs["a_attention_2x_lr0.001_b512_s0"]
    assert twice.shape.parameters_non_embedding == twice.shape.parameters - 512 * 32
    assert twice.tokens == round(2 * twice.shape.parameters_non_embedding / 512) * 512
    assert scored_tokens(twice.config) == (2 * 2 + 6) * 64


def test_what_two_blocks_ask_for_is_one_run(tmp_path: Path) -> None:
    assert len(runs_of(tmp_path, grids=[block(), block(name="again", tokens=[2048, 4096])])) == 4


def test_the_hash_is_of_what_alters_the_result(tmp_path: Path) -> None:
    (run, _) = runs_of(tmp_path)

    def with_keys(section: str, **keys: Any) -> str:
        content = run.config.model_dump()
        content[section] |= keys
        return config_hash(parse_config(content, source="test"))

    assert with_keys("training", checkpoint_every=1) == run.config_hash == with_keys("data", folder="elsewhere")
    others = [
        with_keys("optimizer", lr=2e-3),
        with_keys("model", d_ff=81),
        with_keys("evaluation", perplexity_windows=7),
        with_keys("data", input="other/*.txt"),
    ]
    assert len({run.config_hash, *others}) == 5
    assert with_keys("data", input=["other/*.txt"]) == others[-1]


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"sizs": {}}, "sizs: unknown key; did you mean sizes"),
        ({"lr": {"coefficient": 1.0, "parameter": -1.0}}, "lr: parameter: unknown key; did you mean parameters"),
        ({"grids": [block(mixer=["sisa"])]}, "grids.0.mixer: unknown key; did you mean mixers"),
        ({"grids": [block(mixers=["sissa"])]}, "grids.mixers: there is no sissa: choose of sisa, attention"),
        ({"grids": [block(sizes=["b"])]}, "there is no size b: choose of a"),
        ({"grids": [block(flops=[1e9])]}, "give one of tokens, tokens_per_parameter, flops"),
        ({"grids": [block(tokens=[100.0])]}, "100 tokens are fewer than one step of 256"),
        ({"grids": [block(tokens=[2e3, 2e3])]}, "tokens names 2000.0 twice"),
        ({"grids": [block(mixers=["attention"])]}, "d_s has no effect, none of attention takes one"),
        ({"grids": [block(d_s=[64])]}, "size a, sisa, d_s 64: with next to no MLP it has"),
        ({"grids": [block(d_s=[7])]}, "size a, sisa, d_s 7: "),
        ({"sizes": {"a": SIZES["a"] | {"d_modell": 3}}}, "base, size a: model.d_modell: unknown key; did you mean"),
        ({"sizes": {"a b": SIZES["a"]}}, "a size's name is of letters"),
        ({"batch": 100}, "global_batch_tokens 100 is not a multiple"),
        ({"decay": 0.2}, "decay has no effect unless base.schedule.kind is wsd"),
        ({"base": {"training": {"steps": 3}}}, "base.training.steps is the grid's to set: remove it (grids.tokens)"),
        ({"machine": {"mfu": 0.4}}, "peak_flops and mfu say the speed together"),
        ({"grids": [block(tokens=[1000100.0, 1000400.0])]}, "two runs that differ would both be a_attention_t1e6_s0"),
    ],
)
def test_what_does_not_fit_is_one_line_and_begins_nothing(
    over: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tree(tmp_path / "out", **over))
    assert run_sweep.main(["run", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("run_sweep: ") and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--jobs", "0"], "--jobs 0: give a number above 0"),
        (["plan", "--only", "b*"], "--only b*: no run has such a name: see all by `plan`, as a_attention_t2048_s0"),
        (["plan", "--set=machine.devices=8"], "machine.devices 8: a few steps on this machine say nothing"),
        (["run", "--hosts", ","], "--hosts names none"),
        (["plan", "--next", "none.json"], "none.json: cannot be read"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = arguments
    assert run_sweep.main([command, str(write(tmp_path, tree(tmp_path / "out"))), *rest]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_plan_says_all_of_it_and_begins_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tree(tmp_path / "out", machine={"peak_flops": 1e6, "mfu": 0.5, "devices": 2}))
    given = ["--jobs", "2", "--device-hour-price", "3600"]
    assert run_sweep.main(["plan", str(path), *given]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    runs = make_runs(load_grid(path))
    for run in runs:
        assert f"{run.shape.parameters:,}" in lines[run.name] and "MiB" in lines[run.name]
        scored = (2 * 2 + 6) * 64 * run.shape.flops_per_token / 3
        assert f"{2 * 3600 * (run.flops + scored) / 1e6 / 3600:,.2f}" in lines[run.name]  # of 2 devices at 5e5 FLOP/s
    assert "speed stated: 50% (MFU) of a device's 1e+06 FLOP/s; 2 device(s) a run" in said
    assert f"all: 2 runs, {sum(run.flops for run in runs):.4g} FLOPs" in said
    assert {found.name for found in (tmp_path / "out").iterdir()} == {"shapes"}
    assert run_sweep.main(["plan", str(path), "--flops-per-second", "1e6", "--no-memory"]) == 0
    assert "speed given: 1e+06 FLOP/s of a device" in capsys.readouterr().out


def test_the_plan_counts_what_is_left_and_refuses_runs_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, tree(tmp_path / "out"))
    first, second = make_runs(load_grid(path))
    (first.folder / "checkpoints" / "step_00000006").mkdir(parents=True)  # of 8
    (first.folder / "config.yaml").write_text(dump_config(first.config), encoding="utf-8")
    plan = ["plan", str(path), "--flops-per-second", "1e6", "--no-memory", "--device-hour-price", "3600"]
    assert run_sweep.main(plan) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left: ")]
    assert line.startswith(f"left: 2 runs, {first.flops / 4 + second.flops:.4g} FLOPs, ")
    scored = (2 * 2 + 6) * 64 / 3
    seconds = [(run.flops + scored * run.shape.flops_per_token) / 1e6 for run in (first, second)]
    assert line.endswith(f"cost {seconds[0] / 4 + seconds[1]:,.2f}")
    # A result counts too, after its checkpoints are gone.
    (first.folder / "checkpoints" / "step_00000006").rmdir()
    (first.folder / "final.json").write_text('{"perplexity": {"loss": 2.5}}', encoding="utf-8")
    for changed in ("lr=2e-3", "base.data.input=other.txt"):
        assert run_sweep.main([*plan, f"--set={changed}"]) == 2
        assert "was begun with other settings than the grid's now" in capsys.readouterr().err


def test_unique_tokens_are_those_of_all_the_data_that_is_read(tmp_path: Path) -> None:
    for name, tokens in (("one", 700), ("two", 40), ("unread", 5)):
        (tmp_path / name).mkdir()
        made = {"settings": {}, "counts": {"train": {"tokens": tokens}, "validation": {"tokens": 9}}}
        (tmp_path / name / "prepared.json").write_text(json.dumps(made), encoding="utf-8")

    def column(data: dict[str, Any]) -> list[float]:
        content = tree(tmp_path / "out")
        content["base"]["data"] = data
        runs = make_runs(load_grid(write(tmp_path, content)))
        write_tables(tmp_path / "out", runs)
        tables = [pandas.read_csv(tmp_path / "out" / "results.csv")]
        tables.append(pandas.read_parquet(tmp_path / "out" / "results.parquet"))
        found, same = (list(table["unique_tokens"].astype("float64")) for table in tables)
        assert found == pytest.approx(same, nan_ok=True)
        return found

    weights = {"one": 3.0, "two": 1.0, "unread": 0.0}
    mixture = {name: {"folder": str(tmp_path / name), "weight": weight} for name, weight in weights.items()}
    assert column({"folder": str(tmp_path / "one")}) == [700, 700]
    assert column({"mixture": mixture}) == [740, 740]
    assert all(map(math.isnan, column({"folder": str(tmp_path / "none")})))
    (tmp_path / "two" / "prepared.json").unlink()
    assert all(map(math.isnan, column({"mixture": mixture})))


def fit(tmp_path: Path, *optima: tuple[float, float], where: dict[str, Any] | None = None) -> Path:
    optimum = [{"flops": c, "parameters": n, "tokens": c / 6 / n, "loss": 2.0} for c, n in optima]
    others = {"where": where or {}, "form": "isoflop", "optimum": [{"flops": 1e12, "parameters": 1.0}]}
    entry = {"where": where or {}, "form": "chinchilla", "optimum": optimum}
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({"fits": [others, entry]}), encoding="utf-8")
    return path


def test_a_fit_chooses_the_next_runs_and_they_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tree(tmp_path / "out"))
    chosen = fit(tmp_path, (1e6, 3e4), (1e11, 3e5), where={"mixer": "sisa", "d_s": 8.0})
    plan = ["plan", str(path), "--flops-per-second", "1e9", "--no-memory"]
    assert run_sweep.main([*plan, "--next", str(chosen)]) == 0
    assert "n3e5_sisa_ds8_c1e11_s0" in capsys.readouterr().out
    assert run_sweep.main(plan) == 0 and "n3e5" not in capsys.readouterr().out  # a plan leaves nothing
    script = ["run", str(path), "--slurm", "--next", str(chosen), "--only", "n3e5_*"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_sweep, "_prepare", lambda config: None)
        assert run_sweep.main(script) == 0
    assert "\nruns=(n3e5_sisa_ds8_c1e11_s0)\n" in (tmp_path / "out" / "sweep.sbatch").read_text()
    capsys.readouterr()
    assert run_sweep.main(plan) == 0 and "n3e5_sisa_ds8_c1e11_s0" in capsys.readouterr().out
    assert run_sweep.main([*plan, "--next", str(chosen)]) == 2
    assert "names no optimum beyond the grid's largest run" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [2e6, 7e6])
def test_a_new_size_has_the_parameters_and_the_proportions(wanted: float) -> None:
    grid = load_grid(SCALING / "laptop.yaml")
    keys = size_of(grid, wanted)
    one = {"sizes": ["new"], "mixers": ["attention"], "flops": [1e13], "d_s": None}
    blocks = [grid.grids[0].model_copy(update=one)]
    (run,) = make_runs(grid.model_copy(update={"sizes": {"new": keys}, "grids": blocks}))
    assert run.shape.parameters == pytest.approx(wanted, rel=0.01)
    assert keys["d_model"] == 32 * keys["n_heads"] and keys["n_layers"] == round(keys["d_model"] / 32)
    assert 1.5 < keys["d_ff"] / keys["d_model"] < 4.5


def test_a_script_for_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of slurm_train.sbatch, with a run for each task; a shell reads it."""
    monkeypatch.setattr(run_sweep, "_prepare", lambda config: None)
    out = tmp_path / "out"
    machine = {"devices": 16, "devices_per_node": 8, "peak_flops": 1e15, "mfu": 0.4}
    path = write(tmp_path, tree(out, machine=machine))
    assert run_sweep.main(["run", str(path), "--slurm", "--jobs", "3"]) == 0
    assert f"2 runs: sbatch {out / 'sweep.sbatch'}" in capsys.readouterr().out
    text = (out / "sweep.sbatch").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(out / "sweep.sbatch")]).returncode == 0
    for line in ("array=1-2%3", "nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "requeue", "signal=B:USR1@120"):
        assert text.count(f"#SBATCH --{line}\n") == 1
    assert text.count("--nodes=") == text.count("--job-name=") == 1 and text.startswith("#!/bin/bash\n")
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text and "trap 'signalled=yes; kill -USR1 $run' USR1" in text
    runs = make_runs(load_grid(path))
    names = [run.name for run in runs]
    # A task runs the job of its number, and what a signal does is the template's.
    (listed,) = [line for line in text.splitlines() if line.startswith("runs=")]
    (job,) = [line for line in text.splitlines() if "sweep_job.py" in line]
    environment = {"SLURM_ARRAY_TASK_ID": "2", "PATH": os.environ["PATH"]}
    told = ["bash", "-c", f"{listed}; echo {job.removesuffix(' &')}"]
    found = subprocess.run(told, env=environment, capture_output=True, text=True)
    assert found.stdout.split()[-3:] == [str(out), names[1], "--launch"]
    # A second script leaves out what runs, and what is done.
    (out / "jobs").mkdir()
    with (out / "jobs" / f"{names[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_sweep.main(["run", str(path), "--slurm"]) == 0
        assert "wait in SLURM's queue are among them" in capsys.readouterr().out
        assert f"\nruns=({names[1]})\n" in (out / "sweep.sbatch").read_text(encoding="utf-8")
        runs[1].folder.mkdir(parents=True)
        (runs[1].folder / "final.json").write_text('{"perplexity": {"loss": 2.5}}', encoding="utf-8")
        assert run_sweep.main(["run", str(path), "--slurm"]) == 2
        assert "nothing is missing" in capsys.readouterr().err
