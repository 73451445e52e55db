"""Mixtures, packing and changes of the data in mid-run, through `sisa train`'s own path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import prepare
from runs import losses
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import RunConfig, UserError, dump_config, parse_config
from sisa_dist.training.evaluate import evaluate_checkpoint
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.run_data import open_data
from sisa_dist.training.trainer import train


def changed(config: RunConfig, folder: Path | None = None, **sections: dict[str, Any]) -> RunConfig:
    """As a user's file would say it: checked again."""
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] |= values
    if folder is not None:
        tree["output_dir"] = str(folder)
    return parse_config(tree, source="test")


@pytest.fixture(scope="module")
def second(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another prepared folder with the tokenizer of `tiny`."""
    folder = tmp_path_factory.mktemp("second")
    own = dict(override.split("=", 1) for override in tiny_overrides)
    text = "".join(source.read_text(encoding="utf-8") for source in sorted(Path(__file__).parent.glob("*.py")))
    assert len(text) >= 20 * 5000
    for number in range(20):  # of one size however many tests there are: epochs of it are counted below
        (folder / f"{number}.txt").write_text(text[number * 5000 :][:5000], encoding="utf-8")
    tree = {
        "model": {"vocab_size": 512, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "d_s": 8},
        "data": {
            "input": f"{folder}/*.txt",
            "folder": str(folder / "data"),
            "tokenizer": {"path": own["data.folder"] + "/tokenizer.model"},
            "member_tokens": 256,
            "validation_fraction": 0.3,
        },
        "schedule": {"warmup_steps": 0},
        "training": {"steps": 1, "seq_len": 64, "global_batch_tokens": 256},
    }
    prepare(parse_config(tree, source="second"), quiet=True)
    return str(folder / "data")


DEFAULTS = {"input": "python-stdlib", "folder": None, "member_tokens": 16_384, "shard_members": 256}


def mixed(config: RunConfig, folder: Path, mixture: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    data = DEFAULTS | {"validation_fraction": 0.01, "mixture": mixture}
    return changed(config, folder, data=data | sections.pop("data", {}), **sections)


def test_a_mixture_trains_counts_its_epochs_and_resumes(tiny: RunConfig, second: str, tmp_path: Path) -> None:
    sources = {"ours": {"folder": tiny.data.folder, "weight": 3}, "tests": {"folder": second, "weight": 1}}
    config = mixed(tiny, tmp_path / "mixed", sources)
    run = train(config, quiet=True)
    metrics = read_metrics(run)
    last = metrics["train"][-1]
    assert last["epochs"].keys() == {"ours", "tests"} and 0 < last["epochs"]["tests"] < 1
    described = json.loads((list_checkpoints(run)[-1] / "data.json").read_text(encoding="utf-8"))
    assert described["order"]["mixture"] == {"ours": 12288, "tests": 4096}
    assert described["sources"]["tests"]["tokens"] > 1000
    found = metrics["evaluation"][-1]
    assert found["validation_losses"].keys() == {"ours", "tests"}
    mean = 0.75 * found["validation_losses"]["ours"] + 0.25 * found["validation_losses"]["tests"]
    assert found["validation_loss"] == pytest.approx(mean, rel=1e-12)
    branch = changed(config, tmp_path / "b", start={"resume": str(list_checkpoints(run)[0])})
    train(branch, quiet=True)
    assert losses(tmp_path / "b") == losses(run)[6:]
    nowhere = f"data.mixture.tests.folder={tmp_path / 'nowhere'}"
    part, _ = evaluate_checkpoint(run, [nowhere], quiet=True)
    assert part["perplexity"].keys() == {"sources"} and part["perplexity"]["sources"].keys() == {"ours"}
    assert "set data.mixture.tests.folder to where it is" in part["skipped"]["perplexity of tests"]
    with pytest.raises(UserError, match=r"nothing to evaluate: .*set data\.mixture\.ours\.folder to where it is"):
        evaluate_checkpoint(run, [nowhere, f"data.mixture.ours.folder={tmp_path / 'nowhere'}"], quiet=True)
    results, _ = evaluate_checkpoint(run, quiet=True)
    assert results["perplexity"]["sources"]["tests"]["unigram_perplexity"] > 1
    assert results["perplexity"]["loss"] == pytest.approx(
        0.75 * results["perplexity"]["sources"]["ours"]["loss"]
        + 0.25 * results["perplexity"]["sources"]["tests"]["loss"]
    )


def test_too_many_epochs_or_tokens_are_refused_before_the_first_step(
    tiny: RunConfig, second: str, tmp_path: Path
) -> None:
    sources: dict[str, Any] = {
        "ours": {"folder": tiny.data.folder, "weight": 1},
        "tests": {"folder": second, "weight": 1, "max_epochs": 0.01},
    }
    with pytest.raises(UserError, match=r"data\.mixture\.tests: 0\.\d\d epochs are planned and max_epochs is 0\.01"):
        train(mixed(tiny, tmp_path / "a", sources), quiet=True)
    sources["tests"]["max_epochs"] = 5
    train(mixed(tiny, tmp_path / "a", sources), quiet=True)
    budget = {name: {"folder": sources[name]["folder"], "tokens": 900} for name in sources}
    with pytest.raises(UserError, match=r"2,048 tokens are planned .* sum to 1,800: lower training\.steps by 1"):
        train(mixed(tiny, tmp_path / "b", budget), quiet=True)
    train(mixed(tiny, tmp_path / "b", budget, training={"steps": 7}), quiet=True)
    uneven = {"ours": budget["ours"] | {"tokens": 10_000_000}, "tests": budget["tests"] | {"tokens": 960}}
    with pytest.raises(UserError, match=r"data\.mixture\.tests: [\d,]+ tokens are planned and its tokens are 960"):
        train(mixed(tiny, tmp_path / "c", uneven, training={"steps": 39_000}), quiet=True)


def test_the_same_data_twice_in_a_mixture_is_named(tiny: RunConfig, tmp_path: Path) -> None:
    assert tiny.data.folder is not None
    copy = str(shutil.copytree(tiny.data.folder, tmp_path / "copy"))
    sources = {"a": {"folder": tiny.data.folder, "weight": 1}, "b": {"folder": copy, "weight": 1}}
    with pytest.raises(UserError, match=r"data\.mixture: a and b hold the same data, which would be read twice"):
        open_data(mixed(tiny, tmp_path / "run", sources))
    sources["b"]["weight"] = 0  # kept for a stage that read it before
    assert open_data(mixed(tiny, tmp_path / "run", sources)).sources.keys() == {"a", "b"}


def test_folders_of_two_tokenizers_are_named(tiny: RunConfig, tmp_path: Path) -> None:
    own = changed(tiny, tmp_path / "own", data={"folder": None, "tokenizer": {"model_type": "unigram"}})
    prepare(own, quiet=True)
    sources = {"a": {"folder": tiny.data.folder, "weight": 1}, "b": {"folder": str(own.data_folder), "weight": 1}}
    with pytest.raises(UserError, match=r"data\.mixture: b: made with another tokenizer than .*data: prepare with"):
        train(mixed(tiny, tmp_path / "run", sources), quiet=True)
    sources["b"]["folder"] = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"data\.mixture\.b: .*absent: no prepared data here"):
        train(mixed(tiny, tmp_path / "run", sources), quiet=True)


def test_there_is_nothing_to_prepare_where_folders_are_made_elsewhere(
    tiny: RunConfig, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """launch.sh prepares before every training."""
    sources = {"a": {"folder": tiny.data.folder, "weight": 1}, "b": {"folder": second, "weight": 1}}
    for config in (
        mixed(tiny, tmp_path / "run", sources),
        changed(tiny, tmp_path / "run", data={"folder": "https://host/data"}),
    ):
        assert prepare(config) is None
        assert capsys.readouterr().out.startswith("nothing to prepare: ")
        with pytest.raises(UserError, match="prepare by a config of its own"):
            prepare(config, force=True)


def test_best_fit_trains_and_says_how_much_is_padding(tiny: RunConfig) -> None:
    run = train(changed(tiny, data={"packing": "best_fit", "document_mask": True}), quiet=True)
    described = json.loads((list_checkpoints(run)[-1] / "data.json").read_text(encoding="utf-8"))
    assert 0 < described["padding"]["train"] < 0.2
    steps = read_metrics(run)["train"]
    assert all(0 <= step["padding"] < 1 for step in steps)
    assert all(step["tokens"] <= 256 * step["step"] for step in steps)


def test_sequence_length_packing_and_sources_change_in_mid_run(
    tiny: RunConfig, second: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused without the explicit key; with it, the new stage begins with what is unread, and resumes to the bit."""
    first = train(tiny, quiet=True)
    resume = {"resume": str(list_checkpoints(first)[0])}
    longer = changed(tiny, tmp_path / "long", start=resume, training={"seq_len": 128, "steps": 14})
    with pytest.raises(UserError, match=r"training\.seq_len=64, .* 128: .*start\.data=continue"):
        train(longer, quiet=True)
    longer = changed(longer, start={"data": "continue"})
    second_stage = train(longer, quiet=True)
    state = read_state(list_checkpoints(second_stage)[-1])
    assert state.stage is not None and state.stage["number"] == 1 and state.cursor == (14 - 6) * 2
    assert state.stage["sources"]["train"]["rest"]["epoch"] == 0
    epochs = [step["epochs"]["train"] for step in read_metrics(second_stage)["train"]]
    whole = read_metrics(first)["train"]
    assert epochs == sorted(epochs) and whole[5]["epochs"]["train"] < epochs[0] < whole[7]["epochs"]["train"] + 0.02
    # A resume inside the stage, with the key still in the config.
    branch = changed(longer, tmp_path / "branch", start={"resume": str(list_checkpoints(second_stage)[0])})
    train(branch, quiet=True)
    found = losses(tmp_path / "branch")
    assert found and found == losses(second_stage)[-len(found) :]
    # A source joins, under another name for the first, and documents are packed whole.
    sources = {"ours": {"folder": tiny.data.folder, "weight": 1}, "tests": {"folder": second, "weight": 1}}
    third = mixed(
        tiny,
        tmp_path / "third",
        sources,
        start={"resume": str(second_stage), "data": "continue"},
        data={"packing": "best_fit"},
        training={"steps": 20, "seq_len": 128},
    )
    with caplog.at_level("INFO", logger="sisa_dist"):
        train(third, quiet=True)
    (told,) = [record.message for record in caplog.records if "stage 3 of the data begins" in record.message]
    assert "packing was None, is 'best_fit'" in told
    assert "source train is now called ours; source tests comes in" in told and "seq_len" not in told
    state = read_state(list_checkpoints(tmp_path / "third")[-1])
    assert state.stage is not None and state.stage["number"] == 2 and state.cursor == 6 * 2
    assert state.stage["sources"].keys() == {"ours"}
    assert len(json.dumps(state.stage)) < 2000
    assert read_metrics(tmp_path / "third")["train"][-1]["epochs"]["ours"] > epochs[-1]


def test_data_made_anew_is_not_continued(tiny: RunConfig, second: str, tmp_path: Path) -> None:
    """Under its old name too: the old data or the weights alone are what one can go on with."""
    run = train(tiny, quiet=True)
    start = {"resume": str(run), "data": "continue"}
    other = changed(tiny, tmp_path / "other", start=start, data=DEFAULTS | {"validation_fraction": 0.01})
    mixture = {"train": {"folder": second, "weight": 1}}
    with pytest.raises(
        UserError, match=r"source train holds other data .*: give the old data .*start\.weights="
    ) as error:
        train(mixed(other, tmp_path / "other", mixture), quiet=True)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_in_its_own_folder_in_a_new_order(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    other = changed(tiny, data={"lanes": 5}, training={"steps": 10}, start={"data": "continue"})
    with pytest.raises(UserError, match="this run was started with"):
        train(other, quiet=True)
    run = train(other, accept_changes=True, quiet=True)
    assert [row[0] for row in losses(run)] == list(range(1, 11))
    state = read_state(list_checkpoints(run)[-1])
    assert (state.step, state.cursor) == (10, 8) and state.stage is not None


def test_steps_done_again_must_read_the_same_samples(tiny: RunConfig, tmp_path: Path) -> None:
    run = train(tiny, quiet=True)
    newest = list_checkpoints(run)[-1]
    metrics = run / "metrics.jsonl"

    def forget_the_last_two_steps() -> None:
        for path in sorted(newest.rglob("*"), reverse=True):
            path.unlink()
        newest.rmdir()

    forget_the_last_two_steps()
    text = metrics.read_text(encoding="utf-8")
    train(tiny, quiet=True)  # steps 7 and 8 again
    assert losses(run)[6:] == [row for row in losses(run) if row[0] > 6] and len(losses(run)) == 8
    forget_the_last_two_steps()
    digest = losses(run)[7][3]
    metrics.write_text(text.replace(digest, "0" * 16), encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"step 8: done again, .* \(digest 0000000000000000 .*, {digest} now\)"
    ) as error:
        train(tiny, quiet=True)
    assert "\n" not in str(error.value)
    metrics.write_text(text.replace(digest, "0" * 16), encoding="utf-8")
    train(tiny, accept_changes=True, quiet=True)
    assert losses(run)[7][3] == digest


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"mixture": {"a": {"folder": "x"}}}, "data.mixture.a: a source has a weight or a number of tokens"),
        ({"mixture": {"a": {"folder": "x", "weight": 1, "tokens": 1}}}, "set one of the two"),
        ({"mixture": {"a": {"folder": "x", "weight": 0}}}, "no source has a weight above 0"),
        ({"mixture": {}}, "no source has a weight above 0"),
        (
            {"mixture": {"a": {"folder": "x", "weight": 1}, "b": {"folder": "y", "tokens": 5}}},
            "give all of them the same",
        ),
        ({"mixture": {"a.b": {"folder": "x", "weight": 1}}}, "mixture.a.b: a source's name is of letters"),
        ({"mixture": {"a": {"folder": "x", "weight": 1}}, "folder": "z"}, "folder has no effect beside mixture"),
        ({"mixture": {"a": {"folder": "x", "wieght": 1}}}, "data.mixture.a.wieght: unknown key; did you mean weight"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_one_line(tiny: RunConfig, data: dict[str, Any], said: str) -> None:
    tree = tiny.model_dump()
    tree["data"] = data
    with pytest.raises(UserError) as error:
        parse_config(tree, source="test")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mixture_s_config_is_read_back(tiny: RunConfig, tmp_path: Path) -> None:
    import yaml

    sources = {"a": {"folder": "x", "tokens": 10_000, "max_epochs": 2}, "b": {"folder": "y", "tokens": 5}}
    config = mixed(tiny, tmp_path, sources)
    assert parse_config(yaml.safe_load(dump_config(config)), source="again") == config
    assert config.data.shares == {"a": 10_000.0, "b": 5.0}
