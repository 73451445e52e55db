"""A clone for launch.sh to work in, and what a run in it must equal."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.prepare import prepare
from runs import QUICKSTART, losses
from sisa_dist.config import load_config
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


def assert_like_one_process(clone: Path, run: str) -> None:
    rows = list(zip(losses(clone / "one"), losses(clone / run), strict=True))
    assert len(rows) == 3
    for one, two in rows:
        assert one[0] == two[0] and one[3] == two[3]  # the same samples
        assert abs(one[1] - two[1]) < 1e-5 and abs(one[2] - two[2]) < 1e-5 * max(1.0, one[2])
