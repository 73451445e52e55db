"""A clone for launch.sh to work in, and what a run in it must equal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.prepare import prepare
from runs import QUICKSTART, Stages, losses
from sisa_dist.config import RunConfig, dump_config, load_config
from sisa_dist.training.trainer import train

ROOT = Path(__file__).parents[2]
# The quickstart's model with a small vocabulary, for a few small steps.
FEW_STEPS = [
    "model.vocab_size=512",
    "data.validation_fraction=0",
    "schedule.warmup_steps=2",
    "training.steps=3",
    "training.seq_len=64",
    "training.micro_batch_size=2",
    "training.global_batch_tokens=256",
    "training.eval_every=null",
    "training.checkpoint_every=null",
]
# What `pip install` puts into .venv/bin, without a second installation.
TOOLS = {"python": "", "sisa": "-m sisa_dist.cli"}
TOOLS |= {"deepspeed": "-m deepspeed.launcher.runner"}


def make_environment(folder: Path) -> None:
    """The repository in `folder` as a clone whose environment is made: launch.sh finds nothing to install there."""
    (folder / "tools").mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt", "tools/slurm_train.sbatch"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("sisa_dist", "data_pipeline", "configs"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, module in TOOLS.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    stamp = "cat pyproject.toml constraints.txt | cksum >.venv/.installed"
    subprocess.run(stamp, shell=True, cwd=folder, check=True)


def make_clone(folder: Path) -> None:
    """With the data and the run `one` of one process."""
    make_environment(folder)
    for number, source in enumerate(sorted((ROOT / "data_pipeline").glob("*.py"))):
        shutil.copy(source, folder / f"{number}.txt")
    config = load_config(QUICKSTART, overrides(folder, "one"))
    prepare(config, quiet=True)
    train(config, quiet=True)


def overrides(clone: Path, run: str) -> list[str]:
    return [*FEW_STEPS, f"data.input={clone}/*.txt", f"data.folder={clone}/data", f"output_dir={clone}/{run}"]


def write_stages(path: Path, one: RunConfig, run: str, stages: Stages) -> None:
    """The run of `one`, done in `stages` of two steps each: one schedule and one order of the data over all of them."""
    tree: dict[str, Any] = yaml.safe_load(dump_config(one))
    for name in ("parallel", "engine"):
        del tree[name]
    del tree["training"]["steps"]
    tree |= {"output_dir": run, "stages": [{"steps": 2, **stage} for stage in stages]}
    tree["schedule"] |= {"first_step": 0, "end_step": 2 * len(stages)}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")


def assert_like_one_process(
    clone: Path, run: str, *, one: str = "one", steps: int = 3, tolerance: float = 1e-5
) -> None:
    rows = list(zip(losses(clone / one), losses(clone / run), strict=True))
    assert len(rows) == steps
    for first, second in rows:
        assert first[0] == second[0] and first[3] == second[3]  # the same samples
        assert abs(first[1] - second[1]) < tolerance
        assert abs(first[2] - second[2]) < tolerance * max(1.0, first[2])
