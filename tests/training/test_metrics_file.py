"""Reading metrics.jsonl: what a kill and a resume leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sisa_dist.config import UserError
from sisa_dist.training.metrics_file import keep_until, read_metrics


def line(kind: str, step: int, **values: object) -> str:
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


def write(folder: Path, text: str) -> Path:
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_by_kind_sorted_by_step_and_the_last_one_counts(tmp_path: Path) -> None:
    text = line("train", 1, loss=3.0) + line("train", 2, loss=2.0) + line("train", 3, loss=1.5)
    text += line("evaluation", 2, validation_loss=2.2) + "\n" + line("layers", 2, **{"lambda": [0.3, None]})
    text += line("train", 2, loss=2.5) + line("evaluation", 2, validation_loss=2.4)  # resumed from step 1
    found = read_metrics(write(tmp_path, text))
    assert sorted(found) == ["evaluation", "layers", "train"]
    assert [(record["step"], record["loss"]) for record in found["train"]] == [(1, 3.0), (2, 2.5), (3, 1.5)]
    assert [record["validation_loss"] for record in found["evaluation"]] == [2.4]
    assert found["layers"][0]["lambda"] == [0.3, None]


def test_a_last_line_cut_anywhere_is_ignored(tmp_path: Path) -> None:
    whole, last = line("train", 1, loss=3.0), line("train", 2, loss=2.0, name="µ").rstrip("\n")
    for end in range(len(last)):
        assert [r["step"] for r in read_metrics(write(tmp_path, whole + last[:end]))["train"]] == [1]
    assert [r["step"] for r in read_metrics(write(tmp_path, whole + last))["train"]] == [1, 2]
    (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + '{"kind": "µ'.encode()[:-1])
    assert len(read_metrics(tmp_path)["train"]) == 1


@pytest.mark.parametrize("broken", ['{"kind": "tra\n', "3\n", '{"step": 2}\n', '{"kind": "train", "step": null}\n'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    write(tmp_path, line("train", 1, loss=3.0) + broken + line("train", 3, loss=1.0))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics record") as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            read_metrics(folder)
    assert read_metrics(write(tmp_path, "")) == {}


def test_cut_back_to_a_step_only_what_comes_after_goes(tmp_path: Path) -> None:
    first = line("train", 1, loss=3.0) + line("train", 2, loss=2.0) + line("evaluation", 2, validation_loss=2.5)
    path = write(tmp_path, first + line("train", 3, loss=1.0) + line("layers", 3) + '{"kind": "train", "st')
    path = path / "metrics.jsonl"
    keep_until(path, 2)
    assert path.read_text(encoding="utf-8") == first
    before = path.stat().st_ino
    keep_until(path, 2)
    assert path.stat().st_ino == before  # nothing to drop, nothing written
    write(tmp_path, first + "broken\n" + line("train", 3, loss=1.0))
    keep_until(path, 2)
    assert path.read_text(encoding="utf-8") == first + "broken\n"
    keep_until(path, 0)
    assert path.read_text(encoding="utf-8") == "broken\n"
    keep_until(tmp_path / "absent.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
