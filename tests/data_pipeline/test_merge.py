"""A merged folder serves exactly the tokens of its inputs, which stay as they are, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import Index
from data_pipeline.info import describe_folder
from data_pipeline.manifest import check_settings
from data_pipeline.merge import merge
from data_pipeline.prepare import prepare
from data_pipeline.verify import Verification
from samples import contents, make_text
from sisa_dist.config import RunConfig, UserError

MakeConfig = Callable[..., RunConfig]


def ids(folder: Path, split: str = "train") -> list[int]:
    index = Index.load(folder / split)
    return np.concatenate([index.read_member(m) for m in range(len(index.members))]).tolist()


def test_the_tokens_of_the_inputs_one_after_another(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two_folders
    before = contents(a), contents(b)
    out = merge(tmp_path / "out", [a, b], quiet=True)
    for split in ("train", "validation"):
        assert ids(out, split) == ids(a, split) + ids(b, split)
        one, two, both = (Index.load(folder / split) for folder in (a, b, out))
        assert [shard["name"] for shard in both.shards] == [f"{i:06d}.tar" for i in range(len(both.shards))]
        assert both.documents == one.documents + two.documents
        assert (both.token_counts == one.token_counts + two.token_counts).all()
        rows = len(one.members)
        assert [both.segments(rows + m).tolist() for m in range(len(two.members))] == [
            two.segments(m).tolist() for m in range(len(two.members))
        ]
    assert list(Verification(out).faults()) == []
    assert (contents(a), contents(b)) == before
    assert not list(tmp_path.glob("out.*"))


def test_links_where_it_can_copies_where_it_must(
    two_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(shutil.copytree(two_folders[0], tmp_path / "a"))
    linked = merge(tmp_path / "linked", [first, two_folders[1]], quiet=True)
    copied = merge(tmp_path / "copied", [first, two_folders[1]], copy=True, quiet=True)
    assert (linked / "train" / "000000.tar").stat().st_nlink == 2
    assert (copied / "train" / "000000.tar").stat().st_nlink == 1

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    other = merge(tmp_path / "other", [first, two_folders[1]], quiet=True)
    shutil.rmtree(first)
    assert ids(linked) == ids(copied) == ids(other)
    assert contents(copied) == contents(other)


def test_what_was_counted_is_added_up_and_settings_are_those_of_the_sources(
    two_folders: tuple[Path, Path], tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(tmp_path / "data", two_folders, quiet=True)
    made = json.loads((out / "prepared.json").read_text())
    parts = [json.loads((folder / "prepared.json").read_text()) for folder in two_folders]
    for split in ("train", "validation"):
        for key in ("documents", "tokens", "bytes"):
            assert made["counts"][split][key] == sum(part["counts"][split][key] for part in parts)
    assert [source["fingerprint"] for source in made["sources"]] == [
        Index.load(folder / "train").fingerprint for folder in two_folders
    ]
    config = make_config(str(two_folders[0].parent / "text-a"))
    check_settings(out, config)
    assert prepare(config) == out and "up to date, made by `sisa data merge`" in capsys.readouterr().out.replace(
        "\n", " "
    )
    with pytest.raises(UserError, match=r"made by `sisa data merge`, on which data\.member_tokens has no effect"):
        check_settings(out, make_config(str(two_folders[0].parent / "text-a"), member_tokens=99))
    with pytest.raises(UserError, match=r"made by `sisa data merge`, not from data\.input"):
        prepare(config, force=True)
    assert list(Verification(out).faults()) == []


def test_a_merge_of_merges(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    one = merge(tmp_path / "one", two_folders, quiet=True)
    more = Path(shutil.copytree(two_folders[0], tmp_path / "again"))
    two = merge(tmp_path / "two", [one, more], quiet=True)
    assert ids(two) == ids(one) + ids(more)
    assert describe_folder(two)["splits"]["train"]["tokens"] == len(ids(two))


def test_what_does_not_go_together_is_one_line_and_makes_nothing(
    two_folders: tuple[Path, Path], tmp_path: Path, make_config: MakeConfig
) -> None:
    a, b = two_folders
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(make_text(200 + i), encoding="utf-8")
    other = prepare(make_config(str(text), folder="other"), quiet=True)
    wide = Path(shutil.copytree(b, tmp_path / "wide"))
    old = Path(shutil.copytree(b, tmp_path / "old"))
    _as_uint32(wide / "train")
    (old / "train" / "index.json").write_text(
        (old / "train" / "index.json").read_text().replace('"format": 3', '"format": 2')
    )
    cut = Path(shutil.copytree(b, tmp_path / "cut"))
    (cut / "train" / "000000.tar").write_bytes(b"")
    for inputs, words in (
        ([a], "at least two"),
        ([a, a], "named twice"),
        ([a, tmp_path / "b" / ".." / "nowhere"], "no prepared data here"),
        ([a, other], "made with another tokenizer"),
        ([a, wide], "holds ids as uint32 and .* as uint16"),
        ([a, old], "format 2, this version reads 3"),
        ([a, cut], "0 bytes instead of"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            merge(tmp_path / "out", inputs, quiet=True)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match="exists: name another"):
        merge(a, [a, b], quiet=True)


def _as_uint32(split: Path) -> None:
    from data_pipeline.index_files import write_index

    index = Index.load(split)
    raw = json.loads((split / "index.json").read_text())
    header = {key: value for key, value in raw.items() if key not in ("format", "hash", "hashes")} | {"dtype": "<u4"}
    segments = np.load(split / "segments.npy")
    write_index(split, header=header, members=index.members, segments=segments, token_counts=index.token_counts)


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_makes_it(
    two_folders: tuple[Path, Path], tmp_path: Path, after: int
) -> None:
    names = [str(folder) for folder in two_folders]
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom data_pipeline import merge\nlink, done = merge._link, []\n"
        "def counted(*a, **k):\n    done.append(1)\n"
        f"    os.kill(os.getpid(), signal.SIGKILL) if len(done) > {after} else link(*a, **k)\n"
        "merge._link = counted\n"
        f"merge.merge(Path({str(tmp_path / 'out')!r}), [Path(p) for p in {names!r}], quiet=True)"
    )
    before = [contents(folder) for folder in two_folders]
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and [contents(folder) for folder in two_folders] == before
    out = merge(tmp_path / "out", two_folders, quiet=True)
    assert ids(out) == ids(two_folders[0]) + ids(two_folders[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
