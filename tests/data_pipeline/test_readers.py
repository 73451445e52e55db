"""Slices read what the whole file holds, every bad document is one line or counted, and no bytes at all get past."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import write_corpus
from data_pipeline.inputs import list_files
from data_pipeline.readers import BadDocument
from data_pipeline.slices import OnBad, SliceReader, Span, plan_slices
from samples import make_text
from sisa_dist.config import UserError


def read(
    path: Path, spans: list[Span] | None = None, *, on_bad: OnBad = "stop"
) -> tuple[list[tuple[int, str]], Counter[str]]:
    """[(place, text)] and what was skipped."""
    reader = SliceReader(list_files(str(path)), spans or [Span(0)], text_key="text", on_bad=on_bad)
    found = [(place, document.text) for _, place, document in reader]
    assert found == sorted(found, key=lambda row: row[0])
    return found, reader.skipped


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="aé\n😀 ", max_size=12), max_size=12),
    gaps=st.lists(st.sampled_from(["", "\n", " \n"]), max_size=12),
    ends_with_newline=st.booleans(),
    edges=st.lists(st.integers(1, 400), max_size=6),
)
def test_a_jsonl_cut_anywhere_reads_as_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    gaps: list[str],
    ends_with_newline: bool,
    edges: list[int],
) -> None:
    lines = [json.dumps({"text": "." + text}, ensure_ascii=False) + "\n" for text in ["first", *texts]]
    content = "".join(line + gap for line, gap in zip(lines, [*gaps, *[""] * len(lines)], strict=False)).encode()
    content = content if ends_with_newline else content.rstrip(b"\n")
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(content)
    whole, _ = read(path)
    inner = sorted({edge for edge in edges if edge < len(content)})
    cuts = [0, *inner, len(content)]
    spans = [Span(0, start, stop) for start, stop in pairwise(cuts)]
    assert [text for _, text in whole] == ["." + text for text in ["first", *texts]]
    assert [row for span in spans for row in read(path, [span])[0]] == whole


def test_a_bad_line_is_named_by_its_number_in_any_slice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(200)]
    rows[137] = '{"txt": 1}\n'
    path.write_text("".join(rows))
    assert "a.jsonl:138: no key 'text'" in refusal(path)
    half = path.stat().st_size // 2
    assert read(path, [Span(0, 0, half)])[0]
    with pytest.raises(BadDocument, match=r"a\.jsonl:138: no key 'text'"):
        read(path, [Span(0, half, path.stat().st_size)])
    found, skipped = read(path, [Span(0, half, path.stat().st_size)], on_bad="skip")
    assert skipped == {"no text": 1}
    assert found[-1][1] == "text 199" and found == [row for row in read(path, on_bad="skip")[0] if row[0] >= half]


def test_every_reason_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep, digits = b"[" * 50_000, b'{"text": ' + b"7" * 5000 + b"}"
    rows = [b'{"text": "one"}', b'{"text": "caf\xe9"}', b'{"text": "a\\ud800"}', b'{"text": null}', b"[1]", b"{", deep]
    rows += [digits, b'{"body": "x"}', b'{"text": ""}', b"", b'{"text": "two", "id": null}']
    path.write_bytes(b"\n".join(rows))
    found, skipped = read(path, on_bad="skip")
    assert [text for _, text in found] == ["one", "two"]
    assert skipped == {"not UTF-8": 1, "half a surrogate pair": 1, "no text": 2, "no JSON": 4, "empty": 1}
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert read(tmp_path / "b.txt", on_bad="skip") == ([], Counter({"not UTF-8": 1}))
    (tmp_path / "c.txt").write_bytes(b"")
    assert read(tmp_path / "c.txt", on_bad="skip") == ([], Counter({"empty": 1, "file without text": 1}))


def test_a_cut_gz_is_refused_or_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": make_text(i)}) + "\n" for i in range(300)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content)[:-2000])
    assert "damaged, cut short or unreadable" in refusal(path)
    found, skipped = read(path, on_bad="skip")
    assert skipped == {"damaged file": 1} and 100 < len(found) < 300
    assert [text for _, text in found] == [make_text(i) for i in range(len(found))]


def test_zst_of_any_frames_and_cut_anywhere(tmp_path: Path) -> None:
    lines = [json.dumps({"text": make_text(i)}).encode() + b"\n" for i in range(50)]
    path = tmp_path / "a.jsonl.zst"
    packed = b"".join(zstandard.compress(b"".join(lines[i : i + 7])) for i in range(0, 50, 7))  # frames cut no line
    path.write_bytes(packed)
    assert [text for _, text in read(path)[0]] == [make_text(i) for i in range(50)]
    one = zstandard.compress(b"".join(lines))
    for size in (3, 5, 100, len(one) // 2, len(one) - 1):
        path.write_bytes(one[:size])
        assert "damaged, cut short" in refusal(path), size
    path.write_bytes(packed + b"garbage")
    assert "damaged, cut short" in refusal(path)
    path.write_bytes(b"")
    assert "holds no text" in refusal(path)


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    texts = [make_text(i) for i in range(100)]
    table = pyarrow.table({"n": list(range(100)), "text": texts, "id": [f"row {i}" for i in range(100)]})
    pyarrow.parquet.write_table(table, path, row_group_size=9)
    files = list_files(str(path))
    (slices,) = (plan_slices(files, files[0].size // 5),)
    assert len(slices) > 3
    assert [row for spans in slices for row in read(path, spans)[0]] == list(enumerate(texts)) == read(path)[0]
    (document,) = (d for _, place, d in SliceReader(files, [Span(0)], text_key="text") if place == 42)
    assert document.id == "row 42"
    with pytest.raises(UserError, match=r"a\.parquet: no key 'body' \(it has n, text, id\)"):
        list(SliceReader(files, [Span(0)], text_key="body"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert "a.parquet: row 1: the value of 'text' is no text (NoneType)" in refusal(path)
    assert read(path, on_bad="skip") == ([(0, "a"), (2, "b")], Counter({"no text": 1}))
    path.write_bytes(path.read_bytes()[:-3])
    assert "damaged, cut short" in refusal(path)
    assert len(plan_slices(list_files(str(path)), 10)) == 1  # planning does not fail, reading does


@pytest.mark.parametrize(("library", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_a_missing_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"anything")
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    assert f"needs the `{library}` library: pip install 'sisa-dist[corpus]'" in refusal(tmp_path / name)


def write_tar(path: Path, members: list[tuple[str, bytes | None]]) -> Path:
    """Content None: a symbolic link out of the folder."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content or b""))
    return path


