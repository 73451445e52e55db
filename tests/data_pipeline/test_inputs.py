"""Inputs that are no local files: a real HTTP server on loopback, memory, Hugging Face data sets in a folder."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from corpora import SMALL, write_corpus
from data_pipeline.building import Interrupted
from data_pipeline.inputs import list_files
from data_pipeline.prepare import prepare
from data_pipeline.slices import SliceReader, Span, plan_slices
from data_pipeline.sources import iter_documents
from samples import contents, documents_of, make_text
from sisa_dist.config import RunConfig, UserError

MakeConfig = Callable[..., RunConfig]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `folder`; with `ranges` it understands Range, with `cut` it hangs up that many bytes before the end."""

    folder: ClassVar[Path]
    ranges: ClassVar[bool] = True
    cut: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, *, send: bool) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.ranges else None
        start = int(asked[1]) if asked else 0
        stop = min(len(content), int(asked[2]) + 1) if asked and asked[2] else len(content)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{len(content)}"')
        self.end_headers()
        if send:
            self.wfile.write(content[start : max(start, min(stop, len(content) - self.cut))])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Handler]]]:
    """(address, handler) of a server of tmp_path/mixed."""
    handler = type("Served", (Handler,), {"folder": tmp_path / "mixed"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", handler
        finally:
            running.shutdown()
            thread.join()


def texts_of(inputs: str | list[str]) -> list[str]:
    return [document.text for document in iter_documents(inputs)]


@pytest.mark.parametrize("ranges", [True, False])
def test_every_kind_over_http_is_what_it_is_on_disk(
    tmp_path: Path, server: tuple[str, type[Handler]], ranges: bool
) -> None:
    write_corpus(tmp_path / "mixed")
    address, handler = server
    handler.ranges = ranges
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.tar", "f320.txt"):
        url = f"{address}/{name}?token=1"
        (file,) = list_files(url)
        assert (file.name, file.size, file.ranges) == (name, (tmp_path / "mixed" / name).stat().st_size, ranges)
        if ranges or name not in ("d.parquet", "e.tar"):
            assert texts_of(url) == texts_of(str(tmp_path / "mixed" / name))
        else:
            with pytest.raises(UserError, match=rf"{name}.*no part of it alone.*fetch it"):
                texts_of(url)


def test_one_large_jsonl_is_shared_by_ranges(tmp_path: Path, server: tuple[str, type[Handler]]) -> None:
    write_corpus(tmp_path / "mixed")
    address, handler = server
    files = list_files(f"{address}/a.jsonl")
    slices = plan_slices(files, SMALL.smallest_slice)
    assert len(slices) > 3

    def rows(spans: list[Span]) -> list[tuple[int, str]]:
        return [(place, document.text) for _, place, document in SliceReader(files, spans, text_key="text")]

    assert [row for spans in slices for row in rows(spans)] == rows([Span(0)])
    handler.ranges = False
    assert len(plan_slices(list_files(f"{address}/a.jsonl"), SMALL.smallest_slice)) == 1


def test_prepared_from_http_as_from_disk(
    tmp_path: Path, make_config: MakeConfig, server: tuple[str, type[Handler]]
) -> None:
    write_corpus(tmp_path / "mixed")
    address, _ = server
    names = [path.name for path in sorted((tmp_path / "mixed").iterdir())]
    made = {}
    for folder, inputs in (
        ("http", [f"{address}/{name}" for name in names]),
        ("disk", [str(tmp_path / "mixed" / name) for name in names]),
    ):
        config = make_config(inputs, folder=folder, workers=2)
        made[folder] = contents(prepare(config, quiet=True, sizes=SMALL))
        made[folder] = {name: made[folder][name] for name in made[folder] if name.startswith(("train", "validation"))}
    assert made["http"] == made["disk"]


def test_what_a_server_does_wrong_is_one_line(tmp_path: Path, server: tuple[str, type[Handler]]) -> None:
    write_corpus(tmp_path / "mixed")
    address, handler = server
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be reached") as caught:
        list_files(f"{address}/nowhere.jsonl")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/a\.jsonl: cannot be reached"):
        list_files("http://127.0.0.1:9/a.jsonl")
    with pytest.raises(UserError, match="not a kind this reads"):
        list_files(f"{address}/a.html")
    with pytest.raises(UserError, match="nosuch"):
        list_files("nosuch://a/b.jsonl")
    handler.ranges, handler.cut = False, 500
    with pytest.raises(Interrupted, match=r"reading it failed.*run it again, it continues") as stopped:
        texts_of(f"{address}/a.jsonl")
    assert "\n" not in str(stopped.value)
    handler.cut = 0
    files = list_files(f"{address}/a.jsonl")
    (tmp_path / "mixed" / "a.jsonl").unlink()
    with pytest.raises(Interrupted, match="reading it failed"):
        list(SliceReader(files, [Span(0)], text_key="text", on_bad="skip"))  # what is not there now is not skipped


def test_globs_of_any_file_system() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/corpus/{name}.jsonl", json.dumps({"text": name}).encode())
    try:
        assert texts_of("memory://corpus/*.jsonl") == ["a", "b"]
        assert texts_of(["memory://corpus/b.jsonl", "memory://corpus/*.jsonl"]) == ["b", "a"]
        before = list_files("memory://corpus/a.jsonl")
        memory.pipe("/corpus/a.jsonl", json.dumps({"text": "c"}).encode())
        after = list_files("memory://corpus/a.jsonl")
        assert before[0].size == after[0].size and before[0].mtime_ns != after[0].mtime_ns
        with pytest.raises(UserError, match="no glob that matches"):
            list_files("memory://corpus/*.txt")
    finally:
        memory.rm("/corpus", recursive=True)


# --- data sets of the Hugging Face hub, of which a folder is the local stand-in


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(3):
        rows = [{"text": make_text(100 * part + i, 30), "id": f"{part}/{i}"} for i in range(40)]
        (folder / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"text": "not of this split"}\n')
    return folder


def test_a_data_set_is_streamed_in_its_pieces(
    tmp_path: Path, data_set: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    url = f"hf://{data_set}?split=train"
    (file,) = list_files(url)
    assert (file.kind, file.name, file.parts) == ("hf", "set:train", 3)
    documents = list(iter_documents(url))
    expected = [make_text(100 * part + i, 30) for part in range(3) for i in range(40)]
    assert [document.text for document in documents] == expected and documents[41].id == "1/1"
    assert [span for spans in plan_slices([file], 10**6) for span in spans] == [Span(0, i, i + 1) for i in range(3)]
    folder = prepare(make_config(url, workers=1), quiet=True)
    assert sorted(documents_of(folder, "train") + documents_of(folder, "validation")) == sorted(expected)
    version = file.mtime_ns
    (data_set / "train-0.jsonl").write_text('{"text": "changed"}\n')
    assert list_files(url)[0].mtime_ns != version


def test_what_a_data_set_lacks_is_one_line(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(url: str) -> str:
        with pytest.raises(UserError) as caught:
            list_files(url)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "which split? write hf://owner/name?split=train" in refusal("hf://owner/name")
    assert "'spilt' is none of split, config, revision" in refusal("hf://owner/name?spilt=train")
    assert "Available splits" in refusal(f"hf://{data_set}?split=nope")

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.dataset_info", offline)
        assert "(no route to host): mend it, or try when online" in refusal("hf://owner/name?split=train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the `datasets` library: pip install 'sisa-dist[corpus]'" in refusal(f"hf://{data_set}?split=train")
