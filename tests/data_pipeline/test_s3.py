"""Shards and text in an S3 bucket, through s3fs, against a real S3 API on loopback: what it gives and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from corpora import SMALL, write_corpus
from data_pipeline import fetch
from data_pipeline.fetch import Fetcher, Gone, Missing, RemoteSettings
from data_pipeline.index import Index
from data_pipeline.inputs import list_files
from data_pipeline.prepare import prepare
from data_pipeline.prepared import open_split
from runs import losses
from s3_server import S3, serve_s3, upload
from samples import contents, random_documents, write_split
from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.training.trainer import train

QUICK = RemoteSettings(retries=2, timeout=20.0)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[s3]'")
    with serve_s3() as served:
        yield served


@pytest.fixture
def s3(server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server without faults, named and keyed by the environment alone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "thing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else it is asked for credentials, and time passes
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(fetch, "_FIRST_PAUSE", 0.002)
    forget()
    server.fault = lambda path, number: None
    server.requests.clear()
    yield server
    server.fault = lambda path, number: None
    forget()


def forget() -> None:
    """A session reads the environment when it begins."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("split")
    write_split(root / "train", random_documents(3, 20))
    return root


@pytest.fixture
def url(s3: S3, folder: Path) -> str:
    """The split in a bucket."""
    if not fsspec.filesystem("s3").exists("split"):
        upload(folder, "split")
    s3.requests.clear()
    return "s3://split"


def ids(index: Index) -> list[list[int]]:
    return [index.read_member(member).tolist() for member in range(len(index.members))]


def opened(url: str, settings: RemoteSettings = QUICK) -> Index:
    index = open_split(url, "train", remote=settings)
    assert index is not None
    return index


def test_the_same_tokens_by_range(s3: S3, folder: Path, url: str) -> None:
    local, remote = Index.load(folder / "train"), opened(url)
    s3.requests.clear()
    assert remote.fingerprint == local.fingerprint and ids(remote) == ids(local)
    wanted = []
    for row in local.members:
        shard = local.shards[int(row["shard"])]["name"]
        start, size = int(row["offset"]), 2 * int(row["tokens"])
        wanted.append((f"{url[5:]}/train/{shard}", f"bytes={start}-{start + size - 1}"))
    assert s3.requests == wanted
    assert open_split(url, "validation", remote=QUICK) is None


@pytest.mark.parametrize(
    "answer", [("503 Slow Down", "SlowDown"), ("500 Internal", "InternalError"), ("400 Bad", "RequestTimeout")]
)
def test_what_passes_is_tried_again_and_once_only(s3: S3, folder: Path, url: str, answer: tuple[str, str]) -> None:
    """Every member's first request fails; s3fs and botocore must not try of their own, which would multiply."""
    remote = opened(url)
    s3.requests.clear()
    s3.fault = lambda path, number: answer if number % 2 == 0 else None
    assert ids(remote) == ids(Index.load(folder / "train"))
    assert remote.remote is not None and remote.remote.fetcher.traffic.retries == len(remote.members)
    assert len(s3.requests) == 2 * len(remote.members)


def test_a_server_that_stays_busy_stops_with_the_name(s3: S3, url: str) -> None:
    remote = opened(url)
    s3.fault = lambda path, number: ("503 Slow Down", "SlowDown") if path.endswith("000001.tar") else None
    with pytest.raises(
        UserError, match=r"^s3://\S+000001\.tar: .*3 tries .*because of SlowDown.*data\.retries"
    ) as caught:
        ids(remote)
    assert "\n" not in str(caught.value)
    assert sum(path.endswith("000001.tar") for path, _ in s3.requests) == 3


def test_a_missing_key_a_missing_bucket_and_one_that_is_not_ours(s3: S3, url: str) -> None:
    fetcher = Fetcher(QUICK)
    for place in (f"{url}/train/none.tar", "s3://no-such-bucket/x.tar"):
        with pytest.raises(Missing, match=rf"^{place}: cannot be read \(there is no such file\)"):
            fetcher.read(place, 2, 5)
    for code in ("AccessDenied", "ExpiredToken", "SignatureDoesNotMatch", "InvalidAccessKeyId"):
        s3.fault = lambda path, number, code=code: ("403 Forbidden", code)  # type: ignore[misc]
        with pytest.raises(Gone, match=rf"no right to read it: because of {code}\).*credentials") as caught:
            fetcher.read(f"{url}/train/000000.tar", 2, 5)
        assert not isinstance(caught.value, Missing)  # it may be there: nobody may take it for skippable
    assert fetcher.traffic.retries == 0


