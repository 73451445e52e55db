"""Token tars of others serve as they lie, the same tokens as shards of ours; what cannot serve is one line, counted."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import foreign
from data_pipeline.foreign import Reading, index_tar
from data_pipeline.index import Index
from data_pipeline.loader import Loader
from data_pipeline.reindex import reindex
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.verify import Verification
from samples import contents, npy, write_tar
from sisa_dist.config import UserError

EOS = 2


def write_shards(folder: Path, source: Index, *, kind: str = "npy") -> list[Path]:
    """The members of one of our splits as samples of another program's, shard by shard."""
    made = []
    for number in range(len(source.shards)):
        entries: list[tuple[str, bytes | None]] = []
        for member in np.flatnonzero(source.members["shard"] == number):
            found = source.read_member(int(member))
            if kind == "npy":
                content = npy(found)
            else:
                content = found.astype({"u16": "<u2", "bin": "<u2", "u32": "<u4"}[kind]).tobytes()
            entries += [(f"d/{member:05d}.{kind}", content), (f"d/{member:05d}.json", b'{"url": "x"}')]
        made.append(write_tar(folder / f"part-{number:03d}.tar", entries))
    return made


def sample(folder: Path, *samples: bytes | np.ndarray, name: str = "a.tar") -> Path:
    contents = [npy(s) if isinstance(s, np.ndarray) else s for s in samples]
    return write_tar(folder / name, [(f"{i:04d}.npy", content) for i, content in enumerate(contents)])


def windows(index: Index, steps: int, **changes: object) -> list[list[list[int]]]:
    options: dict[str, object] = dict(
        seq_len=33, seed=5, global_batch_windows=4, micro_batch_size=2, lanes=3, read_threads=2
    )
    with Loader(index, **options | changes).steps(0) as stream:  # type: ignore[arg-type]
        return [[row for b in next(stream).micro_batches for row in b.tokens.tolist()] for _ in range(steps)]


