"""Every loader that is installed has its row and serves the same tokens; one that serves others is found out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_data
import data_child
import pytest
import torch
from data_loaders import KINDS

TINY = ["data", "--megatokens", "0.03", "--seq-len", "64", "--rows", "4", "--step", "2", "--rounds", "1"]


def arguments(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark_data.add_parser(parser.add_subparsers())
    return parser.parse_args([*TINY, "--member-tokens", "1024", "--folder", str(folder), *more])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own imports torch, which takes longer than all the rest."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark_data, "_child", lambda job: data_child.main(json.loads(json.dumps(job))))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", ["2", pytest.param("1", marks=pytest.mark.slow)])
def test_every_loader_has_its_row_and_serves_the_same_tokens(tmp_path: Path, in_process: None, workers: str) -> None:
    asked = arguments(tmp_path, "--workers", workers, "--loaders", "ours", "memory map", "webdataset")
    figures = benchmark_data.data(asked)
    assert set(figures["loaders"]) == {f"{name}, {workers}" for name in ("ours", "memory map", "webdataset")}
    for row in figures["loaders"].values():
        assert min(row.values()) > 0 and {"cold", "first", "warm", "resume, s", "warm / memory map"} <= set(row)
    ours, whole_tars = (figures["http"][name]["bytes of shards a token"] for name in ("ours", "webdataset"))
    assert 2 <= ours < 4 and 2 < whole_tars < 4  # 2 bytes a token; what is read ahead of the end; a tar's headers
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_skipped_with_its_reason(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KINDS["streaming"], "requires", "no_such_library")
    asked = arguments(tmp_path, "--workers", "1", "--loaders", "memory map", "streaming")
    figures = benchmark_data.data(asked)
    assert figures["skipped"] == {"streaming": "no_such_library is not installed"}
    assert set(figures["loaders"]) == {"memory map, 1"}


def test_a_loader_that_serves_other_tokens_is_found_out(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = KINDS["memory map"].write

    def other(tokens: Any, folder: Path, **sizes: int) -> None:
        changed = tokens.copy()
        changed[7] += 1
        true(changed, folder, **sizes)

    monkeypatch.setattr(KINDS["memory map"], "write", staticmethod(other))
    with pytest.raises(SystemExit, match="it served others"):
        benchmark_data.data(arguments(tmp_path, "--workers", "1", "--loaders", "memory map"))


@pytest.mark.slow
def test_a_measurement_in_a_process_of_its_own(tmp_path: Path) -> None:
    figures = benchmark_data.data(arguments(tmp_path, "--workers", "1", "--loaders", "ours"))
    assert figures["loaders"]["ours, 1"]["cold"] > 0
