"""launch.sh takes a run through stages of other process counts, tp and engines, on this host's cores."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from data_pipeline.prepare import prepare
from multihost.clone import ROOT, make_environment, overrides
from runs import QUICKSTART, losses
from sisa_dist.config import dump_config, load_config
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train

LAYOUTS = [
    {"name": "one", "steps": 2, "parallel": {"dp": 1}},
    {"name": "tp", "steps": 2, "parallel": {"tp": 2, "dp": 1, "sequence_parallel": True}},
    {"name": "zero", "steps": 2, "parallel": {"dp": 2}, "engine": {"kind": "deepspeed", "zero_stage": 2}},
]


@pytest.mark.slow
def test_every_stage_gets_the_processes_it_wants_and_the_run_is_one(tmp_path: Path) -> None:
    make_environment(tmp_path)
    for number, source in enumerate(sorted((ROOT / "data_pipeline").glob("*.py"))):
        shutil.copy(source, tmp_path / f"{number}.txt")
    one = load_config(QUICKSTART, [*overrides(tmp_path, "one"), "training.steps=6"])
    prepare(one, quiet=True)
    train(one, quiet=True)
    tree = yaml.safe_load(dump_config(one))
    for name in ("parallel", "engine"):
        del tree[name]
    del tree["training"]["steps"]
    tree |= {"output_dir": str(tmp_path / "stages"), "stages": LAYOUTS}
    tree["schedule"] |= {"first_step": 0, "end_step": 6}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = ["./launch.sh", "train", "stages.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert said.count("--standalone --nproc-per-node 2") == 2 and "+ .venv/bin/sisa train stages.yaml" in said
    assert [record["stage"] for record in read_metrics(tmp_path / "stages")["train"]] == [1, 1, 2, 2, 3, 3]
    for ours, theirs in zip(losses(tmp_path / "stages"), losses(tmp_path / "one"), strict=True):
        assert (ours[0], ours[3]) == (theirs[0], theirs[3])
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=2e-5)
