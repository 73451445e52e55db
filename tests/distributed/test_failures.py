"""A rank that dies, stops, hangs or fails is named by the others within the timeout, and nobody is left."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed.launched import exit_codes, said, start_ranks, wait_for
from distributed.ranks import run_ranks
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import ParallelConfig, RunConfig, UserError, dump_config
from sisa_dist.engine import build_engine, build_log
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.heartbeat import Beat, blame, read_beats
from sisa_dist.training.trainer import train

TIMEOUT_MINUTES = 0.25  # 15 s: a busy machine has taken more than 6 s to begin
PHASES = "next batch|label count|forward|backward|gradient norm|verdict|optimizer|results|checkpoint|evaluation"


def long_run(tiny: RunConfig, folder: Path) -> RunConfig:
    training = {"steps": 100_000, "micro_batch_size": 1, "eval_every": None, "timeout_minutes": TIMEOUT_MINUTES}
    update = {"output_dir": str(folder), "training": tiny.training.model_copy(update=training)}
    return tiny.model_copy(update=update)


def _train(config: RunConfig) -> None:
    train(config, quiet=True)


def _train_with_trouble(config: RunConfig, trouble: str) -> None:
    """Rank 1 fails or hangs in the forward of step 3."""
    real = FSDP2Engine.train_step

    def train_step(engine: FSDP2Engine, *args: object, **kwargs: object) -> object:
        if engine.mesh.pulse.step == 3 and os.environ["RANK"] == "1":
            engine.mesh.enter("forward")
            if trouble == "hang":
                time.sleep(1000)
            raise ValueError("no such expert")
        return real(engine, *args, **kwargs)  # type: ignore[arg-type]

    FSDP2Engine.train_step = train_step  # type: ignore[method-assign, assignment]
    train(config, quiet=True)


def _named(text: str, rank: int, pid: int | None, end: str) -> re.Match[str] | None:
    host = re.escape(socket.gethostname())
    return re.search(
        rf"suspect: rank {rank} on host {host} \(pid {pid}\), in step \d+, ({PHASES})( \(.*\))?: {end}", text
    )


@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, "gone"), (signal.SIGSTOP, "stopped")])
def test_a_killed_or_stopped_rank_is_named(tiny: RunConfig, tmp_path: Path, number: signal.Signals, how: str) -> None:
    ranks = start_ranks(_train, 2, tmp_path / "ranks", long_run(tiny, tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
    pid = ranks[1].pid
    assert pid is not None
    os.kill(pid, number)
    began = time.monotonic()
    ranks[0].join(60 * TIMEOUT_MINUTES + 20)  # seconds of a busy machine's scheduling
    took = time.monotonic() - began
    text = said(tmp_path / "ranks", 0)
    assert ranks[0].exitcode == 1, text
    assert _named(text, 1, pid, f"its process is {how}"), text
    assert text.count("sisa: rank 0 on host") == 1
    if number == signal.SIGKILL:
        assert took < 30 * TIMEOUT_MINUTES, "a broken connection is not waited for"
    assert exit_codes(ranks, timeout=0)[0] == 1
    assert read_beats(tmp_path / "run" / "heartbeats")[1].pid == pid


@pytest.mark.parametrize("trouble", ["hang", "failure"])
def test_a_rank_in_trouble_is_named_by_itself_and_the_other(tiny: RunConfig, tmp_path: Path, trouble: str) -> None:
    ranks = start_ranks(_train_with_trouble, 2, tmp_path / "ranks", long_run(tiny, tmp_path / "run"), trouble)
    pid = ranks[1].pid
    assert exit_codes(ranks, timeout=180) == [1, 1]
    its_own, the_others = (said(tmp_path / "ranks", rank) for rank in (1, 0))
    start = rf"sisa: rank 1 on host {re.escape(socket.gethostname())} \(pid {pid}\), in step 3, forward: "
    if trouble == "hang":
        start = start.replace("forward", r"forward \(test_failures.py:\d+\)")
        assert re.search(start + r"has not moved for \d+ s \(training\.timeout_minutes\)\n", its_own), its_own
        assert "time.sleep(1000)" in its_own, "where it hangs"
        assert _named(the_others, 1, pid, "it lives, but is furthest behind"), the_others
        assert "label count (collective all_reduce): has not moved" in the_others
    else:
        assert re.search(start + "failed with ValueError: no such expert\n", its_own), its_own
        assert _named(the_others, 1, pid, "it failed first, with ValueError: no such expert"), the_others


def test_under_torchrun_everybody_goes(tiny: RunConfig, tmp_path: Path) -> None:
    launcher, beats = _torchrun(long_run(tiny, tmp_path / "run"), tmp_path)
    try:
        os.kill(beats[1].pid, signal.SIGKILL)
        _, err = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert _named(err, 1, beats[1].pid, "its process is gone"), err
    assert not any(Path(f"/proc/{beat.pid}").exists() for beat in beats.values())


@pytest.mark.slow
def test_ranks_whose_launcher_died_save_and_go(tiny: RunConfig, tmp_path: Path) -> None:
    launcher, beats = _torchrun(long_run(tiny, tmp_path / "run"), tmp_path)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(Path(f"/proc/{beat.pid}").exists() for beat in beats.values()), timeout=30)
    assert list_checkpoints(tmp_path / "run")


def _torchrun(config: RunConfig, folder: Path) -> tuple[subprocess.Popen[str], dict[int, Beat]]:
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "sisa_dist.cli", "train", str(folder / "run.yaml")]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
    except BaseException:
        launcher.kill()
        raise
    return launcher, read_beats(Path(config.output_dir) / "heartbeats")


def _beat(rank: int, **changes: object) -> Beat:
    return replace(Beat(rank, "elsewhere", 100 + rank, 7, "forward", 1000.0 + rank, 2000.0), **changes)  # type: ignore


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({2: {}}, "rank 2 .*: no sign of life for"),  # its heartbeat stands still, and only its
        (
            {2: {"beat": 2005.0, "step": 6, "phase": "next batch"}},
            "rank 2 .*step 6, next batch: it lives, but is",
        ),
        ({2: {"beat": 2005.0, "at": "x.py:1"}, 1: {"beat": 2005.0, "at": "collective all_reduce"}}, "rank 2 .*lives"),
        ({1: {"gave_up": True, "entered": 900.0}}, "rank 1 .*lives, but"),
        ({2: {"beat": 2005.0, "failed": "KeyError: 'x'"}}, "rank 2 .*: it failed first, with KeyError: 'x'"),
        ({1: {"failed": "lost 2"}, 2: {}}, "rank 2 .*: no sign of life"),  # who else failed, failed for want of it
        ({0: {"failed": "mine", "failed_at": 1.0}, 2: {"failed": "lost 0", "failed_at": 2.0}}, None),
        ({0: {"beat": 2001.0, "step": 6}, 2: {"beat": 2005.0}}, None),  # the one behind is the one that asks
    ],
)
def test_blame(changes: dict[int, dict], expected: str | None) -> None:
    before = {rank: _beat(rank) for rank in range(3)}
    after = {rank: _beat(rank, **changes.get(rank, {"beat": 2005.0})) for rank in range(3)}
    verdict = blame(0, before, after)
    if expected is None:
        assert verdict is None
    else:
        assert verdict is not None and re.match(expected, verdict), verdict


def test_too_few_processes_are_one_line(tiny: RunConfig, tmp_path: Path) -> None:
    config = long_run(tiny, tmp_path / "run")
    training = config.training.model_copy(update={"timeout_minutes": 0.03})
    (tmp_path / "run.yaml").write_text(dump_config(config.model_copy(update={"training": training})), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "sisa_dist.cli", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | world)
    assert done.returncode == 2, done.stderr
    assert "sisa: rank 0: the 3 processes of WORLD_SIZE did not come together" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_is_not_the_groups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    init_mesh(ParallelConfig(), device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"the process group has 1 process\(es\) but WORLD_SIZE says 2"):
        init_mesh(ParallelConfig(), device="cpu")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2 but WORLD_SIZE is 2"):
        init_mesh(ParallelConfig(), device="cpu")


def test_a_build_that_takes_long_says_how_far_it_is(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sisa_dist"):
        build_engine(tiny, init_mesh(tiny.parallel, device="cpu"))
        assert "building" not in caplog.text
        monkeypatch.setattr(build_log, "PATIENCE", -1.0)
        build_engine(tiny, init_mesh(tiny.parallel, device="cpu"))
    lines = [record.getMessage() for record in caplog.records if "building" in record.getMessage()]
    assert [line.split()[1] for line in lines] == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    assert lines[1] == "building blocks.0 (of 2 blocks): 0 s so far"


def test_the_timeout_reaches_every_group(tmp_path: Path) -> None:
    for found in run_ranks(_timeouts, 2, tmp_path):
        assert found == [33.0] * 4


def _timeouts() -> list[float]:
    mesh = init_mesh(ParallelConfig(), device="cpu", timeout=timedelta(seconds=33))
    groups = [dist.group.WORLD, *mesh.device_mesh.get_all_groups()]
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]  # type: ignore
