"""A lost or damaged index comes back byte for byte, and damaged shards are not blessed by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.index import Index
from data_pipeline.merge import merge
from data_pipeline.rebuild import rebuild
from samples import contents
from sisa_dist.config import UserError

FILES = ("index.json", "members.npy", "segments.npy", "token_counts.npy")


@pytest.fixture
def folder(two_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_folders[0], tmp_path / "data"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        rebuild(folder, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (folder / "train" / ".reindex").exists()
    return str(caught.value)


@pytest.mark.parametrize("act", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_each_file_comes_back_byte_for_byte(folder: Path, name: str, act: str) -> None:
    whole, path = contents(folder), folder / "train" / name
    if act == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        # The end of members.npy is a hash, which then contradicts the shard; a file cut in its header says nothing.
        path.write_bytes(content[:50] if act == "cut" else content)
    if (name, act) == ("members.npy", "flipped"):
        assert "is not what members.npy says, one of the two is damaged" in refused(folder)
        path.unlink()
    assert rebuild(folder, quiet=True) == ["train"]
    assert contents(folder) == whole
    assert rebuild(folder, quiet=True) == []


def test_all_of_it_gone_of_both_splits_and_of_a_merged_folder(
    two_folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(tmp_path / "out", two_folders, quiet=True)
    whole = contents(out)
    for split in ("train", "validation"):
        for name in FILES:
            (out / split / name).unlink()
    assert rebuild(out) == ["train", "validation"]
    assert contents(out) == whole
    assert capsys.readouterr().out.count("no old hashes were left to hold them against") == 2


def test_a_damaged_shard_is_not_taken_for_data(folder: Path) -> None:
    train = folder / "train"
    index = Index.load(train)
    (train / "index.json").unlink()
    path = train / "000001.tar"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[int(index.members["offset"][10]) + 8] ^= 1
    path.write_bytes(content)
    assert "000001.tar: member 10 is not what members.npy says" in refused(folder)
    (train / "members.npy").unlink()
    cases = [
        ("damaged or cut short", lambda c: c[:9000]),
        ("damaged or cut short", lambda c: c[:1024] + b"x" + c[1025:]),
        ("its .json says", lambda c: c.replace(b'"tokens": 512', b'"tokens": 511', 1)),
        ("do not end where its .json says", lambda c: c[:1536] + b"\x02\x00" * 512 + c[2560:]),
        ("holds the id 65535", lambda c: c[:1536] + b"\xff\xff" + c[1538:]),
        ("no shard that", lambda c: c.replace(b'"segments"', b'"segmonts"', 1)),
    ]
    for words, damage in cases:
        path.write_bytes(damage(whole))
        assert words in refused(folder), words
    path.unlink()
    assert "000001.tar: the shard is missing" in refused(folder)
    last = sorted(train.glob("*.tar"))[-1]
    path.write_bytes(whole)
    last.unlink()
    assert "shards are missing or changed" in refused(folder)
    assert not (train / "index.json").exists()


def test_what_is_no_folder_of_ours_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    for path in (folder / "train").glob("*.tar"):
        path.unlink()
    assert "holds no shards of its own" in refused(folder)
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "validation")
    assert "no shards here" in refused(folder)
    assert json.loads((folder / "prepared.json").read_text())
