"""The tars are ordinary, their bytes depend on the tokens alone, and the index never lets damage through."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from data_pipeline.index import Index
from samples import EOS, random_documents, write_split
from sisa_dist.config import UserError

DOCUMENTS = random_documents(0, 25)


def stream(documents: list[list[int]]) -> list[int]:
    return [i for document in documents for i in [*document, EOS]]


def test_plain_webdataset_reads_tokens_and_boundaries(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", DOCUMENTS)
    names = sorted(str(path) for path in (tmp_path / "train").glob("*.tar"))
    assert len(names) == len(index.shards) > 2
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    ids = np.concatenate([np.frombuffer(sample["bin"], "<u2") for sample in samples])
    assert ids.tolist() == stream(DOCUMENTS)
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(len(samples))]
    lengths: list[int] = []
    for member, sample in enumerate(samples):
        notes = json.loads(sample["json"])
        assert notes["tokens"] == len(sample["bin"]) // 2 == sum(notes["segments"]) == index.tokens[member]
        assert notes["segments"] == index.segments(member).tolist()
        if notes["continued"]:
            lengths[-1] += notes["segments"].pop(0)
        lengths += notes["segments"]
    assert lengths == [len(document) + 1 for document in DOCUMENTS]


def test_index_agrees_with_the_tars(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", DOCUMENTS)
    ids = stream(DOCUMENTS)
    assert np.concatenate([index.read_member(m) for m in range(len(index.members))]).tolist() == ids
    assert index.num_tokens == len(ids) and index.documents == len(DOCUMENTS)
    assert index.token_counts.tolist() == np.bincount(ids, minlength=97).tolist()
    assert set(index.tokens[:-1].tolist()) == {10} and 1 <= index.tokens[-1] <= 10
    for shard in index.shards:
        with tarfile.open(tmp_path / "train" / shard["name"]) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}


def test_same_tokens_same_bytes_and_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    one, two = write_split(tmp_path / "a", DOCUMENTS), write_split(tmp_path / "b", DOCUMENTS)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert one.fingerprint == two.fingerprint == Index.load(tmp_path / "a").fingerprint
    changed = [document[:] for document in DOCUMENTS]
    changed[7][0] = changed[7][0] % 90 + 4
    swapped = [*DOCUMENTS[10:], *DOCUMENTS[:10]]
    others = [
        write_split(tmp_path / "c", changed),
        write_split(tmp_path / "d", swapped),
        write_split(tmp_path / "e", DOCUMENTS, member_tokens=11),
    ]
    assert len({index.fingerprint for index in [one, *others]}) == 4


def test_edges_of_members(tmp_path: Path) -> None:
    """Documents that end exactly with a member, span several, or are empty of ids."""
    documents = [[5] * 9, [6] * 25, [], [7] * 3]
    index = write_split(tmp_path / "train", documents)
    assert [index.segments(m).tolist() for m in range(len(index.members))] == [[10], [10], [10], [6, 1, 3], [1]]
    assert index.members["continued"].tolist() == [0, 0, 1, 1, 1]
    assert write_split(tmp_path / "none", []).num_tokens == 0


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from data_pipeline.shards import ShardWriter
    from data_pipeline.tokenizer import token_dtype

    writer = ShardWriter(
        tmp_path / "train",
        dtype=token_dtype(70_000),
        vocab_size=70_000,
        eos_id=EOS,
        tokenizer_sha256="",
        member_tokens=8,
        shard_members=2,
    )
    writer.add([69_999] * 20)
    writer.close()
    index = Index.load(tmp_path / "train")
    assert index.read_member(1).tolist() == [69_999] * 8 and index.dtype.itemsize == 4


def test_any_fsspec_url_is_read_by_range(tmp_path: Path) -> None:
    local = write_split(tmp_path / "train", DOCUMENTS)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "train"), "/remote-split", recursive=True)
    try:
        remote = Index.load("memory://remote-split")
        assert remote.fingerprint == local.fingerprint
        for member in range(len(local.members)):
            assert remote.read_member(member).tolist() == local.read_member(member).tolist()
            assert remote.segments(member).tolist() == local.segments(member).tolist()
        memory.pipe("/remote-split/000000.tar", memory.cat("/remote-split/000000.tar")[:1600])
        with pytest.raises(UserError, match="cut short"):
            Index.load("memory://remote-split").read_member(1)
        memory.rm("/remote-split/000001.tar")
        with pytest.raises(UserError, match=r"000001.tar: cannot be read"):
            Index.load("memory://remote-split").read_member(3)
    finally:
        memory.rm("/remote-split", recursive=True)


def damaged(folder: Path, act: str) -> str:
    with pytest.raises(UserError) as caught:
        index = Index.load(folder)
        for member in range(len(index.members)):
            index.read_member(member)
            index.segments(member)
    message = str(caught.value)
    assert "\n" not in message and "sisa prepare" in message, (act, message)
    return message


def test_every_damage_is_one_line_with_the_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_split(whole, DOCUMENTS)
    names = sorted(path.name for path in whole.iterdir())
    assert names == [*(f"{i:06d}.tar" for i in range(len(names) - 4)), *names[-4:]]
    folder = tmp_path / "damaged"
    for name in names:
        for act in ("missing", "cut short", "flipped"):
            shutil.copytree(whole, folder)
            path = folder / name
            content = bytearray(path.read_bytes())
            if act == "missing":
                path.unlink()
            elif act == "cut short":
                path.write_bytes(
                    content[: len(content) - 600] if name.endswith(".tar") else content[: len(content) // 2]
                )
            else:
                # inside the ids of a member; the number of the format; a length of a document
                at = 1536 if name.endswith(".tar") else content.index(b": 2") + 2 if name == "index.json" else 133
                content[at] ^= 1
                path.write_bytes(content)
            assert name in damaged(folder, f"{name} {act}"), (name, act)
            shutil.rmtree(folder)


def test_no_index_says_prepare(tmp_path: Path) -> None:
    assert "run `sisa prepare` first" in damaged(tmp_path / "nowhere", "")
