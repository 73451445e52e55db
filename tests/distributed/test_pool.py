"""The pool of processes that the grids run on: what its jobs share, and that it ends with the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed.forking import IMPORTED
from distributed.launched import wait_for
from distributed.pool import RankFailed, run_job


def _groups() -> list[int]:
    found = [dist.new_group([0, 1]), dist.new_group([0, 1]), dist.new_group([0])]
    total = torch.ones(())
    dist.all_reduce(total, group=found[1])  # type: ignore[arg-type]
    assert total == 2
    return [id(group) for group in found]


def test_a_job_is_given_the_groups_of_the_one_before_and_none_twice() -> None:
    first, second = run_job(2, _groups), run_job(2, _groups)
    assert first == second and len(set(first[0][:2])) == 2


def _missing() -> list[str]:
    return [name for name in IMPORTED if name not in sys.modules]


def test_everything_was_imported_before() -> None:
    assert run_job(2, _missing) == [[], []]


def test_a_rank_that_died_between_jobs_costs_one_job() -> None:
    for pid in run_job(2, os.getpid)[:1]:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises((RankFailed, OSError)):
        run_job(2, os.getpid)
    assert len(run_job(2, os.getpid)) == 2


STARTED = """
import os
import torch
from distributed.pool import run_job
from distributed.pretending import alone

if __name__ == "__main__":
    print("processes", *run_job(2, os.getpid), alone(os.getpid), flush=True)
    input()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks with GPUs are not stopped")
def test_all_processes_leave_with_tests_that_are_killed(tmp_path: Path) -> None:
    (tmp_path / "started.py").write_text(STARTED, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "started.py")]
    started = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert started.stdout is not None
    processes = next(line.split()[1:] for line in started.stdout if line.startswith("processes"))
    assert len(processes) == 3
    wait_for(lambda: [_state(pid) for pid in processes[:2]] == ["T", "T"])
    started.kill()
    started.wait()
    wait_for(lambda: {_state(pid) for pid in processes} <= {"gone", "Z"}, timeout=30)


def _state(pid: str) -> str:
    """The letter of ps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
