"""`prepare` end to end: what it makes, what it leaves alone, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.holdout import split_documents, split_value
from data_pipeline.index import Index
from data_pipeline.loader import Loader, validation_batches
from data_pipeline.prepare import prepare
from data_pipeline.sources import Document
from data_pipeline.tokenizer import Tokenizer
from samples import make_text
from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.training.run_data import open_data

MakeConfig = Callable[..., RunConfig]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_of(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    index = Index.load(folder / split)
    assert index.tokenizer_sha256 == tokenizer.sha256 and index.vocab_size == tokenizer.vocab_size
    stream = np.concatenate([index.read_member(member) for member in range(len(index.members))])
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    assert ends[-1] == len(stream) - 1
    return [tokenizer.decode(part[:-1]) for part in np.split(stream, ends + 1)[:-1]]


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
    assert train == [text for text in texts if split_value(text) >= 0.1]  # in the order of the input
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


# --- kills

INJECT = """
    import os, signal, sys
    from data_pipeline import building, index, prepare as module, shards, tokenizer
    from sisa_dist.config import load_config

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    count = [0]
    def after(true, times):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > times:
                die()
            return true(*args, **kwargs)
        return call

    {patch}
    module.prepare(load_config({config!r}), force={force}, quiet=True)
"""
POINTS = {
    "training": "tokenizer.sentencepiece.SentencePieceTrainer.train = die",
    "model written": "tokenizer.os.replace = die",
    "some documents": "shards.ShardWriter.add = after(shards.ShardWriter.add, 50)",
    "some members": "shards.ShardWriter._flush = after(shards.ShardWriter._flush, 7)",
    "before an index": "shards.write_index = die",
    "between the indexes": "shards.write_index = after(shards.write_index, 1)",
    "before the rename": "building.os.replace = after(building.os.replace, 1)",
    "after the rename": "building.shutil.rmtree = after(building.shutil.rmtree, 0)",
}
REPLACING = {
    "between the renames": "building.os.replace = after(building.os.replace, 2)",
    "old not removed": "building.shutil.rmtree = die",
    "old half removed": (
        "building.shutil.rmtree = lambda path, *a: ([os.remove(p) for p in path.rglob('*') if p.is_file()][:3], die())"
    ),
}


def run_killed(config: RunConfig, tmp_path: Path, patch: str, *, force: bool = False) -> int:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = INJECT.format(patch=patch, config=str(tmp_path / "config.yaml"), force=force)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60, check=False
    ).returncode


def check_whole_or_absent(folder: Path, *wholes: dict[str, bytes]) -> None:
    assert not folder.exists() or contents(folder) in wholes


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_that_looks_done(
    corpus_folder: Path, make_config: MakeConfig, tmp_path: Path, point: str
) -> None:
    whole = contents(prepare(make_config(str(corpus_folder), folder="whole"), quiet=True))
    config = make_config(str(corpus_folder))
    code = run_killed(config, tmp_path, POINTS[point])
    assert code == (0 if point == "after the rename" else -signal.SIGKILL)  # a first build has nothing to remove
    check_whole_or_absent(config.data_folder, whole)
    assert contents(prepare(config, quiet=True)) == whole
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("data.") and p.suffix != ".lock"] or code == 0


@pytest.mark.parametrize("point", REPLACING)
def test_a_kill_while_replacing_leaves_the_old_or_the_new_or_none(
    corpus_folder: Path, make_config: MakeConfig, tmp_path: Path, point: str
) -> None:
    new_config = make_config(str(corpus_folder), member_tokens=300)
    old = contents(prepare(make_config(str(corpus_folder)), quiet=True))
    new = contents(prepare(make_config(str(corpus_folder), member_tokens=300, folder="new"), quiet=True))
    assert run_killed(new_config, tmp_path, REPLACING[point], force=True) == -signal.SIGKILL
    check_whole_or_absent(new_config.data_folder, old, new)
    assert contents(prepare(new_config, quiet=True)) == new
    assert contents(prepare(new_config, force=True, quiet=True)) == new
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "data", "new", "text"}


def test_kills_at_random_moments(corpus_folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    started = time.monotonic()
    assert run_killed(make_config(str(corpus_folder), folder="whole"), tmp_path, "pass") == 0
    whole, duration = contents(tmp_path / "whole"), time.monotonic() - started
    config = make_config(str(corpus_folder))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = textwrap.dedent(INJECT.format(patch="pass", config=str(tmp_path / "config.yaml"), force=True))
    rng, killed = random.Random(os.getpid()), 0
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
        check_whole_or_absent(config.data_folder, whole)
    assert killed > 0
    assert contents(prepare(config, quiet=True)) == whole


def test_two_at_once_do_not_mix(corpus_folder: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(str(corpus_folder))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    pause = "shards.write_index = lambda *a, **k: (print('here', flush=True), sys.stdin.readline(), real(*a, **k))"
    script = INJECT.format(
        patch=f"real = shards.write_index; {pause}", config=str(tmp_path / "config.yaml"), force=False
    )
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert "another process is preparing it" in refusal(config)
    child.communicate("\n\n", timeout=60)
    assert child.returncode == 0
    assert len(documents_of(prepare(config, quiet=True), "train")) > 90
