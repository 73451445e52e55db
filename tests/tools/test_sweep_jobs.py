"""What waits beside a run, and the pool over it, with stand-ins for `sisa` and for ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import sweep_job
import sweep_slots
from rich.console import Console
from sweep_grid import load_grid
from sweep_pool import StopAsked, run_all
from sweep_results import share_left, state_of, write_tables
from sweep_rules import SweepRun, make_runs
from sweep_slots import Slot, host_slots, local_slots
from sweeps import tree, until, write

from sisa_dist.config import UserError

# Trains until a file is there or a signal comes, which it writes down; writes what `eval` is to write.
SISA = """import json, os, pathlib, signal, sys, time
command, argument = sys.argv[1:3]
def saves(number, frame):
    print(f"signal {number}: saved", flush=True)
    raise SystemExit(75)
if command == "train":
    name = pathlib.Path(argument).stem
    signal.signal(signal.SIGTERM, saves)
    signal.signal(signal.SIGUSR1, saves)
    print("training " + name, flush=True)
    if "sisa" in name and os.environ.get("FAILS"):
        print("sisa: diverged: lower optimizer.lr", file=sys.stderr)
        raise SystemExit(2)
    until = time.monotonic() + float(os.environ.get("TRAINS", "0"))
    while time.monotonic() < until:
        time.sleep(0.02)
else:
    final = pathlib.Path(sys.argv[4])
    final.parent.mkdir(parents=True, exist_ok=True)
    final.write_text(json.dumps({"perplexity": {"loss": 2.5}}))
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SweepRun]:
    """Of jobs that call SISA: by a copy of sweep_job.py, whose ROOT is tmp_path and has a stand-in of the package."""
    (tmp_path / "tools").mkdir()
    source = Path(sweep_job.__file__).read_text(encoding="utf-8")
    (tmp_path / "tools" / "sweep_job.py").write_text(source, encoding="utf-8")
    (tmp_path / "sisa_dist").mkdir()
    (tmp_path / "sisa_dist" / "__init__.py").touch()
    (tmp_path / "sisa_dist" / "cli.py").write_text(SISA, encoding="utf-8")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sweep_slots, "_JOB", tmp_path / "tools" / "sweep_job.py")
    return make_runs(load_grid(write(tmp_path, tree(tmp_path / "out"))))


def job(tmp_path: Path, run: SweepRun, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(tmp_path / "tools" / "sweep_job.py"), str(tmp_path / "out"), run.name, "--until-eof"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(os.environ) | environment)


def log(tmp_path: Path, run: SweepRun) -> str:
    path = tmp_path / "out" / "logs" / f"{run.name}.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def until_training(tmp_path: Path, run: SweepRun) -> None:
    until("the run trains", lambda: "training " in log(tmp_path, run))


def test_a_job_trains_then_scores_and_is_done_once(tmp_path: Path, sweep: list[SweepRun]) -> None:
    run = sweep[0]
    assert state_of(tmp_path / "out", run).status == "missing"
    assert job(tmp_path, run).wait(600) == 0 == job(tmp_path, run).wait(300)
    assert [line.split()[3:5] for line in log(tmp_path, run).splitlines() if line.startswith("+")] == [
        ["sisa_dist.cli", "train"],
        ["sisa_dist.cli", "eval"],
    ]
    assert state_of(tmp_path / "out", run).status == "finished"


@pytest.mark.parametrize("how", ["eof", "signal", "kill"])
def test_a_job_that_is_asked_to_stop_lets_its_run_save(tmp_path: Path, sweep: list[SweepRun], how: str) -> None:
    """By the end of stdin, which a launcher's death is; by a signal; and when the job itself is killed."""
    run, out = sweep[0], tmp_path / "out"
    process = job(tmp_path, run, TRAINS="60")
    until_training(tmp_path, run)
    assert state_of(out, run).status == "running"
    if how == "eof":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(signal.SIGUSR1 if how == "signal" else signal.SIGKILL)
    code = process.wait(600)
    assert code == (75 if how != "kill" else -9)
    until("the run saves", lambda: "saved" in log(tmp_path, run))
    assert f"signal {10 if how == 'signal' else 15}: saved" in log(tmp_path, run)
    assert state_of(out, run).status == "missing" and not (out / "jobs" / f"{run.name}.json").exists()
    assert job(tmp_path, run).wait(600) == 0 and state_of(out, run).status == "finished"


