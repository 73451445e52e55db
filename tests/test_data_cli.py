"""`sisa data` as a user meets it, and that what it makes trains: one line and exit code 2 for what can be mended."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import Index
from data_pipeline.merge import merge
from data_pipeline.prepare import prepare
from data_pipeline.reindex import reindex
from runs import losses
from samples import npy, write_tar
from sisa_dist import cli
from sisa_dist.config import Run, RunConfig, UserError, dump_config, parse_config
from sisa_dist.training.run_data import open_data
from sisa_dist.training.trainer import train

Said = tuple[int, str, str]


@pytest.fixture
def sisa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["sisa", "data", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def folder(tiny: RunConfig, tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(tiny.data.folder), tmp_path / "data"))


def on_other_data(tiny: RunConfig, folder: Path, name: str) -> RunConfig:
    """The run with the data settings that a folder no config made lets one set: none that shape it."""
    data = type(tiny.data)(folder=str(folder), lanes=tiny.data.lanes)
    return tiny.model_copy(update={"data": data, "output_dir": f"{tiny.output_dir}-{name}"})


def foreign(source: Path, target: Path) -> Path:
    """The training split of a prepared folder as another program's shards, and a folder that indexes them."""
    index = Index.load(source / "train")
    for number in range(len(index.shards)):
        members = np.flatnonzero(index.members["shard"] == number)
        entries = [(f"{member:05d}.npy", npy(index.read_member(int(member)))) for member in members]
        write_tar(target / "shards" / f"{number:04d}.tar", entries)
    return reindex(target / "data", [str(target / "shards")], tokenizer=source, quiet=True)