def test_a_range_behind_the_end_is_not_asked_for_again(s3: S3, url: str) -> None:
    fetcher = Fetcher(QUICK)
    with pytest.raises(UserError, match=r"000000\.tar: cannot be read \(it ends before the part"):
        fetcher.read(f"{url}/train/000000.tar", 10**6, 10**6 + 5)
    assert fetcher.traffic.retries == 0


def test_no_credentials_and_a_wrong_endpoint_are_one_line(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    forget()
    with pytest.raises(UserError, match=r"Invalid endpoint: nonsense"):
        opened(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    forget()
    with pytest.raises(UserError, match=r"3 tries .*127\.0\.0\.1:1/"):
        opened(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget()
    with pytest.raises(
        UserError, match=r"Unable to locate credentials: set AWS_ACCESS_KEY_ID .* FSSPEC_S3_ANON"
    ) as caught:
        opened(url)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_all_may_read_needs_no_credentials(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: fsspec reads FSSPEC_S3_ANON when it is imported."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    filesystem = fsspec.get_filesystem_class("s3")(key="any", secret="thing", endpoint_url=s3.url)
    for path in filesystem.find("split"):
        filesystem.chmod(path, "public-read")
    script = f"from data_pipeline.index import Index; print(Index.load({url + '/train'!r}).num_tokens)"
    for anonymous, code in (("true", 0), ("", 1)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"FSSPEC_S3_ANON": anonymous} if anonymous else dict(os.environ),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert "Unable to locate credentials" in done.stderr


def test_a_run_reads_its_shards_from_a_bucket(s3: S3, tiny: RunConfig, tmp_path: Path) -> None:
    """Same losses to the bit, with a busy server, a cache, and a resume in the middle."""
    tree = tiny.model_dump()
    there = upload(Path(tree["data"]["folder"]), "a-run")
    tree["training"] |= {"steps": 4, "checkpoint_every": 2}
    local = parse_config(tree | {"output_dir": str(tmp_path / "local")}, source="test")
    tree["data"] |= {"folder": there, "cache_folder": str(tmp_path / "cache"), "retries": 2}
    remote = parse_config(tree | {"output_dir": str(tmp_path / "remote")}, source="test")
    train(local, quiet=True)
    s3.fault = lambda path, number: ("503 Slow Down", "SlowDown") if number % 5 == 1 else None
    train(remote, quiet=True)
    assert losses(tmp_path / "local") == losses(tmp_path / "remote")
    (tmp_path / "remote" / "checkpoints" / "step_00000004").rename(tmp_path / "away")
    s3.requests.clear()
    train(remote, quiet=True)
    assert losses(tmp_path / "local") == losses(tmp_path / "remote")
    assert not [path for path, _ in s3.requests if path.endswith(".tar")]  # they lie in the cache


def test_prepare_reads_text_in_a_bucket(s3: S3, tiny: RunConfig, tmp_path: Path) -> None:
    """Globs and single objects, every kind; the shards are those of the same files here."""
    write_corpus(tmp_path / "mixed")
    there = upload(tmp_path / "mixed", "text")
    made = []
    for name, base in (("local", str(tmp_path / "mixed")), ("remote", there)):
        tree = tiny.model_dump()
        tree["data"] |= {"input": [f"{base}/*.jsonl", f"{base}/*.txt", f"{base}/*.parquet", f"{base}/*.tar"]}
        tree["data"] |= {"folder": str(tmp_path / name), "workers": 2}
        tree["model"] |= {"vocab_size": 384}
        made.append(prepare(parse_config(tree, source="test"), quiet=True, sizes=SMALL))
    named = ("prepared.json", "tokenizer_card.json")  # they say where the text was
    shards = [{k: v for k, v in contents(where).items() if k not in named} for where in made]
    assert shards[0] == shards[1] and any(name.endswith(".tar") for name in shards[0])


def test_text_that_cannot_be_listed_is_one_line(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/\*\.jsonl: ") as caught:
        list_files("s3://no-such-bucket/*.jsonl")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget()
    with pytest.raises(UserError, match=r"s3://split/\*\.jsonl: cannot be reached \(Unable to locate credentials"):
        list_files("s3://split/*.jsonl")


@pytest.mark.parametrize("place", ["s3://split/a.jsonl", "s3://split/train"])
def test_without_s3fs_the_remedy_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"Install s3fs to access S3\)?: pip install 'sisa-dist\[s3\]'"):
        list_files(place) if place.endswith("jsonl") else Index.load(place)
