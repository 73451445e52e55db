"""What was read once is checked again whenever it is read from the disk again, at the price of a CRC."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

import data_pipeline.index as index_module
from data_pipeline.index import Index
from samples import random_documents, write_split
from sisa_dist.config import UserError


def forget(index: Index) -> None:
    """As when other members took the memory."""
    index._cache.clear()
    index._cached = 0


def test_a_byte_changed_between_two_reads_is_seen(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", random_documents(0, 25))
    member, before = 2, index.read_member(2).tolist()
    block, path = index.block(member), tmp_path / "train" / "000000.tar"
    whole = path.read_bytes()
    for at in (block.start, (block.start + block.stop) // 2, block.stop - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        forget(index)
        with pytest.raises(UserError, match=r"000000\.tar: member 2 is not what was written"):
            index.read_member(member)
        path.write_bytes(whole)
        assert index.read_member(member).tolist() == before


def test_a_second_read_takes_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_split(tmp_path / "train", random_documents(0, 25))
    before, hashed = index.read_member(2).tolist(), []
    real = index_module.member_hash
    monkeypatch.setattr(index_module, "member_hash", lambda payload: hashed.append(1) or real(payload))
    forget(index)
    assert index.read_member(2).tolist() == before and hashed == []
    assert len(index.read_member(3)) and hashed == [1]


def test_a_member_at_a_url_leaves_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash is checked at every read: a sum would be looked at by nobody."""
    write_split(tmp_path / "train", random_documents(0, 25))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "train"), "/seen-split", recursive=True)
    try:
        index = Index.load("memory://seen-split")

        def refuse(*_: object) -> None:
            raise AssertionError("a sum was taken")

        monkeypatch.setattr("data_pipeline.seen.zlib.crc32", refuse)
        assert len(index.read_member(0)) == index.tokens[0]
    finally:
        memory.rm("/seen-split", recursive=True)