def test_info_for_people_and_programs(sisa, folder: Path, two: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = sisa("info", folder)
    index = Index.load(folder / "train")
    assert code == 0 and f"train: {index.documents:,} documents, {index.num_tokens:,} tokens of uint16" in out
    for words in (
        index.fingerprint,
        "made by sisa prepare",
        "512 ids",
        "on disk",
        "held-out text",
        "data.member_tokens: 256",
    ):
        assert words in out
    found = json.loads(sisa("info", folder, "--json")[1])
    assert found["splits"]["train"]["fingerprint"] == index.fingerprint
    assert found["disk_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found["splits"]["train"]["shard_bytes"] == sum(p.stat().st_size for p in (folder / "train").glob("*.tar"))
    out = sisa("info", two)[1]
    assert "made by sisa data merge" in out and out.count("from: ") == 2


@pytest.fixture
def other(tiny: RunConfig, folder: Path, tmp_path: Path) -> Path:
    """Other data of the same tokenizer."""
    for source in Path(__file__).parent.glob("*.py"):
        (tmp_path / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    tree = tiny.model_dump()
    tree["data"] |= {
        "input": str(tmp_path / "*.txt"),
        "folder": str(tmp_path / "other"),
        "tokenizer": {"path": str(folder / "tokenizer.model")},
        "validation_fraction": 0.3,
    }
    made = prepare(parse_config(tree, source="other"), quiet=True)
    assert made is not None
    return made


@pytest.fixture
def two(folder: Path, other: Path, tmp_path: Path) -> Path:
    return merge(tmp_path / "merged", [folder, other], quiet=True)


def test_verify_prints_a_line_a_fault_and_exits_2(sisa, folder: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = sisa("verify", folder, "--workers", 2)
    assert code == 0 and "all as it was written" in out and not err.strip()
    index = Index.load(folder / "train")
    for member in (0, 5):
        path = Path(index.shard_paths[int(index.members["shard"][member])])
        content = bytearray(path.read_bytes())
        content[int(index.members["offset"][member])] ^= 1
        path.write_bytes(content)
    code, out, err = sisa("verify", folder)
    assert code == 2 and [line.split(": ", 1)[1] for line in out.splitlines()] == [
        "member 0: not what was written",
        "member 5: not what was written",
    ]
    assert err.startswith(f"sisa: {folder}: 2 faults; looked at") and err.count("\n") == 1


def test_show_merge_and_reindex(sisa, folder: Path, other: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = sisa("show", folder, "--document", 2, "--tokens", 20)
    assert code == 0 and out.startswith("── document 2, member ") and "more tokens" in out
    assert sisa("show", folder, "--split", "validation", "--window", 1, "--seq-len", 8, "--ids")[0] == 0
    copy = Path(shutil.copytree(folder, tmp_path / "again"))
    assert sisa("merge", tmp_path / "twice", folder, copy)[0] == 2 and not (tmp_path / "twice").exists()
    code, out, _ = sisa("merge", tmp_path / "both", folder, other)
    assert (code, out) == (0, f"data: {tmp_path / 'both'}\n")
    (other / "train" / "index.json").unlink()
    assert sisa("verify", other)[0] == 2
    assert sisa("reindex", other)[0] == 0 and sisa("verify", other)[0] == 0
    shards = write_tar(tmp_path / "x.tar", [("0.npy", npy(np.array([7, 8, 2], np.uint16)))])
    assert sisa("reindex", tmp_path / "new", shards, "--tokenizer", folder)[0] == 0
    assert sisa("verify", tmp_path / "new")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info", "nowhere"), "nowhere: no prepared data here"),
        (("verify", "nowhere"), "run `sisa prepare` first"),
        (("show", "nowhere"), "has no split train"),
        (("show", "DATA", "--member", "1", "--document", "1"), "--document and --member: name one of them"),
        (("show", "DATA", "--member", "1", "--seq-len", "9"), "--seq-len has no effect without --window"),
        (("show", "DATA", "--slot", "1"), "--slot has no effect without --step"),
        (("show", "absent.yaml", "--step", "1"), "absent.yaml: no such config file"),
        (("merge", "out", "DATA"), "at least two"),
        (("merge", "DATA", "DATA", "DATA"), "exists: name another"),
        (("reindex", "out", "x.tar"), "--tokenizer is missing"),
        (("reindex", "DATA", "--dtype", "uint16"), "options but no SHARDS"),
        (
            ("reindex", "out", "x.tar", "--tokenizer", "DATA", "--dtype", "int3"),
            "--dtype int3: set it to one of uint16",
        ),
        (("reindex", "out", "x.tar", "--tokenizer", "DATA"), "x.tar: no such tar"),
        (("reindex", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(  # type: ignore[no-untyped-def]
    sisa, arguments: tuple[str, ...], says: str, tiny: RunConfig
) -> None:
    code, out, err = sisa(*(str(tiny.data.folder) if a == "DATA" else a for a in arguments))
    assert (code, out) == (2, "") and says in err and err.startswith("sisa: ") and err.count("\n") == 1


def test_a_step_is_shown_as_it_was_served(sisa, tiny: RunConfig, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from data_pipeline.tokenizer import Tokenizer
    from sisa_dist.training.run_data import open_loader
    from sisa_dist.training.show_step import served_in

    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny), encoding="utf-8")
    assert "the run has no such step in metrics.jsonl yet" in sisa("show", config, "--step", 3)[1]
    train(tiny, quiet=True)
    code, out, _ = sisa("show", config, "--step", 3)
    digest = next(digest for step, _, _, digest in losses(Path(tiny.output_dir)) if step == 3)
    assert code == 0 and out.startswith(f"step 3: 4 windows, digest {digest}, as metrics.jsonl says")
    assert out.count("\nslot ") == 4 and sisa("show", config, "--step", 3, "--slot", 1)[1].count("\nslot ") == 1
    data = open_data(tiny)
    with open_loader(tiny, data).steps(2 * 4) as stream:
        rows = [row for batch in next(stream).micro_batches for row in batch.tokens.tolist()]
    for row, window in zip(rows, served_in(Run.of(tiny), 3).windows, strict=True):
        shown = np.concatenate([piece.ids for piece in window.pieces]).tolist()
        assert shown[:64] == row and isinstance(data.tokenizer, Tokenizer)
    code, _, err = sisa("show", config, "--step", 3, "--set", "data.lanes=2")
    assert code == 2 and "says that other samples were served" in err
    assert sisa("show", config, "--step", 99)[0] == 2 and sisa("show", config, "--step", 1, "--slot", 4)[0] == 2


def test_a_reindexed_folder_trains_as_ours_does(tiny: RunConfig, tmp_path: Path) -> None:
    """The same tokens in the same order give the same losses to the bit; ours is made without held-out text too."""
    ours = Path(shutil.copytree(str(tiny.data.folder), tmp_path / "ours"))
    shutil.rmtree(ours / "validation")
    theirs = foreign(ours, tmp_path / "theirs")
    data = tiny.data.model_copy(update={"folder": str(ours)})
    mine = tiny.model_copy(update={"data": data, "output_dir": str(tmp_path / "run")})
    expected = losses(train(mine, quiet=True))
    found = losses(train(on_other_data(tiny, theirs, "theirs"), quiet=True))
    assert found == expected and len(found) == 8
    assert all(math.isfinite(loss) and math.isfinite(norm) for _, loss, norm, _ in found)


def test_a_merged_folder_trains_and_says_what_it_cannot(tiny: RunConfig, two: Path) -> None:
    config = on_other_data(tiny, two, "m")
    found = losses(train(config, quiet=True))
    assert len(found) == 8 and all(math.isfinite(loss) for _, loss, _, _ in found)
    changed = config.model_copy(update={"data": config.data.model_copy(update={"member_tokens": 99})})
    with pytest.raises(UserError, match=r"made by `sisa data merge`, on which data\.member_tokens has no effect"):
        open_data(changed)


def test_shards_of_another_tokenizer_are_refused(tiny: RunConfig, folder: Path) -> None:
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\xf8\x07\x01")  # a field that SentencePiece does not know
    config = tiny.model_copy(update={"data": tiny.data.model_copy(update={"folder": str(folder)})})
    with pytest.raises(UserError, match=r"its shards have another tokenizer\.model") as caught:
        open_data(config)
    assert "\n" not in str(caught.value)
