"""What waits beside a run, and the pool over it, with stand-ins for `sisa` and for ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_job
import sweep_pool
from rich.console import Console
from sweep_grid import load_grid
from sweep_pool import Slot, StopAsked, local_slots, run_all
from sweep_results import state_of
from sweep_rules import SweepRun, make_runs
from sweeps import tree, write

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
    monkeypatch.setattr(sweep_pool, "_JOB", tmp_path / "tools" / "sweep_job.py")
    return make_runs(load_grid(write(tmp_path, tree(tmp_path / "out"))))


def job(tmp_path: Path, run: SweepRun, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(tmp_path / "tools" / "sweep_job.py"), str(tmp_path / "out"), run.name, "--until-eof"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(os.environ) | environment)


def log(tmp_path: Path, run: SweepRun) -> str:
    path = tmp_path / "out" / "logs" / f"{run.name}.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def until_training(tmp_path: Path, run: SweepRun) -> None:
    while "training " not in log(tmp_path, run):
        time.sleep(0.02)


def test_a_job_trains_then_scores_and_is_done_once(tmp_path: Path, sweep: list[SweepRun]) -> None:
    run = sweep[0]
    assert state_of(tmp_path / "out", run).status == "missing"
    assert job(tmp_path, run).wait() == 0 == job(tmp_path, run).wait()
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
    code = process.wait()
    assert code == (75 if how != "kill" else -9)
    while "saved" not in log(tmp_path, run):
        time.sleep(0.02)
    assert f"signal {10 if how == 'signal' else 15}: saved" in log(tmp_path, run)
    assert state_of(out, run).status == "missing" and not (out / "jobs" / f"{run.name}.json").exists()
    assert job(tmp_path, run).wait() == 0 and state_of(out, run).status == "finished"


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


def test_what_a_slot_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (slot, _) = local_slots(2, 1)
    assert slot.threads == max(1, (os.cpu_count() or 1) // 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert slot.environment()["OMP_NUM_THREADS"] == str(slot.threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert slot.environment()["OMP_NUM_THREADS"] == "7"
    monkeypatch.setattr(sweep_pool.torch.cuda, "device_count", lambda: 4)
    assert [slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in local_slots(2, 2)] == ["0,1", "2,3"]
    with pytest.raises(UserError, match="and there are 4 here"):
        local_slots(3, 2)
    assert "--launch" in Slot(host="a").command(tmp_path, "name", launch=True)[-1]
    assert json.dumps(Slot(host="a").command(tmp_path, "n", launch=False)[:4]) == '["ssh", "-o", "BatchMode=yes", "a"]'
