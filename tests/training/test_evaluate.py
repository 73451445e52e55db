"""Evaluating and sampling a checkpoint: by its own tokenizer, wherever its run lies, and never a silent skip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.prepare import prepare
from sisa_dist.config import RunConfig, UserError, load_config
from sisa_dist.training.evaluate import evaluate_checkpoint
from sisa_dist.training.generate import stream_text
from sisa_dist.training.trainer import train

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NIAH = ["evaluation.niah=true", "evaluation.niah_items=2", "evaluation.niah_context=200"]


def prepared(overrides: list[str]) -> RunConfig:
    config = load_config(QUICKSTART, overrides)
    prepare(config, quiet=True)
    return config


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the run `runs/a`, made there under that relative name, its data inside it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        overrides = [*tiny_overrides, "training.steps=2", "data.folder=null", "output_dir=runs/a"]
        train(prepared(overrides), quiet=True)
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, and the working directory."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_a_moved_run_is_evaluated_on_its_own_data_from_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, path = evaluate_checkpoint("runs/a", quiet=True)
    assert path == Path("runs/a/evaluation.json") and "skipped" not in results
    sample = "".join(stream_text("runs/a", prompt="def ", max_tokens=9, temperature=0, top_p=1, seed=0))
    (home / "runs" / "a").rename(home / "runs" / "b")
    monkeypatch.chdir("/")
    checkpoint = home / "runs" / "b" / "checkpoints" / "step_00000002"
    assert evaluate_checkpoint(home / "runs" / "b", quiet=True)[0]["perplexity"] == results["perplexity"]
    for inside, name in ((checkpoint, "."), (checkpoint.parent, "step_00000002")):
        monkeypatch.chdir(inside)
        moved, path = evaluate_checkpoint(name, quiet=True)
        assert moved["perplexity"] == results["perplexity"]
        assert path.resolve() == home / "runs" / "b" / "evaluation.json"
    assert "".join(stream_text(name, prompt="def ", max_tokens=9, temperature=0, top_p=1, seed=0)) == sample


def test_data_of_another_tokenizer_is_refused(home: Path, tiny_overrides: list[str]) -> None:
    other = [*tiny_overrides, "data.tokenizer.model_type=unigram", f"data.folder={home / 'other'}"]
    prepared([*other, f"output_dir={home / 'other-run'}"])
    with pytest.raises(UserError, match="made with another tokenizer than") as caught:
        evaluate_checkpoint("runs/a", [f"data.folder={home / 'other'}"], quiet=True)
    assert "\n" not in str(caught.value) and not Path("runs/a/evaluation.json").exists()
    # The same, where the run's own folder was prepared anew.
    shutil.rmtree("runs/a/data")
    shutil.copytree("other", "runs/a/data")
    with pytest.raises(UserError, match="made with another tokenizer than"):
        evaluate_checkpoint("runs/a", quiet=True)
    # What the message advises works.
    own = "runs/a/checkpoints/step_00000002/tokenizer.model"
    prepared([*tiny_overrides, f"data.tokenizer.path={own}", "data.folder=again", "output_dir=again-run"])
    assert evaluate_checkpoint("runs/a", ["data.folder=again"], quiet=True)[0]["perplexity"]["tokens"] > 100


def test_without_data_lambada_and_niah_run_and_perplexity_says_why_not(home: Path) -> None:
    (home / "lambada.jsonl").write_text('{"text": "one two three"}\n', encoding="utf-8")
    asked = [*NIAH, "evaluation.lambada=lambada.jsonl"]
    whole, _ = evaluate_checkpoint("runs/a", asked, quiet=True)
    shutil.rmtree("runs/a/data")
    results, path = evaluate_checkpoint("runs/a", asked, quiet=True)
    assert (results["lambada"], results["niah"]) == (whole["lambada"], whole["niah"])
    assert "perplexity" not in results and "no prepared data in runs/a/data" in results["skipped"]["perplexity"]
    assert json.loads(path.read_text(encoding="utf-8"))["skipped"] == results["skipped"]
    with pytest.raises(UserError, match=r"nothing to evaluate: no prepared data in runs/a/data"):
        evaluate_checkpoint("runs/a", quiet=True)


def test_an_absent_folder_for_the_results_is_found_before_the_work(home: Path) -> None:
    shutil.rmtree("runs/a/data")  # evaluating would fail on this
    with pytest.raises(UserError, match="there is no folder missing: make it"):
        evaluate_checkpoint("runs/a", out=Path("missing/x.json"), quiet=True)
