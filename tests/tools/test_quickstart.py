"""The first run of a new user, on a model of 10 000 parameters: with held-out text and without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quickstart

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NO_VALIDATION = ["data.validation_fraction=0", "training.eval_every=null"]


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ([], ["perplexity"]),
        ([*NO_VALIDATION, "evaluation.niah=true", "evaluation.niah_items=2"], ["niah", "skipped"]),
        (NO_VALIDATION, []),
    ],
)
def test_it_ends_with_a_table_of_what_was_made(
    settings: list[str],
    evaluated: list[str],
    tiny_overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    overrides = [*tiny_overrides, "training.steps=2", "data.folder=null", f"output_dir={run}", *settings]
    assert quickstart.main([str(CONFIG), *(f"--set={override}" for override in overrides)]) == 0
    out = capsys.readouterr().out
    assert "quickstart: done in" in out and "training loss, first → last" in out
    assert ("validation perplexity" in out) == ("perplexity" in evaluated)
    assert ("needle in a haystack" in out) == ("niah" in evaluated)
    results = run / "evaluation.json"
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    assert [name for name in found if name not in ("checkpoint", "step")] == evaluated
    assert (run / "curves.png").is_file() and (run / "sample.txt").is_file()
