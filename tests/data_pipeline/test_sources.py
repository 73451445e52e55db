"""Every kind of input is read whole and in one order; every damage is one line that names file and remedy."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_pipeline.sources import Corpus, iter_documents
from sisa_dist.config import UserError


def texts(*inputs: str | Path, key: str = "text") -> list[str]:
    return [document.text for document in iter_documents([str(i) for i in inputs], key)]


def refusal(*inputs: str | Path, key: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        texts(*inputs, key=key)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_python_stdlib_is_large_sorted_and_repeatable() -> None:
    corpus = Corpus("python-stdlib")
    documents = list(corpus)
    ids = [document.id for document in documents]
    assert ids == sorted(ids, key=lambda name: Path(name).parts) and len(set(ids)) == len(ids)
    assert "textwrap.py" in ids
    assert not [i for i in ids if "site-packages" in i or i.startswith(("test/", "encodings/", "_sysconfigdata"))]
    assert sum(len(document.text.encode()) for document in documents) >= 8_000_000
    assert [document.text for document in Corpus("python-stdlib")] == [document.text for document in documents]
    assert corpus.bytes_read == corpus.total_bytes


def test_txt_keeps_every_character_but_the_byte_order_mark(tmp_path: Path) -> None:
    text = "a\r\n\tb  c\n\n\u00a0é\x00 😀 \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_takes_the_key_and_the_id(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": 7, "body": "one\ntwo"}, {"body": "drei ü"}, {"body": ""}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    documents = list(iter_documents(str(path), "body"))
    assert [(d.id, d.text) for d in documents] == [("7", "one\ntwo"), (f"a{suffix}:3", "drei ü")]


def test_webdataset_tar_written_by_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "s/000", "txt": "first", "json": {"text": "metadata of the first"}})
        writer.write({"__key__": "s/001", "json": {"text": "second"}, "cls": 3})
        writer.write({"__key__": "s/002", "cls": 3})
        writer.write({"__key__": "s/003", "txt": "third"})
    documents = list(iter_documents(str(path)))
    assert [(d.id, d.text) for d in documents] == [
        ("a.tar:s/000", "first"),
        ("a.tar:s/001", "second"),
        ("a.tar:s/003", "third"),
    ]


def test_folders_and_globs_are_sorted_and_a_file_counts_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.txt", "sub/c.txt"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "*.csv" in refusal(tmp_path / "*.csv")
    assert "x.parquet" in refusal(tmp_path / "x.parquet")
    assert ".jsonl.gz" in refusal(tmp_path / "empty")
    assert "data.input" in refusal()


def test_damage_is_named_with_file_line_and_remedy(tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    row = b'{"text": "fine"}\n'
    packed = gzip.compress(row * 5000)
    assert "e.txt: holds no text" in refusal(file("e.txt", b""))
    assert "e.jsonl: holds no text" in refusal(file("e.jsonl", b"\n\n"))
    assert "iconv" in refusal(file("latin.txt", "caf\u00e9\n".encode("latin-1")))
    assert "line 2" in refusal(file("latin2.txt", b"x\ncaf\xe9"))
    assert "bad.jsonl:2: not valid JSON" in refusal(file("bad.jsonl", row + b'{"text": "cut'))
    assert "list.jsonl:1" in refusal(file("list.jsonl", b"[1]\n"))
    assert "key.jsonl:2" in (message := refusal(file("key.jsonl", row + b'{"body": "x"}')))
    assert "body" in message and "data.text_key" in message
    assert "type.jsonl:1" in refusal(file("type.jsonl", b'{"text": 3}'))
    assert "half a surrogate" in refusal(file("half.jsonl", b'{"text": "a\\ud800"}'))
    assert "cut.jsonl.gz" in refusal(file("cut.jsonl.gz", packed[: len(packed) // 2]))
    assert "not.jsonl.gz" in refusal(file("not.jsonl.gz", row))
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # inside the checksum
    assert "crc.jsonl.gz" in refusal(file("crc.jsonl.gz", bytes(flipped)))


def test_a_damaged_tar_is_never_taken_for_a_shorter_one(tmp_path: Path) -> None:
    members = {f"{i:03d}.txt": f"text number {i}".encode() * 50 for i in range(6)}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    assert len(texts(tmp_path / "whole.tar")) == 6
    cut = tmp_path / "cut.tar"
    unit = len(whole[: whole.index(b"001.txt")])  # one member with its header
    for size in (0, 100, 600, unit - 100, unit, unit + 100, 3 * unit, 3 * unit + 700, 6 * unit):
        cut.write_bytes(whole[:size])
        assert "cut.tar" in refusal(cut), size
    broken = bytearray(whole)
    broken[2 * unit + 150] ^= 0xFF  # the third header's checksum
    cut.write_bytes(bytes(broken))
    assert "cut.tar" in refusal(cut)
    cut.write_bytes(whole + whole)
    assert "joined" in refusal(cut)
    assert "no.tar: holds no text" in refusal(write_tar(tmp_path / "no.tar", {"0.bin": b"123"}))
    assert "0.json" in refusal(write_tar(tmp_path / "key.tar", {"0.json": b'{"body": ""}'}))


def test_tinyshakespeare_is_one_document() -> None:
    path = Path(__file__).parents[3] / "shared/data/corpus/tinyshakespeare/input.txt"
    if not path.is_file():
        pytest.skip("the corpus is not beside this checkout")
    (document,) = iter_documents(str(path))
    assert document.text.encode() == path.read_bytes()
