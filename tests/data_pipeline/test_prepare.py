"""`prepare` end to end: what it makes and what it leaves alone. Kills: test_prepare_kills.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.holdout import split_documents, split_value
from data_pipeline.index import Index
from data_pipeline.loader import Loader, validation_batches
from data_pipeline.prepare import prepare
from data_pipeline.sources import Document
from data_pipeline.tokenizer import Tokenizer
from samples import contents, documents_of, make_text
from sisa_dist.config import RunConfig, UserError
from sisa_dist.training.run_data import open_data

MakeConfig = Callable[..., RunConfig]


def refusal(config: RunConfig, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, quiet=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_document_comes_back_once_and_held_out_ones_are_never_trained_on(
    corpus_folder: Path, make_config: MakeConfig
) -> None:
    for i in range(120):  # a copy of every document: it must fall on the same side
        shutil.copy(corpus_folder / f"{i:03d}.txt", corpus_folder / f"copy{i:03d}.txt")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus_folder.iterdir())]
    folder = prepare(make_config(str(corpus_folder)), quiet=True)
    train, validation = documents_of(folder, "train"), documents_of(folder, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert len(validation) > 4 and all(split_value(text) < 0.1 for text in validation)
    in_order = [text for text in texts if split_value(text) >= 0.1]
    assert train != in_order and sorted(train) == sorted(in_order)
    counts = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["counts"]
    assert counts["train"]["bytes"] == sum(len(text.encode()) for text in train)


def test_no_window_of_training_holds_held_out_text(corpus_folder: Path, make_config: MakeConfig) -> None:
    folder = prepare(make_config(str(corpus_folder)), quiet=True)
    tokenizer, index = Tokenizer.load(folder / "tokenizer.model"), Index.load(folder / "train")
    loader = Loader(index, seq_len=64, seed=0, global_batch_windows=1, micro_batch_size=1, prefetch=0)
    with loader.steps(0) as steps:
        served = "".join(
            tokenizer.decode(next(steps).micro_batches[0].tokens[0]) for _ in range(loader.windows_per_epoch)
        )
    titles = {i: f"# document {i}\n" for i in range(120)}
    held_out = {i for i in titles if split_value(make_text(i)) < 0.1}
    assert held_out and not [i for i in held_out if titles[i] in served]
    assert sum(titles[i] in served for i in set(titles) - held_out) > 60  # most are not cut by a window's edge


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [make_text(i) for i in range(60)]
    marked = [text + "zqzqzq " * 400 if split_value(text) < 0.1 else text for text in texts]
    rows = [text for text in marked if "zqzq" not in text or split_value(text) < 0.1]
    extra = next(s for s in (make_text(i, 20) + "zqzqzq " * 400 for i in range(999)) if split_value(s) < 0.1)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*rows, extra]))
    folder = prepare(make_config(str(tmp_path / "a.jsonl")), quiet=True)
    assert any("zqzq" in text for text in documents_of(folder, "validation"))
    assert len(Tokenizer.load(folder / "tokenizer.model").encode("zqzqzq")) == 6


def test_same_input_same_bytes(corpus_folder: Path, make_config: MakeConfig) -> None:
    one = prepare(make_config(str(corpus_folder), folder="one"), quiet=True)
    two = prepare(make_config(str(corpus_folder), folder="two"), quiet=True)
    assert contents(one) == contents(two)
    assert sorted(p.name for p in one.parent.iterdir()) == ["one", "text", "two"]  # nothing beside is left


def test_repeating_changes_nothing_and_says_so(
    corpus_folder: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(str(corpus_folder))
    folder = prepare(config, quiet=True)
    assert capsys.readouterr().out == ""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    prepare(config)
    assert "up to date" in capsys.readouterr().out.replace("\n", " ")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_other_settings_say_what_differs_and_force_rebuilds(corpus_folder: Path, make_config: MakeConfig) -> None:
    source = str(corpus_folder)
    folder = prepare(make_config(source), quiet=True)
    before = contents(folder)
    others = {
        "data.member_tokens": make_config(source, member_tokens=300),
        "data.shard_members": make_config(source, shard_members=3),
        "data.validation_fraction": make_config(source, validation_fraction=0.2),
        "model.vocab_size": make_config(source, vocab_size=400),
        "data.tokenizer.model_type": make_config(source, tokenizer={"model_type": "unigram"}),
        "data.tokenizer.path": make_config(source, tokenizer={"path": str(folder / "tokenizer.model")}),
    }
    for key, config in others.items():
        message = refusal(config)
        assert key in message and "--force" in message and "data.folder" in message
        if key != "model.vocab_size":  # a model may have more ids than the tokenizer
            with pytest.raises(UserError, match=f"{key} was .* and is now .*--force"):
                open_data(config)
    with pytest.raises(UserError, match=r"data\.input was"):
        open_data(make_config(str(corpus_folder / "*.txt")))
    assert open_data(make_config([source])).train.num_tokens > 0
    (corpus_folder / "new.txt").write_text(make_text(999))
    assert "data.input" in refusal(make_config(source))
    (corpus_folder / "new.txt").unlink()
    assert contents(folder) == before
    prepare(others["data.member_tokens"], force=True, quiet=True)
    assert Index.load(folder / "train").tokens[0] == 300
    assert sorted(documents_of(folder, "train") + documents_of(folder, "validation")) == sorted(
        make_text(i) for i in range(120)
    )


def test_data_prepared_elsewhere_serves_where_its_text_is_not(
    corpus_folder: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(str(corpus_folder))
    folder = prepare(config, quiet=True)
    shutil.rmtree(corpus_folder)
    assert open_data(config).train.num_tokens > 0
    before = contents(folder)
    prepare(config)
    assert "up to date by its settings; the input is not here" in " ".join(capsys.readouterr().out.split())
    assert contents(folder) == before
    assert "no such file" in refusal(config, force=True)
    (folder / "prepared.json").unlink()
    with pytest.raises(UserError, match="no prepared data here"):
        open_data(config)


def test_a_failed_rebuild_keeps_the_old(corpus_folder: Path, make_config: MakeConfig) -> None:
    folder = prepare(make_config(str(corpus_folder)), quiet=True)
    before = contents(folder)
    (corpus_folder / "bad.txt").write_bytes(b"\xff")
    assert "bad.txt" in refusal(make_config(str(corpus_folder)), force=True)
    assert contents(folder) == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["data", "text"]


def test_a_folder_of_something_else_is_never_touched(corpus_folder: Path, make_config: MakeConfig) -> None:
    config = make_config(str(corpus_folder), folder="mine")
    config.data_folder.mkdir()
    (config.data_folder / "thesis.txt").write_text("years of work")
    assert "not made by" in refusal(config) and "not made by" in refusal(config, force=True)
    assert contents(config.data_folder) == {"thesis.txt": b"years of work"}
    (config.data_folder / "prepared.json").write_text("{")
    assert "damaged" in refusal(config)


def test_a_given_tokenizer_is_taken_as_it_is(corpus_folder: Path, make_config: MakeConfig) -> None:
    first = prepare(make_config(str(corpus_folder), folder="first"), quiet=True)
    model = str(first / "tokenizer.model")
    second = prepare(make_config(str(corpus_folder), folder="second", tokenizer={"path": model}), quiet=True)
    assert (second / "tokenizer.model").read_bytes() == (first / "tokenizer.model").read_bytes()
    assert Index.load(second / "train").fingerprint == Index.load(first / "train").fingerprint
    small = make_config(str(corpus_folder), folder="third", vocab_size=419, tokenizer={"path": model})
    assert "set model.vocab_size to 420" in refusal(small)
    assert not small.data_folder.exists()


def test_too_little_to_hold_out_names_the_fraction_that_works(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": make_text(i, 400)}) for i in range(3)))
    source = str(tmp_path / "a.jsonl")
    message = refusal(make_config(source, validation_fraction=0.001))
    fraction = float(message.split("at least ")[1].split(",")[0])
    folder = prepare(make_config(source, validation_fraction=fraction), quiet=True)
    assert len(documents_of(folder, "validation")) == 1
    without = prepare(make_config(source, folder="without", validation_fraction=0.0), quiet=True)
    assert not (without / "validation").exists() and len(documents_of(without, "train")) == 3
    assert "every document was held out" in refusal(make_config(source, folder="x", validation_fraction=0.9999))


def test_of_a_lone_document_the_end_is_held_out() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (train, validation) = split_documents([Document("a.txt", text)], 0.05)
    assert (train[0], validation[0]) == (False, True)
    assert train[1].text + validation[1].text == text and train[1].text.endswith("\n")
    assert 0.04 < len(validation[1].text) / len(text) < 0.07
    assert [d.text for _, d in split_documents([Document("a", "x" * 100)], 0.1)] == ["x" * 90, "x" * 10]
    assert list(split_documents([Document("a", text)], 0.0)) == [(False, Document("a", text))]
    assert list(split_documents([], 0.1)) == []


def test_tinyshakespeare(make_config: MakeConfig) -> None:
    path = Path(__file__).parents[3] / "shared/data/corpus/tinyshakespeare/input.txt"
    if not path.is_file():
        pytest.skip("the corpus is not beside this checkout")
    config = make_config(str(path), vocab_size=2048, member_tokens=16_384, validation_fraction=0.01)
    folder = prepare(config, quiet=True)
    train, validation = documents_of(folder, "train"), documents_of(folder, "validation")
    assert "".join(train + validation).encode() == path.read_bytes()
    batches = list(validation_batches(Index.load(folder / "validation"), seq_len=128, batch_size=4))
    assert sum(int((batch.labels >= 0).sum()) for batch in batches) > 2000


def test_another_format_is_no_setting_to_be_set_back(corpus_folder: Path, make_config: MakeConfig) -> None:
    config = make_config(str(corpus_folder))
    manifest = prepare(config, quiet=True) / "prepared.json"
    made = json.loads(manifest.read_text(encoding="utf-8"))
    made["settings"]["format"] = [2, 2]
    manifest.write_text(json.dumps(made), encoding="utf-8")
    line = "made by another version, in another format: make it anew by `sisa prepare --force`"
    assert refusal(config).endswith(line)
    prepare(config, quiet=True, force=True)
    assert open_data(config).train.num_tokens > 0