def test_tars_made_badly_or_to_do_harm(tmp_path: Path) -> None:
    good: list[tuple[str, bytes | None]] = [("a.txt", b"one"), ("b.txt", b"two")]
    cases: dict[str, tuple[list[tuple[str, bytes | None]], str]] = {
        "a key twice in a tar": ([("b.txt", b"again")], "b.txt: comes twice"),
        "a name that leads out": ([("../c.txt", b"x")], "../c.txt: a name that leads out"),
        "a link in a tar": ([("c.txt", None)], "c.txt: a link"),
        "not UTF-8": ([("c.txt", b"\xff")], "c.txt: not UTF-8"),
        "no JSON": ([("c.json", b"{")], "c.json: not valid JSON"),
    }
    for reason, (members, line) in cases.items():
        path = write_tar(tmp_path / "x.tar", [*good, *members])
        assert line in refusal(path), reason
        found, skipped = read(path, on_bad="skip")
        kept = ["one"] if "twice" in reason else ["one", "two"]
        assert [text for _, text in found] == kept and skipped == {reason: 1}
    path = write_tar(tmp_path / "x.tar", [*good, ("a.txt", b"far from the first")])
    assert "a: its key came before in this tar" in refusal(path)
    assert read(path, on_bad="skip") == ([(1, "one"), (2, "two")], Counter({"a key twice in a tar": 1}))
    for name in ("/c.txt", "d/../../c.txt"):
        assert "leads out" in refusal(write_tar(tmp_path / "x.tar", [*good, (name, b"x")]))
    found, _ = read(write_tar(tmp_path / "x.tar", [("s/a.txt", b"one"), ("t/a.txt", b"two"), ("s/a..b.txt", b"x")]))
    assert [text for _, text in found] == ["one", "two"]  # a..b is no way out; extension b.txt is none of ours


def test_samples_without_text_are_counted_and_never_stop(tmp_path: Path) -> None:
    """Images beside texts are as usual in a tar as a name whose text stands behind its second dot is a mistake."""
    members: list[tuple[str, bytes | None]] = [("a.txt", b"one"), ("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")]
    path = write_tar(tmp_path / "x.tar", [*members, ("c.json", b'{"text": "two"}'), ("d.v1.txt", b"three")])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("more/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    for on_bad in ("stop", "skip"):
        assert read(path, on_bad=on_bad) == ([(1, "one"), (3, "two")], Counter({"sample without text": 2}))
    assert "holds no text" in refusal(write_tar(tmp_path / "y.tar", members[2:]))


def test_damaged_bytes_of_any_kind_are_documents_or_one_line(tmp_path: Path) -> None:
    """Fuzz: a few bytes changed, cut or doubled in every kind of file."""
    write_corpus(tmp_path / "mixed")
    rng, refused = random.Random(7), Counter[str]()
    for path in sorted((tmp_path / "mixed").iterdir()):
        if path.name.startswith("f") and path.name != "f320.txt":
            continue
        whole = path.read_bytes()
        target = tmp_path / path.name
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(content))
                change = rng.choice(["flip", "cut", "double", "zero"])
                if change == "flip":
                    content[at] ^= 1 << rng.randrange(8)
                elif change == "cut":
                    content = content[: max(1, at)]
                elif change == "double":
                    content[at:at] = content[at : at + 600]
                else:
                    content[at : at + 20] = bytes(len(content[at : at + 20]))
            target.write_bytes(content)
            try:
                read(target)
            except UserError as error:
                assert "\n" not in str(error) and target.name in str(error)
                refused[path.name] += 1
            read(target, on_bad="skip")
    assert refused["b.jsonl.gz"] > 40 and refused["d.parquet"] > 10 and refused["a.jsonl"] > 10
