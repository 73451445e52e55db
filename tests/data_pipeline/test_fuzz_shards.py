"""Fuzz: whatever is done to the bytes of shards and index, reading gives the same tokens or one line, and soon.

Never another exception, never other tokens, and no memory asked for because a damaged number says so.
"""

from __future__ import annotations

import io
import random
import shutil
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.foreign import Reading, index_tar
from data_pipeline.index import Index
from data_pipeline.inputs import list_files
from data_pipeline.slices import SliceReader, Span
from data_pipeline.tars import Tar
from data_pipeline.verify import Verification
from samples import EOS, npy, random_documents, write_split, write_tar
from sisa_dist.config import UserError

DOCUMENTS = random_documents(0, 25)
_MOST_MEMORY = 20e6

# (what, where in the file as a share of it, how much): applied one after the other.
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "cut", "insert", "double", "zero", "remove"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=4,
)
Changes = list[tuple[str, float, int]]


def damage(content: bytes, changes: Changes) -> bytes:
    found = bytearray(content)
    for what, share, amount in changes:
        at = int(share * len(found))
        size = 1 + amount % 700
        if not found:
            break
        if what == "flip":
            found[at] ^= 1 << amount % 8
        elif what == "byte":
            found[at] = amount % 256
        elif what == "cut":
            del found[at:]
        elif what == "insert":
            found[at:at] = random.Random(amount).randbytes(size)
        elif what == "double":
            found[at:at] = found[at : at + size]
        elif what == "zero":
            found[at : at + size] = bytes(len(found[at : at + size]))
        else:
            del found[at : at + size]
    return bytes(found)


def read_all(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    index = Index.load(folder)
    members = range(len(index.members))
    return [index.read_member(m).tolist() for m in members], [index.segments(m).tolist() for m in members]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "data" / "train"
    write_split(folder, DOCUMENTS)
    return folder


@pytest.fixture
def scratch(split: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split, tmp_path / "data" / "train"))


def bounded(act: Callable[[], object]) -> object:
    tracemalloc.start()
    try:
        return act()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < _MOST_MEMORY, peak


