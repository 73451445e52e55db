"""Passes inside `prepare`: what they take out is the same for any number of workers, and counted in prepared.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from corpora import SMALL, write_corpus
from data_pipeline.passes import build_passes, run_passes
from data_pipeline.prepare import prepare
from data_pipeline.sources import Corpus
from samples import contents, documents_of
from sisa_dist.config import RunConfig

MakeConfig = Callable[..., RunConfig]
PASSES = {"length": {"min_characters": 300}, "exact_dedup": {}}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Every document twice, in files far apart."""
    write_corpus(tmp_path / "mixed")
    shutil.copytree(tmp_path / "mixed", tmp_path / "mixed" / "z")
    return str(tmp_path / "mixed")


def test_the_same_documents_go_on_any_number_of_workers(source: str, make_config: MakeConfig, tmp_path: Path) -> None:
    made = {}
    for workers in (1, 2, 3):
        config = make_config(source, folder=f"w{workers}", workers=workers, passes=PASSES, member_tokens=256)
        made[workers] = contents(prepare(config, quiet=True, sizes=SMALL))
    assert made[1] == made[2] == made[3]
    kept = [document.text for document in run_passes(Corpus(source), build_passes(config.data.passes))]
    assert 100 < len(kept) < 330
    folder = tmp_path / "w1"
    assert sorted(documents_of(folder, "train") + documents_of(folder, "validation")) == sorted(kept)
    noted = json.loads((folder / "prepared.json").read_text())
    removed = noted["passes"]["removed"]
    short, copies = (sum(each["documents"] for each in removed[name].values()) for name in ("length", "exact_dedup"))
    assert noted["passes"]["documents"] == 660 and 660 - short - copies == len(kept) and copies == len(kept)
    assert sum(noted["counts"][split]["documents"] for split in ("train", "validation")) == len(kept)
    assert sum(noted["counts"][split]["bytes"] for split in ("train", "validation")) == sum(
        len(text.encode()) for text in kept
    )


def test_a_kill_between_decisions_changes_nothing(
    source: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions hang together: half of them taken, all are taken again."""
    import data_pipeline.prepare as module

    whole = contents(prepare(make_config(source, folder="whole", passes=PASSES, workers=1), quiet=True, sizes=SMALL))
    config = make_config(source, passes=PASSES, workers=1)
    true, taken = module.write_dropped, [0]

    def stop(*arguments: object) -> Path:
        taken[0] += 1
        if taken[0] == 5:
            raise KeyboardInterrupt
        return true(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_dropped", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, quiet=True, sizes=SMALL)
    assert len(list(tmp_path.glob("data.building/*/slices/*.dropped"))) == 4
    assert contents(prepare(config, quiet=True, sizes=SMALL)) == whole
