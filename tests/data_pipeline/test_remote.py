"""Shards over HTTP give the tokens of the local ones, whatever the server does, or one line that names the shard."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline import fetch
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from data_pipeline.loader import Loader, StepBatch, validation_batches
from data_pipeline.prepared import open_split
from range_server import Served, serve
from samples import random_documents, write_split
from sisa_dist.config import UserError

QUICK = RemoteSettings(retries=3, timeout=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_split(root / "train", random_documents(3, 60))
    return root


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE", 0.002)


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serve(folder) as server:
        yield server


def ids(index: Index) -> list[list[int]]:
    return [index.read_member(member).tolist() for member in range(len(index.members))]


def open_remote(served: Served, settings: RemoteSettings = QUICK) -> Index:
    index = open_split(served.url, "train", remote=settings)
    assert index is not None
    return index


def traffic(index: Index) -> dict[str, int]:
    assert index.remote is not None
    return index.remote.fetcher.traffic.as_dict()


def test_the_same_tokens_and_no_byte_too_many(folder: Path, served: Served) -> None:
    local, remote = Index.load(folder / "train"), open_remote(served)
    assert remote.fingerprint == local.fingerprint and ids(remote) == ids(local)
    assert [remote.segments(m).tolist() for m in range(30)] == [local.segments(m).tolist() for m in range(30)]
    beside = sum(path.stat().st_size for path in (folder / "train").iterdir() if path.suffix != ".tar")
    assert traffic(remote)["bytes"] == served.bytes == beside + 2 * local.num_tokens
    assert traffic(remote)["requests"] == len(served.requests) == 4 + len(local.members)
    assert open_split(served.url, "validation", remote=QUICK) is None


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut", "garbage"])
def test_what_passes_is_tried_again(folder: Path, served: Served, fault: int | str) -> None:
    """The first request for every file fails, and every seventh after it."""
    remote = open_remote(served)
    served.requests.clear()
    served.fault = lambda path, number: fault if number % 7 == 0 else None
    assert ids(remote) == ids(Index.load(folder / "train"))
    assert traffic(remote)["retries"] >= len(remote.shards)
    assert len(served.requests) == len(remote.members) + traffic(remote)["retries"]


@pytest.mark.parametrize("fault", [500, "cut"])
def test_the_index_itself_is_tried_again(folder: Path, served: Served, fault: int | str) -> None:
    served.fault = lambda path, number: fault if number == 0 else None
    assert ids(open_remote(served))[:3] == ids(Index.load(folder / "train"))[:3]


def test_a_damaged_index_is_refused(served: Served) -> None:
    for name in ("index.json", "members.npy", "token_counts.npy"):
        served.fault = lambda path, number, name=name: "garbage" if path.endswith(name) else None
        with pytest.raises(UserError, match=name):
            open_remote(served)
    served.fault = lambda path, number: "garbage" if path.endswith("segments.npy") else None
    with pytest.raises(UserError, match=r"segments\.npy"):
        open_remote(served)


def test_a_slow_answer_is_given_up_and_asked_for_again(folder: Path, served: Served) -> None:
    remote = open_remote(served, RemoteSettings(retries=2, timeout=0.4))
    served.fault = lambda path, number: 2.0 if path.endswith("000001.tar") and number == 0 else None
    assert ids(remote) == ids(Index.load(folder / "train"))
    assert traffic(remote)["retries"] >= 1


@pytest.mark.parametrize(
    ("fault", "tries", "words"),
    [(404, 1, "no such file"), (403, 1, "no right"), (410, 1, "no such file"), (401, 1, "401"), (500, 4, "4 tries"),
     ("cut", 4, "4 tries"), ("garbage", 2, "not what was written")],
)  # fmt: skip
def test_what_does_not_pass_stops_with_the_name(served: Served, fault: int | str, tries: int, words: str) -> None:
    remote = open_remote(served)
    served.fault = lambda path, number: fault if path.endswith("000001.tar") else None
    with pytest.raises(UserError, match=rf"000001\.tar: .*{words}") as caught:
        ids(remote)
    assert "\n" not in str(caught.value)
    assert sum(path.endswith("000001.tar") for path in served.requests) == tries


def test_a_dead_server_is_one_line(folder: Path) -> None:
    with serve(folder) as served:
        url = served.url
    with pytest.raises(UserError, match=r"4 tries .*data\.retries") as caught:
        Index.load(f"{url}/train", remote=QUICK)
    assert "\n" not in str(caught.value)


def test_a_shard_replaced_in_mid_run_is_never_taken_for_the_old_one(tmp_path: Path) -> None:
    write_split(tmp_path / "train", random_documents(3, 60))
    other = write_split(tmp_path / "other", random_documents(4, 60))
    with serve(tmp_path) as served:
        local, remote = Index.load(tmp_path / "train"), open_remote(served)
        before = [remote.read_member(m).tolist() for m in range(3)]
        shutil.copy(tmp_path / "other" / other.shards[1]["name"], tmp_path / "train" / remote.shards[1]["name"])
        for index in (local, remote):
            assert [index.read_member(m).tolist() for m in range(3)] == before
            with pytest.raises(UserError, match=r"000001\.tar: member 3 is not what was written.*replaced"):
                index.read_member(3)


def test_a_server_without_ranges_sends_each_shard_once_or_is_refused(
    folder: Path, served: Served, tmp_path: Path
) -> None:
    served.ranges = False
    with pytest.raises(UserError, match=r"no ranges: use one that does, or set data\.cache_folder and data\.cache_gb"):
        ids(open_remote(served))
    small = RemoteSettings(cache_folder=str(tmp_path / "small"), cache_gb=1e-6)
    with pytest.raises(UserError, match=r"data\.cache_gb to at least 0\.01"):
        ids(open_remote(served, small))
    remote = open_remote(served, RemoteSettings(cache_folder=str(tmp_path / "cache")))
    served.requests.clear()
    assert ids(remote) == ids(Index.load(folder / "train"))
    assert sorted(served.requests) == [f"train/{shard['name']}" for shard in remote.shards]


# --- the loader ---


def loader(index: Index, **changes: int) -> Loader:
    settings = dict(seq_len=7, seed=5, global_batch_windows=4, micro_batch_size=1, lanes=3, prefetch=4, read_threads=2)
    return Loader(index, **settings | changes)  # type: ignore[arg-type]


def rows(steps: list[StepBatch]) -> list[list[int]]:
    return [row for step in steps for batch in step.micro_batches for row in batch.tokens.tolist()]


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("cache", [False, True])
def test_the_loader_serves_what_it_serves_locally(
    folder: Path, served: Served, tmp_path: Path, prefetch: int, cache: bool
) -> None:
    served.fault = lambda path, number: [None, None, 500, None, "cut"][number % 5]
    settings = RemoteSettings(cache_folder=str(tmp_path) if cache else None)
    local, remote = Index.load(folder / "train"), open_remote(served, settings)
    steps = 2 * loader(local).windows_per_epoch // 4 + 2
    found = []
    for index in (local, remote):
        with loader(index, prefetch=prefetch).steps(0) as stream:
            found.append([next(stream) for _ in range(steps)])
    assert rows(found[0]) == rows(found[1])
    assert [step.digest for step in found[0]] == [step.digest for step in found[1]]


def test_validation_is_the_same(folder: Path, served: Served) -> None:
    local, remote = (
        list(validation_batches(index, seq_len=7, batch_size=3, dp_size=2, dp_rank=1))
        for index in (Index.load(folder / "train"), open_remote(served))
    )
    assert [b.tokens.tolist() for b in local] == [b.tokens.tolist() for b in remote] and len(local) > 10


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last_begun(index: Index) -> tuple[str, int]:
    """The shard that is needed last for the first time, and the step that does."""
    of, first = loader(index), {}
    for step in range(of.windows_per_epoch // 4):
        for place in of.window_ids(4 * step):
            for run in of.stage.sources["train"].runs(place):
                for range_ in run.ranges:
                    first.setdefault(index.shard_paths[int(index.members["shard"][range_.member])], step)
    path = max(first, key=lambda path: first[path])
    assert first[path] > 6
    return Path(path).name, first[path]


@pytest.mark.parametrize("connections", [1, 8])
def test_a_slow_shard_holds_up_nothing_before_it_is_needed_nor_reading_behind_it(
    folder: Path, served: Served, connections: int
) -> None:
    """The server sits on one shard until the test lets it go; all up to the step that needs it is served meanwhile."""
    remote = open_remote(served, RemoteSettings(retries=3, connections=connections))
    local = Index.load(folder / "train")
    name, due = last_begun(local)
    released = threading.Event()

    def fault(path: str, number: int) -> None:
        if path.endswith(name):
            assert released.wait(60)

    served.fault = fault
    with loader(local, prefetch=0).steps(0) as plain, loader(remote).steps(0) as stream:
        for _ in range(due):
            assert rows([next(stream)]) == rows([next(plain)])
        until(lambda: any(path.endswith(name) for path in served.requests))  # ahead: nobody has asked for the step yet
        waiting = threading.Thread(target=lambda: late.append(next(stream)))
        late: list[StepBatch] = []
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not late
        released.set()
        waiting.join(60)
        assert rows(late) == rows([next(plain)])
        assert rows([next(stream) for _ in range(10)]) == rows([next(plain) for _ in range(10)])
    assert served.parallel > 2 or connections == 1


def test_a_missing_shard_stops_the_run_when_it_is_due_and_not_before(folder: Path, served: Served) -> None:
    remote, local = open_remote(served), Index.load(folder / "train")
    name, due = last_begun(local)
    served.fault = lambda path, number: 404 if path.endswith(name) else None
    with loader(remote).steps(0) as stream:
        for _ in range(due):
            next(stream)
        for _ in range(2):
            with pytest.raises(UserError, match=rf"{name}: .*no such file"):
                next(stream)


def test_what_is_asked_for_ahead_is_bounded_and_nothing_is_left_over(folder: Path, served: Served) -> None:
    """In memory without a cache: at most the members of the 2 × prefetch steps behind the last one handed out."""
    remote = open_remote(served)
    of = loader(remote)
    remote.cache_bytes = 0  # hence the member read last is all that is kept, and the rest is asked for anew
    assert remote.remote is not None
    most = 0
    with of.steps(0) as stream:
        for step in range(3 * of.windows_per_epoch // 4):
            next(stream)
            held = list(remote.remote._asked)
            ahead = {
                remote.block(range_.member).key
                for later in range(step, step + 1 + 2 * 4)
                for place in of.window_ids(4 * later)
                for run in of.stage.sources["train"].runs(place)
                for range_ in run.ranges
            }
            assert set(held) <= ahead, "left over: it would lie in memory till the next epoch"
            most = max(most, len(held))
    assert 2 < most <= len(ahead)


def test_what_is_being_read_is_not_asked_for_again(folder: Path, served: Served) -> None:
    """Else it comes a second time, when its reader has been served, and nobody takes it out of memory."""
    remote = open_remote(served)
    assert remote.remote is not None
    released, shard = threading.Event(), remote.shards[0]["name"]
    served.fault = lambda path, number: None if released.wait(60) else 500
    reader = threading.Thread(target=remote.read_member, args=(0,))
    reader.start()
    until(lambda: any(path.endswith(shard) for path in served.requests))
    remote.ask([0])
    assert not remote.remote._asked
    released.set()
    reader.join(60)
    remote.ask([0])
    assert not remote.remote._asked and sum(path.endswith(shard) for path in served.requests) == 1


def test_a_forked_process_reads_with_threads_of_its_own(folder: Path, served: Served) -> None:
    remote, local = open_remote(served), Index.load(folder / "train")
    remote.ask(range(5))
    assert remote.read_member(0).tolist() == local.read_member(0).tolist()
    child = os.fork()
    if not child:
        status = 1
        try:
            remote.ask(range(len(remote.members)))
            status = 0 if ids(remote) == ids(local) else 2
        finally:
            os._exit(status)
    ended: list[tuple[int, int]] = []

    def has_ended() -> bool:
        ended.append(os.waitpid(child, os.WNOHANG))
        return ended[-1][0] == child

    until(has_ended)
    assert ended[-1][1] == 0
    assert ids(remote) == ids(local)


@pytest.mark.parametrize("fault", ["redirect", "hang up"])
def test_redirects_and_connections_that_close_are_followed_and_opened_anew(
    folder: Path, served: Served, fault: str
) -> None:
    remote = open_remote(served)
    served.fault = lambda path, number: fault if number % 3 == 0 and "moved" not in path else None
    assert ids(remote) == ids(Index.load(folder / "train"))
    if fault == "redirect":
        assert traffic(remote)["retries"] == 0 and any(path.startswith("moved/") for path in served.requests)


def test_an_index_that_changes_in_mid_run_is_the_next_runs(tmp_path: Path) -> None:
    """A run keeps the index it began with; a new one that no longer fits the shards is refused by its name."""
    write_split(tmp_path / "train", random_documents(3, 60))
    write_split(tmp_path / "other", random_documents(4, 60))
    with serve(tmp_path) as served:
        remote = open_remote(served)
        expected = ids(Index.load(tmp_path / "train"))
        for name in ("index.json", "members.npy", "segments.npy", "token_counts.npy"):
            shutil.copy(tmp_path / "other" / name, tmp_path / "train" / name)
        assert ids(remote) == expected
        assert open_remote(served).fingerprint != remote.fingerprint
        with pytest.raises(UserError, match=r"000000\.tar: .*(not what was written|it ends before)"):
            ids(open_remote(served))