NAMES = ["000000.tar", "000003.tar", "index.json", "members.npy", "segments.npy", "token_counts.npy"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_or_one_line(split: Path, scratch: Path, name: str) -> None:
    whole, expected, seen = (split / name).read_bytes(), read_all(split), {"same": 0, "refused": 0}

    @settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def run(changes: Changes) -> None:
        (scratch / name).write_bytes(damage(whole, changes))
        try:
            found = bounded(lambda: read_all(scratch))
        except UserError as error:
            assert "\n" not in str(error) and str(scratch) in str(error)
            seen["refused"] += 1
        else:
            assert found == expected
            seen["same"] += 1

    run()
    assert seen["refused"] > 25


@pytest.mark.parametrize("name", NAMES)
def test_verify_names_what_changed(split: Path, scratch: Path, name: str) -> None:
    """It ends, says something of each change that is one, and says nothing of none."""
    whole = (split / name).read_bytes()

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def run(changes: Changes) -> None:
        content = damage(whole, changes)
        (scratch / name).write_bytes(content)
        lines = bounded(lambda: list(Verification(scratch.parent).faults()))
        assert isinstance(lines, list) and all("\n" not in line for line in lines)
        # There is no tokenizer here: one line says that, whatever else there is.
        others = [line for line in lines if "tokenizer" not in line]
        if content == whole:
            assert not others
        elif name.endswith(".tar") and content.rstrip(b"\0") != whole.rstrip(b"\0"):
            assert others or _only_padding(whole, content)

    run()


def _only_padding(whole: bytes, content: bytes) -> bool:
    """Bytes behind the end of an entry, up to the next block, are nobody's."""
    if len(whole) != len(content):
        return False
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        mine = np.zeros(len(whole), bool)
        for entry in tar:
            mine[entry.offset : entry.offset_data + entry.size] = True
            last = entry.offset_data + -(-entry.size // 512) * 512
    mine[last:] = True
    changed = np.frombuffer(whole, np.uint8) != np.frombuffer(content, np.uint8)
    return not (changed & mine).any()


def test_foreign_tars_are_indexed_as_they_are_or_one_line(tmp_path: Path) -> None:
    ids = [np.array([*document, EOS], np.uint16) for document in DOCUMENTS]
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.npy", npy(each)) for i, each in enumerate(ids)]).read_bytes()
    path, seen = tmp_path / "b.tar", {"read": 0, "refused": 0}

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def run(changes: Changes) -> None:
        content = damage(whole, changes)
        path.write_bytes(content)
        for on_bad in ("stop", "skip"):
            try:
                found = bounded(lambda on_bad=on_bad: index_tar(path, Reading(97, EOS, on_bad=on_bad)))  # type: ignore[misc]
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                seen["refused"] += 1
                continue
            seen["read"] += 1
            width = found.dtype.itemsize if found.dtype is not None else 2  # type: ignore[attr-defined]
            for row in found.part.members:  # type: ignore[attr-defined]
                start = int(row["offset"])
                assert start + int(row["tokens"]) * width <= len(content)
            assert found.part.segments.sum() == found.part.members["tokens"].sum()  # type: ignore[attr-defined]

    run()
    assert seen["read"] > 25 and seen["refused"] > 25


def header(name: str, *, size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """A tar header with a right checksum, whatever it says."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def huge(number: int) -> bytes:
    return b"\x80" + number.to_bytes(11, "big")


def negative(number: int) -> bytes:
    return b"\xff" + struct.pack(">q", number).rjust(11, b"\xff")


EVIL = {
    "an entry larger than any disk": header("a.txt", size=huge(1 << 60)) + b"x" * 1024,
    "an entry of a negative size": header("a.txt") + header("b.txt", size=negative(-512)) + bytes(1024),
    "one that leads back to itself": header("a.txt", size=negative(-512)) + header("b.txt", size=negative(-1024)),
    "a long name of 8 GB": header("a", size=huge(1 << 33), kind=b"L") + bytes(1024),
    "a negative long name": header("a", size=negative(-1024), kind=b"L") + header("a.txt") + bytes(1024),
    "attributes of an exabyte": header("a", size=huge(1 << 60), kind=b"x") + bytes(1024),
    "attributes with a negative size": (
        header("a", size=b"00000000020\0", kind=b"x")
        + b"15 size=-999999\n".ljust(512, b"\0")
        + header("a.txt")
        + bytes(1024)
    ),
    "attributes that are no text": header("a", size=b"00000000010\0", kind=b"x")
    + b"\xff" * 512
    + header("b.txt")
    + bytes(1024),
    "nested without end": header("a", size=b"00000000010\0", kind=b"L") * 1
    + (bytes(512) + header("a", size=b"00000000010\0", kind=b"L")) * 3000,
    "a file with holes": header("a.txt", kind=b"S") + bytes(1024),
    "a name of no encoding": header("a.txt").replace(b"a.txt", b"\xff\xfe.tx") + bytes(1024),
}


@pytest.mark.parametrize("name", EVIL)
def test_headers_made_to_do_harm(tmp_path: Path, name: str) -> None:
    """To every reader of tars: an end, soon, and one line where there is an error at all."""
    path = tmp_path / "a.tar"
    path.write_bytes(EVIL[name])

    def walk() -> list[str]:
        lines = []
        with open(path, "rb") as raw:
            try:
                assert len(list(Tar(raw))) < 5
            except tarfile.TarError as error:
                lines.append(" ".join(str(error).split()))
        for act in (
            lambda: list(SliceReader(list_files(str(path)), [Span(0)], text_key="text")),
            lambda: index_tar(path, Reading(97, EOS)),
        ):
            try:
                act()
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                lines.append(str(error))
        return lines

    lines = bounded(walk)
    assert isinstance(lines, list) and len(lines) >= 2
