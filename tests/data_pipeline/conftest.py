"""Small corpora and configs made on the spot, so that no test of the data needs a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import prepare
from samples import make_text
from sisa_dist.config import RunConfig, parse_config


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """120 .txt files with different texts."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i:03d}.txt").write_text(make_text(i), encoding="utf-8")
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """make_config(input, folder=…, **data keys): a config of a tiny model over `input`."""

    def make(source: str | list[str], *, folder: str = "data", vocab_size: int = 420, **data: Any) -> RunConfig:
        tree = {
            "model": {"vocab_size": vocab_size, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "d_s": 2},
            "schedule": {"warmup_steps": 0},
            "training": {"steps": 1, "seq_len": 16, "global_batch_tokens": 64},
            "data": {
                "input": source,
                "folder": str(tmp_path / folder),
                "member_tokens": 512,
                "shard_members": 8,
                "validation_fraction": 0.1,
            }
            | data,
        }
        return parse_config(tree, source="test")

    return make


@pytest.fixture(scope="session")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two prepared folders of one tokenizer and different texts, to be read and never written."""
    root = tmp_path_factory.mktemp("prepared")
    made: list[Path] = []
    for name, seeds in (("a", range(60)), ("b", range(100, 130))):
        (root / f"text-{name}").mkdir()
        for i in seeds:
            (root / f"text-{name}" / f"{i:03d}.txt").write_text(make_text(i), encoding="utf-8")
        tree = {
            "model": {"vocab_size": 420, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "d_s": 2},
            "schedule": {"warmup_steps": 0},
            "training": {"steps": 1, "seq_len": 16, "global_batch_tokens": 64},
            "data": {
                "input": str(root / f"text-{name}"),
                "folder": str(root / name),
                "member_tokens": 512,
                "shard_members": 8,
                "validation_fraction": 0.1,
                "tokenizer": {"path": str(made[0] / "tokenizer.model")} if made else {},
            },
        }
        made.append(prepare(parse_config(tree, source="test"), quiet=True))
    return made[0], made[1]