@pytest.mark.parametrize("kind", ["npy", "u16", "bin", "u32"])
def test_they_serve_what_ours_serve(two_folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    ours = Index.load(two_folders[0] / "train")
    write_shards(tmp_path / "theirs", ours, kind=kind)
    before = contents(tmp_path / "theirs")
    width = "uint16" if kind == "bin" else None
    out = reindex(tmp_path / "out", [str(tmp_path / "theirs")], tokenizer=two_folders[0], width=width, quiet=True)
    assert contents(tmp_path / "theirs") == before and not list((out / "train").glob("*.tar"))
    theirs = Index.load(out / "train")
    assert theirs.num_tokens == ours.num_tokens and (theirs.token_counts == ours.token_counts).all()
    assert (theirs.fingerprint == ours.fingerprint) == (kind != "u32")
    steps = 2 * Loader(ours, seq_len=33, seed=5, global_batch_windows=4, micro_batch_size=2).windows_per_epoch // 4 + 1
    assert windows(theirs, steps) == windows(ours, steps)
    assert list(Verification(out).faults()) == []


def test_every_token_once_an_epoch(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Counted by label, over samples of many lengths, pieces of long ones, and a change of data ranks."""
    rng = np.random.default_rng(0)
    vocab = Tokenizer.load(two_folders[0]).vocab_size
    lengths = [1, 2, 700, 33, 64, 1, 5000, 12, 300]
    texts = [rng.integers(3, vocab, size=length).astype(np.uint16) for length in lengths]
    shards = [sample(tmp_path, *texts[i : i + 3], name=f"{i}.tar") for i in (0, 3, 6)]
    out = reindex(
        tmp_path / "out", [str(path) for path in shards], tokenizer=two_folders[0], boundaries="sample", quiet=True
    )
    index = Index.load(out / "train")
    assert index.documents == len(texts) and index.num_tokens == sum(lengths)
    for packing in ("concat", "best_fit"):
        loader = Loader(
            index, seq_len=64, seed=1, global_batch_windows=1, micro_batch_size=1, packing=packing, prefetch=0
        )
        served: Counter[int] = Counter()
        with loader.steps(0) as stream:
            for _ in range(loader.windows_per_epoch):
                for batch in next(stream).micro_batches:
                    served.update(batch.labels[batch.labels >= 0].tolist())
        everything = Counter(np.concatenate(texts).tolist())
        missing = everything - served
        # concat: all but the first of the epoch; best_fit: all but the first of each document.
        assert sum(missing.values()) == (1 if packing == "concat" else len(texts)) and not served - everything


def test_documents_end_at_eos_or_with_the_sample(tmp_path: Path) -> None:
    ids = [[5, 6, EOS], [7, 8], [9, EOS, 3], [4, EOS, EOS], [6]]
    path = sample(tmp_path, *(np.array(i, np.int64) for i in ids))

    def read(boundaries: str, piece: int) -> tuple[int, list[list[int]], list[int]]:
        reading = Reading(20, EOS, boundaries=boundaries, piece_tokens=piece)  # type: ignore[arg-type]
        part = index_tar(path, reading).part
        ends = part.members["segments_end"].tolist()
        starts = [0, *ends[:-1]]
        lengths = [part.segments[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
        return part.documents, lengths, part.members["continued"].tolist()

    assert read("eos", 100) == (5, [[3], [2], [2, 1], [2, 1], [1]], [0, 0, 1, 1, 0])
    assert read("sample", 100) == (7, [[3], [2], [2, 1], [2, 1], [1]], [0, 0, 0, 0, 0])
    assert read("eos", 2) == (5, [[2], [1], [2], [2], [1], [2], [1], [1]], [0, 1, 0, 1, 0, 1, 0, 0])
    assert index_tar(path, Reading(20, EOS)).dtype == np.dtype("<u8")


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=12),
    piece=st.integers(1, 50),
    dtype=st.sampled_from(["<i2", "<u2", "<i4", "<u4", "<i8", "<u8"]),
    boundaries=st.sampled_from(["eos", "sample"]),
)
def test_any_samples_in_any_pieces_are_the_same_stream(
    tmp_path_factory: pytest.TempPathFactory, samples: list[list[int]], piece: int, dtype: str, boundaries: str
) -> None:
    path = sample(tmp_path_factory.mktemp("tar"), *(np.array(ids, dtype) for ids in samples))
    found = index_tar(path, Reading(31, EOS, boundaries=boundaries, piece_tokens=piece))  # type: ignore[arg-type]
    part, content = found.part, path.read_bytes()
    width = np.dtype(dtype).itemsize
    ids = [
        np.frombuffer(content[int(row["offset"]) : int(row["offset"]) + width * int(row["tokens"])], f"<u{width}")
        for row in part.members
    ]
    flat = [i for ids_of_one in samples for i in ids_of_one]
    assert np.concatenate(ids).tolist() == flat
    assert part.segments.sum() == sum(map(len, samples)) and part.members["tokens"].max() <= piece
    assert part.documents == len(part.segments) - part.members["continued"].sum()
    if boundaries == "eos":
        assert part.documents == flat[:-1].count(EOS) + 1
    else:
        assert part.documents == sum(s[:-1].count(EOS) + 1 for s in samples)


def test_a_sample_of_100_megabytes_is_read_in_pieces(tmp_path: Path) -> None:
    import tracemalloc

    ids = np.full(50_000_000, 7, np.uint16)
    ids[-1] = EOS
    path = sample(tmp_path, ids)
    del ids
    tracemalloc.start()
    found = index_tar(path, Reading(20, EOS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6 and len(found.part.members) == 48 and found.part.documents == 1
    assert found.part.members["continued"].tolist() == [0] + [1] * 47


GOOD = np.array([5, 6, EOS], np.uint16)
BAD: dict[str, tuple[list[tuple[str, bytes | None]], str, str]] = {
    "a link": ([("x.npy", None)], "a link in a tar", "a link, a device"),
    "a way out": ([("../x.npy", npy(GOOD))], "a name that leads out", "leads out of its folder"),
    "twice": ([("0000.npy", npy(GOOD))], "a key twice in a tar", "comes twice"),
    "too large an id": (
        [("x.npy", npy(np.array([5, 420], np.uint16)))],
        "ids outside of the vocabulary",
        "the id 420 of",
    ),
    "negative": ([("x.npy", npy(np.array([5, -1], np.int16)))], "ids outside of the vocabulary", "a vocabulary of 420"),
    "empty": ([("x.npy", npy(np.array([], np.uint16)))], "empty", "holds no id"),
    "big-endian": ([("x.npy", npy(np.array([5], ">u2")))], "broken ids", ">u2, not little-endian"),
    "bytes": ([("x.npy", npy(np.array([5], np.uint8)))], "broken ids", "not little-endian integers of 16 to 64"),
    "floats": ([("x.npy", npy(np.array([5.0])))], "broken ids", "not little-endian"),
    "objects": ([("x.npy", npy(np.array([{}], dtype=object)))], "broken ids", "not little-endian"),
    "a table": ([("x.npy", npy(np.ones((2, 3), np.uint16)))], "broken ids", r"shape \(2, 3\)"),
    "no npy": ([("x.npy", b"garbage")], "broken ids", "no .npy"),
    "cut npy": ([("x.npy", npy(GOOD)[:-2])], "broken ids", "its header says another number"),
    "half an id": ([("x.u16", b"abc")], "broken ids", "3 bytes are no ids of uint16"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_serve_is_one_line_or_left_out_and_counted(
    two_folders: tuple[Path, Path], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, reason, words = BAD[case]
    path = write_tar(tmp_path / "t" / "a.tar", [("0000.npy", npy(GOOD)), *entries, ("9999.npy", npy(GOOD))])
    with pytest.raises(UserError, match=words) as caught:
        reindex(tmp_path / "out", [str(path)], tokenizer=two_folders[0], quiet=True)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
    out = reindex(tmp_path / "out", [str(path)], tokenizer=two_folders[0], on_bad="skip")
    assert json.loads((out / "prepared.json").read_text())["skipped"] == {reason: 1}
    assert f"skipped: 1 {reason}" in capsys.readouterr().out
    assert Index.load(out / "train").tokens.tolist() == [3, 3]
    assert list(Verification(out).faults()) == []
    content = bytearray(path.read_bytes())
    content[int(Index.load(out / "train").members["offset"][1])] ^= 1
    path.write_bytes(content)
    assert list(Verification(out).faults()) == [f"{path}: member 1: not what was written"]


def test_a_damaged_tar(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole = sample(tmp_path / "t", *[GOOD] * 20).read_bytes()
    path = tmp_path / "t" / "a.tar"
    for content in (whole[:5000], whole[:5120], whole[:3072] + b"x" * 512 + whole[3584:], b"", b"PK\x03\x04" * 300):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar: .*damaged or cut short") as caught:
            reindex(tmp_path / "out", [str(path)], tokenizer=two_folders[0], quiet=True)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:5000])
    out = reindex(tmp_path / "out", [str(path)], tokenizer=two_folders[0], on_bad="skip", quiet=True)
    assert json.loads((out / "prepared.json").read_text())["skipped"] == {"damaged tar": 1}
    assert len(Index.load(out / "train").members) == 5  # the fifth is whole up to its padding


def test_what_the_user_has_to_say_is_asked_for(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(entries: list[tuple[str, bytes | None]], words: str, **options: object) -> None:
        path = write_tar(tmp_path / "t" / "a.tar", entries)
        with pytest.raises(UserError, match=words) as caught:
            reindex(tmp_path / "out", [str(path)], tokenizer=two_folders[0], quiet=True, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    two = [("0.ids.npy", npy(GOOD)), ("0.mask.npy", npy(GOOD))]
    refused(two, r"ids in \.ids\.npy and \.mask\.npy: say which by --key")
    refused(two, r"no sample has \.tokens\.npy \(there are ids\.npy, mask\.npy\)", key="tokens.npy")
    refused([("0.bin", GOOD.tobytes())], "set --dtype to one of uint16")
    refused([("0.txt", b"some text")], r"holds text \(0\.txt\), not ids: set data\.input to it and run `sisa prepare`")
    refused([("0.json", b"[5, 6, 2]")], "write them as .npy")
    refused([("0.jpg", b"x")], r"no sample has ids in \.npy, \.u16, \.u32, \.bin \(there are jpg\)")
    refused([("0.npy", npy(np.array([5, 6], np.uint16)))], "no sample holds the eos, id 2.*--documents sample")
    refused([("0.npy", npy(GOOD)), ("1.npy", npy(GOOD.astype(np.int32)))], "ids of uint32 after others of uint16")
    out = reindex(
        tmp_path / "ids", [str(write_tar(tmp_path / "t" / "b.tar", two))], tokenizer=two_folders[0], key="ids.npy"
    )
    assert Index.load(out / "train").num_tokens == 3
    for entries, words in ((["nowhere.tar"], "no such tar"), (["http://x/a.tar"], "a URL"), ([__file__], "no .tar")):
        with pytest.raises(UserError, match=words):
            reindex(tmp_path / "out", entries, tokenizer=two_folders[0])
    with pytest.raises(UserError, match="exists"):
        reindex(out, [str(tmp_path / "t")], tokenizer=two_folders[0])


def test_headers_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's parser counts its depth for all threads at once, and refused three good headers of six thousand."""
    real, inside, most = np.lib.format.read_array_header_1_0, 0, 0

    def slowly(stream: io.BytesIO) -> tuple[Any, ...]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return real(stream)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slowly)
    content = npy(GOOD)
    entry = tarfile.TarInfo("0.npy")
    entry.size = len(content)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: foreign._npy(content, entry, "t.tar"), range(12)))
    assert most == 1 and all(ids.number == GOOD.size for ids in found)


def test_a_failure_of_the_parser_itself_is_not_taken_for_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(stream: io.BytesIO) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", fails)
    with pytest.raises(SystemError):
        foreign._npy(npy(GOOD), tarfile.TarInfo("0.npy"), "t.tar")


def test_held_out_shards(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    ours = Index.load(two_folders[0] / "train")
    paths = [str(path) for path in write_shards(tmp_path / "t", ours)]
    out = reindex(tmp_path / "out", paths[1:], tokenizer=two_folders[0], validation=paths[:1], quiet=True)
    found = [Index.load(out / split).num_tokens for split in ("train", "validation")]
    assert sum(found) == ours.num_tokens and found[1] == int(ours.tokens[:8].sum())
    with pytest.raises(UserError, match="for training and for validation"):
        reindex(tmp_path / "both", paths, tokenizer=two_folders[0], validation=paths[:1])