def test_a_failed_run_is_named_and_does_not_stop_the_others(
    tmp_path: Path, sweep: list[SweepRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "1")
    console, out = Console(soft_wrap=True), tmp_path / "out"
    with StopAsked() as stop:
        run_all(out, sweep[::-1], local_slots(1, 1), console, stop, launch=False)
        said = capsys.readouterr().out
        assert "1/2  a_sisa_ds8_t2048_s0  FAILED: sisa: diverged: lower optimizer.lr (exit code 2, see" in said
        assert [state_of(out, run).status for run in sweep] == ["finished", "failed"]
        monkeypatch.delenv("FAILS")
        run_all(out, sweep[1:], local_slots(1, 1), console, stop, launch=False)
    assert [state_of(out, run).status for run in sweep] == ["finished", "finished"]


def test_asked_to_stop_the_pool_lets_all_save_and_starts_no_more(
    tmp_path: Path, sweep: list[SweepRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINS", "60")

    class Asked(StopAsked):
        def __bool__(self) -> bool:
            return "training" in log(tmp_path, sweep[0])

    with Asked() as stop:
        run_all(tmp_path / "out", sweep, local_slots(1, 1), Console(), stop, launch=False)
    assert "0/2  a_attention_t2048_s0  saved at step 0" in capsys.readouterr().out
    assert "signal 15: saved" in log(tmp_path, sweep[0]) and not log(tmp_path, sweep[1])


def test_over_hosts_by_ssh_one_of_which_is_not_there(
    tmp_path: Path, sweep: list[SweepRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ssh = f'#!/bin/bash\necho "$3" >>{tmp_path}/ssh.log\n'
    ssh += '[ "$3" != gone ] || { echo "ssh: no route" >&2; exit 255; }\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(ssh + 'exec bash -c "$4"\n', encoding="utf-8")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    console, slots = Console(soft_wrap=True), [Slot(host="gone"), Slot(host="here")]
    with StopAsked() as stop:
        assert run_all(tmp_path / "out", sweep, slots, console, stop, launch=False) == ["gone: ssh: no route: left out"]
        assert [state_of(tmp_path / "out", run).status for run in sweep] == ["finished", "finished"]
        said = capsys.readouterr().out
        assert "gone: ssh: no route: left out" in said and "a_attention_t2048_s0 on here" in said
        assert sorted((tmp_path / "ssh.log").read_text().split()) == ["gone", "here", "here"]
        # All hosts gone: it ends, and what is not done is not said to be.
        (tmp_path / "out" / "runs" / sweep[0].name / "final.json").unlink()
        run_all(tmp_path / "out", sweep[:1], slots[:1], console, stop, launch=False)
    assert state_of(tmp_path / "out", sweep[0]).status == "missing"


def test_what_a_slot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (first, second) = (slot.environment() for slot in local_slots(2, 3))
    assert first == second and "CUDA_VISIBLE_DEVICES" not in first
    assert (first["NPROC"], first["OMP_NUM_THREADS"]) == ("3", str(max(1, cores // 6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local_slots(1, 1)[0].environment()["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(sweep_slots.torch.cuda, "device_count", lambda: 4)
    assert [slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in local_slots(2, 2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,GPU-8f3e,7")  # those are ours, by whatever name
    assert [slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in local_slots(2, 2)] == ["2,5", "GPU-8f3e,7"]
    with pytest.raises(UserError, match="and there are 4 here"):
        local_slots(3, 2)


def test_what_the_slots_of_hosts_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each host is asked what it has; what a slot is told reaches the job through its shell."""
    answers = 'gpus) echo Hi; echo "[4, null, 16]";; some) echo "[2, \\"6,7\\", 16]";; cpus) echo "[0, null, 12]";;'
    ask = f'case $3 in {answers} *) echo "ssh: no route" >&2; exit 255;; esac'
    ssh = f'#!/bin/bash\ncase $4 in *device_count*) {ask};; *) exec bash -c "$4";; esac\n'
    (tmp_path / "ssh").write_text(ssh, encoding="utf-8")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    console = Console(soft_wrap=True)
    slots = host_slots(["gpus", "gone", "cpus", "gpus"], 2, 2, console)
    assert capsys.readouterr().out == "gone: ssh: no route: left out\n"
    assert [slot.host for slot in slots] == ["gpus", "cpus", "gpus", "cpus"]
    job = "import os; print([os.getenv(key) for key in ('CUDA_VISIBLE_DEVICES', 'NPROC', 'OMP_NUM_THREADS')])"
    (tmp_path / "job.py").write_text(job, encoding="utf-8")
    monkeypatch.setattr(sweep_slots, "_JOB", tmp_path / "job.py")

    def told(slot: Slot) -> str:
        command = slot.command(tmp_path, "name", launch=True)
        assert command[:4] == ["ssh", "-o", "BatchMode=yes", slot.host] and "--launch" in command[-1]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert [told(slot) for slot in slots[::2]] == ["['0,1', '2', '4']", "['2,3', '2', '4']"]
    assert told(slots[1]) == "[None, '2', '3']"
    assert told(host_slots(["some"], 1, 1, console)[0]) == "['6', '1', '16']"
    with pytest.raises(UserError, match=r"2 run\(s\) at a time of 2 device\(s\) each, and there are 2 on some"):
        host_slots(["gpus", "some"], 2, 2, console)
    with pytest.raises(UserError, match="--hosts: none of them can be used"):
        host_slots(["gone"], 1, 1, console)


def test_a_result_without_a_loss_is_a_failure_and_the_tables_are_written(tmp_path: Path, sweep: list[SweepRun]) -> None:
    out = tmp_path / "out"
    for run, final in zip(sweep, ('{"niah": {"accuracy": 1.0}}', '{"perplexity": {"loss": 2.5}}'), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "final.json").write_text(final, encoding="utf-8")
    states = write_tables(out, sweep)
    assert [states[run.name].status for run in sweep] == ["failed", "finished"]
    assert "final.json holds no loss on held-out text: see to data.validation_fraction" in states[sweep[0].name].why
    table = pandas.read_csv(out / "results.csv")
    assert list(table["status"]) == ["failed", "finished"] and list(table["loss"].fillna(0)) == [0, 2.5]
    (sweep[0].folder / "final.json").write_text('{"perplexity": {"loss": null}}', encoding="utf-8")  # as of a NaN
    assert "is not finite: lower lr, and remove" in state_of(out, sweep[0]).why


def test_what_is_left_of_a_run_is_what_its_last_checkpoint_lacks(tmp_path: Path, sweep: list[SweepRun]) -> None:
    out, run = tmp_path / "out", sweep[0]
    run.folder.mkdir(parents=True)
    records = [{"kind": "train", "step": step} for step in range(1, 7)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    assert run.config.training.steps == 8 and state_of(out, run).step == 6 and share_left(run, state_of(out, run)) == 1
    (run.folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert share_left(run, state_of(out, run)) == 0.5
