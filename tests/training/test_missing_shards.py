"""data.on_missing: skip in a run: the same steps in every sitting, on every rank, and no step of nothing is taken."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.index import Index
from data_pipeline.loader import Loader
from distributed.ranks import run_ranks
from runs import assert_same_tensors, losses
from samples import random_documents, write_split
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import ParallelConfig, RunConfig, UserError, parse_config
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.missing import MissingShards
from sisa_dist.training.trainer import train


def config_of(tiny: RunConfig, output: Path, folder: Path, **changes: Any) -> RunConfig:
    tree = tiny.model_dump()
    tree["data"] |= {"folder": str(folder), "on_missing": "skip"} | changes.pop("data", {})
    tree["training"] |= {"eval_every": None} | changes
    return parse_config(tree | {"output_dir": str(output)}, source="test")


@pytest.fixture
def data(tiny: RunConfig, tmp_path: Path) -> Path:
    assert tiny.data.folder is not None
    shutil.copytree(tiny.data.folder, tmp_path / "data")
    return tmp_path / "data"


def shards(data: Path) -> list[Path]:
    return sorted((data / "train").glob("*.tar"))


def test_a_run_goes_on_without_and_a_resumed_one_the_same_way(
    tiny: RunConfig, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = shards(data)[::2]
    aside = tmp_path / "aside"
    aside.mkdir()
    stop = config_of(tiny, tmp_path / "stop", data, data={"on_missing": "stop"})
    for path in gone:
        shutil.move(path, aside)
    with pytest.raises(UserError, match=rf"{gone[0].name}: the shard is missing"):
        train(stop, quiet=True)
    with caplog.at_level(logging.WARNING):
        run = train(config_of(tiny, tmp_path / "a", data), quiet=True)
    told = [record.getMessage() for record in caplog.records if "goes on without it" in record.getMessage()]
    listed = json.loads((run / "missing_shards.json").read_text(encoding="utf-8"))
    assert len(told) == len(listed) > 0 and all(sum(name in line for line in told) == 1 for name in listed)
    assert listed.keys() <= {f"train/{path.name}" for path in gone} and set(listed.values()) <= set(range(1, 9))
    metrics = read_metrics(run)["train"]
    masked = [record["missing_windows"] for record in metrics]
    assert sum(masked) > 0 and 0 not in [listed[name] for name in listed]
    full = train(config_of(tiny, tmp_path / "full", Path(tiny.data.folder or "")), quiet=True)
    complete = read_metrics(full)["train"]
    assert not (full / "missing_shards.json").exists() and {r["missing_windows"] for r in complete} == {0}
    assert [r["digest"] for r in complete] == [r["digest"] for r in metrics]
    assert metrics[-1]["tokens"] == complete[-1]["tokens"] - 64 * sum(masked)
    # The shards are back, and the newest checkpoint is lost: what is done again is what was done.
    first = losses(run)
    for path in gone:
        shutil.move(aside / path.name, path)
    shutil.copytree(list_checkpoints(run)[-1], tmp_path / "kept")
    for checkpoint in list_checkpoints(run)[1:]:
        shutil.rmtree(checkpoint)
    train(config_of(tiny, tmp_path / "a", data), quiet=True)
    assert losses(run) == first
    assert_same_tensors(list_checkpoints(run)[-1], tmp_path / "kept")


def test_a_step_of_nothing_but_missing_windows_changes_nothing_and_many_end_the_run(
    tiny: RunConfig, data: Path, tmp_path: Path
) -> None:
    for path in shards(data):
        path.unlink()
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"no label counts in it, and the last 3 steps were skipped.*restore the shards"
    ):
        train(config_of(tiny, run, data, max_skipped_steps=3), quiet=True)
    records = read_metrics(run)["train"]
    assert [(r["skipped"], r["tokens"], r["missing_windows"]) for r in records] == [(True, 0, 4)] * 3


def test_a_damaged_record_is_one_line(tiny: RunConfig, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for rubbish in ("[1", '{"train/000000.tar": "x"}', "[]", "\udcff"):
        (tmp_path / "run" / "missing_shards.json").write_text(rubbish, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(UserError, match=r"missing_shards\.json: cannot be read .* remove it") as caught:
            train(config_of(tiny, tmp_path / "run", data), quiet=True)
        assert "\n" not in str(caught.value)


def _one_rank(folder: str) -> tuple[list[Any], dict[str, int], list[Any]]:
    """On each rank of one tp group, which read the same windows: rank 1's disk lacks two shards, rank 0's none."""
    mesh = init_mesh(ParallelConfig(tp=2), device="cpu")
    here = Path(folder) / f"rank{mesh.tp_rank}"
    rows, first, later = [], {}, []
    for sitting in range(2):  # the second: both have all, and go by the record
        place = here if sitting == 0 else Path(folder) / "rank0"
        loader = Loader(
            Index.load(place, absent_ok=True), seq_len=7, seed=5, global_batch_windows=4, micro_batch_size=4, lanes=3,
            prefetch=3, read_threads=2, on_missing="skip", dp_rank=mesh.dp_rank, dp_size=mesh.dp_size,
        )  # fmt: skip
        missing = MissingShards(loader, here.parent, mesh, step=1)
        with loader.steps(0) as stream:
            for step in range(1, 31):
                batch = missing.agreed(next(stream), step=step)
                (micro,) = batch.micro_batches
                row = (batch.digest, batch.missing_windows, micro.tokens.tolist(), micro.labels.tolist())
                (rows if sitting == 0 else later).append(row)
        first = missing.first
    return rows, first, later


def test_ranks_that_share_their_windows_agree_though_one_alone_misses_a_shard(tmp_path: Path) -> None:
    write_split(tmp_path / "rank0", random_documents(3, 60))
    shutil.copytree(tmp_path / "rank0", tmp_path / "rank1")
    for name in ("000001.tar", "000004.tar"):
        (tmp_path / "rank1" / name).unlink()
    (rows, first, later), other = run_ranks(_one_rank, 2, tmp_path / "ranks", str(tmp_path))
    assert (rows, first, later) == other
    assert first.keys() == {"train/000001.tar", "train/000004.tar"}
    assert json.loads((tmp_path / "missing_shards.json").read_text(encoding="utf-8")) == first
    assert rows == later and sum(row[1] for row in rows) > 4
