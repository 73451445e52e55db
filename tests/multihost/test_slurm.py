"""launch.sh and the sbatch template in a real SLURM: the losses of one process, and the way back into the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from multihost.clone import assert_like_one_process, overrides
from multihost.slurm import one_node, until, why_not

pytestmark = pytest.mark.multihost
TWO_TASKS = ["--gpus-per-node=0", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"]
# A `sisa` that trains until it is told to save, in its first sitting.
SAVES = """#!/bin/sh
[ "$1" = prepare ] && exit
echo "rank $RANK of $WORLD_SIZE, sitting ${SLURM_RESTART_COUNT:-0}"
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap 'echo "rank $RANK saves"; sleep "$RANK"; exit 75' USR1 TERM
while :; do sleep 0.2; done
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if (reason := why_not()) is not None:
        pytest.skip(f"SLURM on this machine: {reason}")
    with one_node(tmp_path_factory.mktemp("slurm") / "etc") as environment:
        yield environment


@pytest.fixture
def saving(clone: Path) -> Iterator[Path]:
    """The clone, while its sisa is the one above."""
    sisa = clone / ".venv" / "bin" / "sisa"
    real = sisa.read_text(encoding="utf-8")
    sisa.write_text(SAVES, encoding="utf-8")
    yield clone
    sisa.write_text(real, encoding="utf-8")


def ask(clone: Path, environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def submit(clone: Path, environment: dict[str, str], said: Path, *arguments: str) -> str:
    """Returns the job's number; its output goes to `said`."""
    options = ("--parsable", f"--output={said}", *TWO_TASKS)
    return ask(clone, environment, "sbatch", *options, "tools/slurm_train.sbatch", *arguments)


def state(clone: Path, environment: dict[str, str], job: str) -> str:
    shown = ask(clone, environment, "scontrol", "--oneliner", "show", "job", job)
    return next(word for word in shown.split() if word.startswith("JobState=")).removeprefix("JobState=")


def test_srun_trains_two_ranks(slurm: dict[str, str], clone: Path) -> None:
    said = clone / "srun.out"
    config = ["configs/quickstart.yaml", *(f"--set={override}" for override in overrides(clone, "srun"))]
    job = submit(clone, slurm, said, *config)
    ended = until(lambda: state(clone, slurm, job) in ("COMPLETED", "FAILED"), 120)
    text = said.read_text(encoding="utf-8")
    assert ended and state(clone, slurm, job) == "COMPLETED", text
    assert "+ srun --kill-on-bad-exit=0" in text and text.count("+ .venv/bin/sisa train") == 1
    assert_like_one_process(clone, "srun")


def test_a_run_that_saved_on_sigusr1_goes_back_into_the_queue(slurm: dict[str, str], saving: Path) -> None:
    said = saving / "requeued.out"
    job = submit(saving, slurm, said, "c.yaml")
    assert until(lambda: _text(said).count("of 2, sitting 0") == 2, 60), _text(said)
    ask(saving, slurm, "scancel", "--batch", "--signal=USR1", job)  # what SLURM does before the time limit
    assert until(lambda: state(saving, slurm, job) == "PENDING", 60), _text(said)
    assert {"rank 0 saves", "rank 1 saves", "slurm_train: exit code 75"} <= set(_text(said).splitlines())
    ask(saving, slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")  # else it starts in two minutes
    assert until(lambda: state(saving, slurm, job) == "COMPLETED", 60), _text(said)
    assert {"rank 0 of 2, sitting 1", "slurm_train: exit code 0"} <= set(_text(said).splitlines())


def test_a_cancelled_run_stays_out(slurm: dict[str, str], saving: Path) -> None:
    said = saving / "cancelled.out"
    job = submit(saving, slurm, said, "c.yaml")
    assert until(lambda: _text(said).count("of 2, sitting 0") == 2, 60), _text(said)
    ask(saving, slurm, "scancel", job)
    assert until(lambda: "slurm_train: exit code 75" in _text(said), 60), _text(said)
    assert until(lambda: state(saving, slurm, job) not in ("RUNNING", "COMPLETING"), 60)
    assert state(saving, slurm, job) == "CANCELLED"


def _text(said: Path) -> str:
    return said.read_text(encoding="utf-8") if said.exists() else ""
