"""tools/extend_context.py: configs that resolve, one small run to its page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import extend_context
import pytest
import yaml
from extend_page import write_page

from sisa_dist.config import load_run

SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=64",
    "model.vocab_size=512",
    "training.global_batch_tokens=2048",
    "training.eval_windows=2",
    "evaluation.positions={seq_len: 2048, windows: 2, buckets: 8}",
    "evaluation.retrieval={tasks: [pairs], lengths: [512, 2048], depths: [0.5], items: 1}",
    *("stages.base.steps=4", "stages.base.training={seq_len: 512, micro_batch_size: 4}"),
    *("schedule.warmup_steps=1", "schedule.decay_steps=2", "stages.copies.steps=2"),
    *("stages.2k.steps=2", "stages.2k.training={seq_len: 1024, micro_batch_size: 2}"),
    *("stages.2k.schedule={warmup_steps: 0}", "stages.4k.schedule={warmup_steps: 0}"),
    *("stages.4k.steps=2", "stages.4k.training={seq_len: 2048, micro_batch_size: 1}"),
]


@pytest.mark.parametrize("system", ["sisa", "attention"])
def test_every_method_stretches_the_same_base_stage_by_stage(tmp_path: Path, system: str) -> None:
    one = extend_context._extension(system, [], tmp_path)
    for method in extend_context.METHODS:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(one.config(method)))
        run = load_run(path)
        assert [stage.config.training.seq_len for stage in run.stages] == [2048, 4096]
        assert one.trained == 512
        assert run.stages[0].config.start.weights == str(one.base) != one.config(method)["output_dir"]
        models = [stage.config.model for stage in run.stages]
        if method == "none":
            assert all(model.rope_scaling is None and model.rope_theta == 1e4 for model in models)
        elif method == "base":
            assert all(model.rope_theta == 5e5 for model in models)
        else:
            assert [model.rope_scaling.factor for model in models] == [4.0, 8.0]


def test_the_base_run_is_all_before_the_stages_that_stretch(tmp_path: Path) -> None:
    one = extend_context._extension("sisa", [], tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(one.config(None)))
    copies, base = load_run(path).stages
    assert (copies.name, base.name, base.config.training.seq_len) == ("copies", "base", 512)
    shares = [{name: share for name, share in stage.config.data.shares.items() if share} for stage in (copies, base)]
    assert list(shares[0]) == ["copies"] and set(shares[1]) == {"text", "short"}


def test_systems_are_of_one_size(tmp_path: Path) -> None:
    trees = [extend_context._extension(system, [], tmp_path).tree for system in ("sisa", "attention")]
    assert trees[0]["model"]["d_ff"] < trees[1]["model"]["d_ff"]


def test_what_is_refused_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert extend_context.main(["--methods", "yarm", "--out", str(tmp_path)]) == 2
    assert "there is no yarm: choose of none, base" in capsys.readouterr().err
    assert extend_context.main(["--systems", "sisaa", "--out", str(tmp_path)]) == 2
    assert "there is no sisaa" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert extend_context.main(["--systems", "mamba2", "--methods", "none,yarn", "--out", str(tmp_path)]) == 2
    assert "no layer's mixer reads it" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))  # before anything is made


def test_a_page_has_every_curve(tmp_path: Path) -> None:
    results = {
        "positions": {
            "sources": {
                "text": {
                    "seq_len": 80,
                    "from": list(range(0, 80, 10)),
                    "loss_by_position": [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 7.0],
                    "tokens_by_position": [10] * 8,
                }
            }
        },
        "retrieval": {"lengths": [40, 80], "score_by_length": [1.0, 0.25], "effective_length": 40},
    }
    table = write_page({"sisa": {"yarn": {"before": results, "after": results}}}, tmp_path, trained=20)
    assert "| sisa | yarn | before | 2.500 | 7.000 | 40: 100, 80: 25 | 40 |" in table
    assert (tmp_path / "extension.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "extension.json").read_text())["sisa"]["yarn"]["after"] == results


@pytest.mark.slow
def test_a_small_run_to_its_page_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = sorted((Path(__file__).parents[2] / "data_pipeline").glob("*.py"))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text.read_text(encoding="utf-8"), encoding="utf-8")
    given = [
        "--methods",
        "base,yarn",
        "--systems",
        "sisa",
        "--out",
        str(tmp_path / "out"),
        "--text",
        f"{tmp_path}/*.txt",
    ]
    given += [word for key in SMALL for word in ("--set", key)]
    assert extend_context.main(given) == 0
    table = capsys.readouterr().out
    assert sum(line.startswith("| sisa |") for line in table.splitlines()) == 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert extend_context.main([*given, "--set", "model.n_layers=3"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert extend_context.main(given) == 0  # nothing is done again
    assert {path: path.stat().st_mtime_ns for path in written} == {
        path: path.stat().st_mtime_ns if path.name == "extension.json" else time for path, time in written.items()
    }
