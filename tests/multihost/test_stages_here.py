"""launch.sh takes a run through stages of other process counts, tp and engines: on this host, and on two."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from multihost.clone import ROOT, assert_like_one_process, make_environment, overrides, write_stages
from multihost.hosts import Host, ended
from runs import QUICKSTART, Stages
from sisa_dist.config import load_config
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train

HERE: Stages = [
    {"name": "one", "parallel": {"dp": 1}},
    {"name": "tp", "parallel": {"tp": 2, "dp": 1, "sequence_parallel": True}},
    {"name": "zero", "parallel": {"dp": 2}, "engine": {"kind": "deepspeed", "zero_stage": 2}},
]
# A process on each host, two on each, and one again.
ON_HOSTS: Stages = [
    {"name": "dp", "parallel": {"dp": 2}},
    {"name": "tp", "parallel": {"tp": 2, "dp": 2, "sequence_parallel": True}},
    {"name": "zero", "parallel": {"dp": 2}, "engine": {"kind": "deepspeed", "zero_stage": 2}},
]
SIX_STEPS = 1e-4  # Adam carries a difference of the last bit on; the losses are about 6


@pytest.mark.slow
def test_every_stage_gets_the_processes_it_wants_and_the_run_is_one(tmp_path: Path) -> None:
    make_environment(tmp_path)
    for number, source in enumerate(sorted((ROOT / "data_pipeline").glob("*.py"))):
        shutil.copy(source, tmp_path / f"{number}.txt")
    one = load_config(QUICKSTART, [*overrides(tmp_path, "one"), "training.steps=6"])
    prepare(one, quiet=True)
    train(one, quiet=True)
    write_stages(tmp_path / "stages.yaml", one, str(tmp_path / "stages"), HERE)
    command = ["./launch.sh", "train", "stages.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("--standalone --nproc-per-node 2") == 2 and "+ .venv/bin/sisa train stages.yaml" in said
    assert [record["stage"] for record in read_metrics(tmp_path / "stages")["train"]] == [1, 1, 2, 2, 3, 3]
    assert_like_one_process(tmp_path, "stages", steps=6, tolerance=SIX_STEPS)


@pytest.mark.multihost
def test_two_hosts_meet_again_for_every_stage(hosts: tuple[Host, Host], clone: Path) -> None:
    """At one RDZV, three times: whoever is first in the next stage must not meet what is left of the one before."""
    one = load_config(QUICKSTART, [*overrides(clone, "six_steps"), "training.steps=6"])
    train(one, quiet=True)
    write_stages(clone / "on_hosts.yaml", one, str(clone / "on_hosts"), ON_HOSTS)
    environment = {"NNODES": "2", "RDZV": "hosta:29418"}
    command = ("./launch.sh", "train", "on_hosts.yaml")
    codes, said = ended(*(host.start(*command, cwd=clone, environment=environment) for host in hosts), timeout=1800)
    assert codes == [0, 0], said
    started = [line.split()[6:8] for line in said.splitlines() if "sisa_dist.torchrun --nnodes 2" in line]
    assert sorted(int(words[1]) for words in started) == [1, 1, 1, 1, 2, 2], said
    assert [record["stage"] for record in read_metrics(clone / "on_hosts")["train"]] == [1, 1, 2, 2, 3, 3]
    assert_like_one_process(clone, "on_hosts", one="six_steps", steps=6, tolerance=SIX_STEPS)
