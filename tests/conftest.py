"""What every test shares: one thread a process, and a tiny prepared run.

Ranks and helpers share the cores, and on one thread sums fall in one order everywhere.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distributed.forking  # noqa: F401  before anything starts its server
from data_pipeline.prepare import prepare
from floors import check_floors
from runs import QUICKSTART
from sisa_dist.config import RunConfig, load_config

torch.set_num_threads(1)


TINY = [
    "model.vocab_size=512",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=48",
    "model.d_s=8",
    "data.member_tokens=256",
    "data.shard_members=4",
    "data.validation_fraction=0.2",
    "data.lanes=3",
    "schedule.warmup_steps=2",
    "training.steps=8",
    "training.seq_len=64",
    "training.micro_batch_size=2",
    "training.global_batch_tokens=256",
    "training.eval_every=4",
    "training.eval_windows=4",
    "training.checkpoint_every=3",
    "evaluation.niah=false",
]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """`-m gpu` on a machine with a GPU fails where every test was skipped: it would prove nothing."""
    check_floors(session, exitstatus)
    wanted = session.config.getoption("markexpr").replace("not gpu", "")
    if "gpu" not in wanted or not torch.cuda.is_available() or session.config.option.collectonly or exitstatus:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("no gpu test ran on this machine, which has a GPU", red=True)
        session.exitstatus = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose ranks use every core evenly between the others, some of which mostly wait: by name, the cores stood
    half idle at the end."""
    files = list(dict.fromkeys(item.path for item in items))
    kinds = [[file for file in files if (file.parent.name == "distributed") == ranks] for ranks in (True, False)]
    place = {file: (number + 0.5) / len(kind) for kind in kinds for number, file in enumerate(kind)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left() -> Iterator[None]:
    """What trains in the process of the tests makes one, beside which the next file could pretend none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of configs/quickstart.yaml for a model of 10 000 parameters on prepared text of this repository."""
    root = tmp_path_factory.mktemp("tiny")
    sources = sorted((Path(__file__).parents[1] / "data_pipeline").glob("*.py"))
    for number, source in enumerate(sources):
        (root / f"{number}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    overrides = [*TINY, f"data.input={root}/*.txt", f"data.folder={root / 'data'}", f"output_dir={root / 'run'}"]
    prepare(load_config(QUICKSTART, overrides), quiet=True)
    return overrides


@pytest.fixture
def tiny(tiny_overrides: list[str], tmp_path: Path) -> RunConfig:
    return load_config(QUICKSTART, [*tiny_overrides, f"output_dir={tmp_path / 'run'}"])
