"""`verify` finds every fault that is put into a folder, in one line each, and none in a folder that is whole."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import fetch
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from data_pipeline.index_files import member_hash, write_index
from data_pipeline.verify import Verification
from range_server import serve
from samples import write_tar
from sisa_dist.config import UserError


@pytest.fixture
def folder(two_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_folders[0], tmp_path / "data"))


def faults(folder: Path | str, **options: object) -> list[str]:
    found = list(Verification(folder, **options).faults())  # type: ignore[arg-type]
    assert all("\n" not in line for line in found)
    return found


def change(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def header_of(folder: Path) -> dict[str, object]:
    raw = json.loads((folder / "index.json").read_text())
    return {key: value for key, value in raw.items() if key not in ("format", "hash", "hashes")}


def rewrite(folder: Path, header: dict[str, object] | None = None, **arrays: np.ndarray) -> None:
    """Writes another index that is whole in itself."""
    index = Index.load(folder, check_shards=False)
    members = arrays.get("members", index.members)
    segments = arrays.get("segments", np.load(folder / "segments.npy"))
    counts = arrays.get("token_counts", index.token_counts)
    write_index(
        folder, header=header_of(folder) | (header or {}), members=members, segments=segments, token_counts=counts
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_what_is_whole_passes_and_everything_was_looked_at(two_folders: tuple[Path, Path], workers: int) -> None:
    found = Verification(two_folders[0], workers=workers)
    done: list[int] = []
    assert list(found.faults(done.append)) == []
    splits = [Index.load(two_folders[0] / name) for name in ("train", "validation")]
    assert found.checked.members == sum(len(index.members) for index in splits) > 20
    assert found.checked.tokens == sum(index.num_tokens for index in splits)
    assert sum(done) == found.total_bytes == sum(path.stat().st_size for path in two_folders[0].rglob("*.tar"))


def test_every_bad_member_is_named_once(folder: Path) -> None:
    index = Index.load(folder / "train")
    for member in (1, 6, 9, 20):
        row = index.members[member]
        change(folder / "train" / index.shards[int(row["shard"])]["name"], int(row["offset"]) + 7)
    assert [line.rsplit("/")[-1] for line in faults(folder)] == [
        "000000.tar: member 1: not what was written",
        "000000.tar: member 6: not what was written",
        "000001.tar: member 9: not what was written",
        "000002.tar: member 20: not what was written",
    ]


def test_shards_gone_cut_and_replaced(folder: Path) -> None:
    train = folder / "train"
    (train / "000000.tar").unlink()
    content = (train / "000001.tar").read_bytes()
    (train / "000001.tar").write_bytes(content[:9000])
    shutil.copy(train / "000003.tar", train / "000002.tar")
    lines = [line.rsplit("/")[-1] for line in faults(folder)]
    assert lines[0] == "000000.tar: the shard is missing, with members 0 to 7"
    assert lines[1].startswith("000001.tar: 9,000 bytes instead of")
    assert lines[2].startswith("000001.tar: no whole tar") and [line[-9:] for line in lines[3:8]] == ["cut short"] * 5
    of_copy = [line for line in lines if line.startswith("000002.tar")]
    assert sum("not what was written" in line for line in of_copy) == 8 and not [x for x in lines if "000003" in x]


def test_any_flipped_bit_of_a_header_or_note_in_the_tar_is_seen_though_training_never_reads_it(folder: Path) -> None:
    index = Index.load(folder / "train")
    path = folder / "train" / "000001.tar"
    whole = path.read_bytes()
    before = index.read_member(8).tolist()
    header, note = 1024 + 4, 512 + 12  # the name of a .bin; inside a .json
    for at, words in (
        (header, "no whole tar, other programs cannot read it"),
        (1024 + 130, "no whole tar"),  # its size
        (note, "does not say what the index does"),
        (len(whole) - 1, "data after the end mark"),
    ):
        change(path, at)
        assert Index.load(folder / "train").read_member(8).tolist() == before
        lines = faults(folder)
        assert lines and all("000001.tar" in line for line in lines) and words in lines[0], (at, lines)
        path.write_bytes(whole)
    assert faults(folder) == []


@pytest.mark.parametrize("name", ["members.npy", "token_counts.npy", "segments.npy", "index.json"])
def test_a_damaged_index_file_is_named_and_the_other_split_is_checked_all_the_same(folder: Path, name: str) -> None:
    change(folder / "train" / name, 200)
    change(folder / "validation" / "000000.tar", 1024 + 512 + 2)
    lines = faults(folder)
    assert any(name in line and "damaged" in line for line in lines)
    assert sum("validation/000000.tar: member 0" in line for line in lines) == 1


def test_what_no_hash_covers_is_compared(folder: Path) -> None:
    manifest = json.loads((folder / "prepared.json").read_text())
    manifest["counts"]["train"]["tokens"] += 1
    (folder / "prepared.json").write_text(json.dumps(manifest))
    (folder / "tokenizer_card.json").write_text("{")
    found = " ".join(faults(folder))
    assert "prepared.json: says" in found and "tokenizer_card.json: cannot be read" in found
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\xf8\x07\x01")  # a field that SentencePiece does not know
    assert sum("its shards were made with another tokenizer" in line for line in faults(folder)) == 2
    model.write_bytes(b"garbage")
    assert any("tokenizer.model: not a SentencePiece model" in line for line in faults(folder))
    shutil.rmtree(folder / "validation")
    assert any("validation: no index here" in line for line in faults(folder))


def test_an_index_that_is_whole_and_wrong(folder: Path) -> None:
    """What only a fault in a program could write, since hashes cover it: nothing of it is believed."""
    train = folder / "train"
    index = Index.load(train)
    original = {path.name: path.read_bytes() for path in train.iterdir()}
    segments = np.load(train / "segments.npy").copy()

    def members(**changes: tuple[int, int]) -> np.ndarray:
        found = index.members.copy()
        for column, (row, value) in changes.items():
            found[column][row] = value
        return found

    cases: dict[str, dict[str, object]] = {
        "holds no token": {"members": members(tokens=(3, 0))},
        "ends behind its shard": {"members": members(offset=(7, 10**6))},
        "lies over the one before": {"members": members(offset=(3, 512))},
        "not in the order of the shards": {"members": members(shard=(9, 0))},
        "segments that end before they begin": {"members": members(segments_end=(4, 0))},
        "member 0 goes on with a document": {
            "members": members(continued=(0, 1)),
            "header": {"documents": index.documents - 1},
        },
        "documents, its members hold another number": {"header": {"documents": 3}},
        "counts other tokens": {"token_counts": np.roll(index.token_counts, 1)},
    }
    moved = segments.copy()
    at = int(np.flatnonzero(np.asarray([len(index.segments(m)) for m in range(len(index.members))]) > 1)[0])
    row = int(index.members["segments_end"][at]) - 1
    moved[row] += 1
    moved[row - 1] -= 1
    cases["its documents do not end where the index says"] = {"segments": moved}
    for words, changes in cases.items():
        rewrite(train, **changes)  # type: ignore[arg-type]
        lines = faults(folder)
        assert any(words in line for line in lines), (words, lines)
        for name, content in original.items():
            (train / name).write_bytes(content)
    assert faults(folder) == []


def test_ids_outside_of_the_vocabulary(folder: Path) -> None:
    """Written by a program that hashed what it wrote: only the numbers themselves tell."""
    train, path = folder / "train", folder / "train" / "000000.tar"
    index = Index.load(train)
    row = index.members[2]
    content = bytearray(path.read_bytes())
    start = int(row["offset"])
    content[start : start + 2] = (420).to_bytes(2, "little")
    path.write_bytes(content)
    members = index.members.copy()
    stop = start + 2 * int(row["tokens"])
    members["hash"][2] = np.void(member_hash(bytes(content[start:stop])))
    rewrite(train, members=members)
    assert faults(folder) == [f"{path}: member 2: holds the id 420 of a vocabulary of 420"]
    with pytest.raises(UserError, match=r"000000\.tar: member 2 holds the id 420 of a vocabulary of 420") as caught:
        Index.load(train).read_member(2)
    assert "\n" not in str(caught.value)


def test_entries_a_careful_program_would_not_unpack(folder: Path) -> None:
    """The ids are where the index says, and the tar has more in it."""
    import tarfile

    path = folder / "train" / "000000.tar"
    size = path.stat().st_size
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    extra = write_tar(folder / "extra.tar", [("../out.txt", b"x"), ("000000000000.json", b"{}"), ("link", None)])
    path.write_bytes(path.read_bytes()[:end] + extra.read_bytes())
    lines = faults(folder)
    for words in ("leads out of its folder", "comes twice", "a link or a device"):
        assert any(words in line for line in lines), (words, lines)
    assert len(lines) == 3 + (path.stat().st_size != size)


def test_nothing_to_verify_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `sisa prepare` first"):
        Verification(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_over_http_the_same_faults(folder: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE", 0.002)
    index = Index.load(folder / "train")
    row = index.members[9]
    change(folder / "train" / "000001.tar", int(row["offset"]) + 3)
    with serve(folder) as served:
        served.ranges = ranges
        settings = RemoteSettings(retries=1)
        lines = faults(served.url, remote=settings)
        assert [line.rsplit("/")[-1] for line in lines] == ["000001.tar: member 9: not what was written"]
        served.fault = lambda path, number: 404 if path.endswith("000000.tar") and "train" in path else None
        lines = faults(served.url, remote=settings)
        assert len(lines) == 2 and "000000.tar: cannot be read (there is no such file)" in lines[0]


def test_members_are_not_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many shards under way as there are threads and a few, however many there are and however slow the printing."""
    from data_pipeline import verify

    begun, most, lock = 0, 0, threading.Lock()
    check = verify.check_shard

    def counting(*args: object, **options: object) -> object:
        nonlocal begun
        with lock:
            begun += 1
        return check(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "check_shard", counting)
    index = Index.load(folder / "train")
    assert len(index.shards) >= 4
    taken = 0
    for report in Verification(folder, workers=1)._shards(index):
        taken += 1
        most = max(most, begun - taken)
        assert report.faults == []
    assert taken == len(index.shards) and most <= 3
