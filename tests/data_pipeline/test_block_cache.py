"""The disk cache: right and below its limit whoever dies in it, shared by processes, and never the end of a run."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.block_cache import BlockCache
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from range_server import serve
from samples import random_documents, write_split

LIMIT = 60_000


def name_of(payload: bytes) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def block(number: int) -> bytes:
    return random.Random(number).randbytes(500 + number * 37 % 4000)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]


# Puts and gets without end, and says when it has begun; the same blocks as every other process of the test.
_WORKER = """
import hashlib, random, sys
from data_pipeline.block_cache import BlockCache
name_of = lambda payload: hashlib.blake2b(payload, digest_size=16).hexdigest()
block = lambda number: random.Random(number).randbytes(500 + number * 37 % 4000)
cache = BlockCache(sys.argv[1], limit=int(sys.argv[2]), hash=name_of)
draw = random.Random(int(sys.argv[3]))
print("begun", flush=True)
while True:
    payload = block(draw.randrange(80))
    key = name_of(payload)
    with cache.alone(key):
        found = cache.get(key)
        assert found in (None, payload)
        if found is None:
            cache.put(key, payload)
"""


def test_killed_at_random_it_stays_right_and_below_its_limit(tmp_path: Path) -> None:
    draw = random.Random(0)
    workers: list[subprocess.Popen[str]] = []
    kills = 0
    try:
        end = time.monotonic() + 4
        while time.monotonic() < end or kills < 6:
            while len(workers) < 3:
                command = [sys.executable, "-c", _WORKER, str(tmp_path), str(LIMIT), str(draw.random())[2:8]]
                workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
                assert workers[-1].stdout is not None and workers[-1].stdout.readline() == "begun\n"
            time.sleep(draw.uniform(0, 0.05))
            victim = workers.pop(draw.randrange(len(workers)))
            assert victim.poll() is None, victim.stderr and victim.stderr.read()
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            kills += 1
            watcher = BlockCache(tmp_path, limit=LIMIT, hash=name_of)
            with watcher._locked(tmp_path / "lock"):
                assert watcher.size() <= LIMIT
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    cache = BlockCache(tmp_path, limit=LIMIT, hash=name_of)
    assert cache.size() <= LIMIT
    whole = 0
    for number in range(80):
        found = cache.get(name_of(block(number)))
        assert found in (None, block(number))
        whole += found is not None
    assert whole > 5
    for number in range(200, 240):  # goes on, clears what the dead left, and stays below
        assert cache.put(name_of(block(number)), block(number))
        assert cache.size() <= LIMIT
    assert not [path for path in files(tmp_path) if path.suffix == ".partial"]


@pytest.mark.parametrize("at", ["make_room", "write", "replace", "clear"])
def test_killed_at_each_place_of_a_put(tmp_path: Path, at: str) -> None:
    """A process that dies there; the next one finds whole blocks, and no more than the limit at any time."""
    child = os.fork()
    if not child:
        cache = BlockCache(tmp_path, limit=9_000, hash=name_of)
        for number in range(4):
            cache.put(name_of(block(number)), block(number))
        real_replace, real_unlink, real_write = os.replace, os.unlink, Path.write_bytes

        def die(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def half(path: Path, payload: bytes) -> int:
            real_write(path, payload[: len(payload) // 2])
            die()
            return 0

        if at == "make_room":
            cache._make_room = die  # type: ignore[method-assign, assignment]
        elif at == "write":
            Path.write_bytes = half  # type: ignore[method-assign, assignment]
        elif at == "replace":
            os.replace = lambda a, b: die() if str(b).endswith(".block") else real_replace(a, b)  # type: ignore
        else:
            removed: list[object] = []
            os.unlink = lambda path: (real_unlink(path), removed.append(path), len(removed) == 2 and die())  # type: ignore
        for number in range(4, 30):
            cache.put(name_of(block(number)), block(number))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cache = BlockCache(tmp_path, limit=9_000, hash=name_of)
    assert cache.size() <= 9_000
    for number in range(30, 60):
        assert cache.put(name_of(block(number)), block(number)) and cache.size() <= 9_000
    assert cache.get(name_of(block(59))) == block(59)


_READER = """
import sys
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
index = Index.load(sys.argv[1], remote=RemoteSettings(cache_folder=sys.argv[2]))
print("begun", flush=True); sys.stdin.readline()
index.ask(range(len(index.members)))
print(sum(int(index.read_member(m).sum()) for m in range(len(index.members))), index.remote.fetcher.traffic.as_dict())
"""


def test_processes_of_a_host_fetch_each_block_once(tmp_path: Path) -> None:
    local = write_split(tmp_path / "train", random_documents(3, 60))
    with serve(tmp_path) as served:
        command = [sys.executable, "-c", _READER, f"{served.url}/train", str(tmp_path / "cache")]
        readers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        for reader in readers:
            assert reader.stdout is not None and reader.stdout.readline() == "begun\n"
        answers = [reader.communicate("go\n", timeout=60)[0] for reader in readers]
        asked = [path for path in served.requests if path.endswith(".tar")]
    total = sum(int(local.read_member(m).sum()) for m in range(len(local.members)))
    assert [answer.split()[0] for answer in answers] == [str(total)] * 3
    assert len(asked) == len(local.members)


@pytest.mark.parametrize("broken", ["full", "read-only", "gone"])
def test_a_disk_that_fails_costs_requests_and_one_warning_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    local = write_split(tmp_path / "train", random_documents(3, 60))
    folder = tmp_path / "cache"
    with serve(tmp_path) as served:
        remote = Index.load(f"{served.url}/train", remote=RemoteSettings(cache_folder=str(folder)))
        assert remote.read_member(0).tolist() == local.read_member(0).tolist()
        real_write, real_open = Path.write_bytes, os.open

        def full(path: Path, payload: bytes) -> int:
            real_write(path, payload[:3])
            raise OSError(28, "No space left on device")

        def read_only(path: object, flags: int, *rest: int, **named: int) -> int:
            if str(path).startswith(str(folder)) and flags & os.O_CREAT:
                raise OSError(30, "Read-only file system")
            return real_open(path, flags, *rest, **named)  # type: ignore[arg-type]

        if broken == "full":
            monkeypatch.setattr(Path, "write_bytes", full)
        elif broken == "read-only":
            monkeypatch.setattr(os, "open", read_only)
        else:
            subprocess.run(["rm", "-r", str(folder)], check=True)
            folder.write_text("no folder any more")
        served.requests.clear()
        with caplog.at_level(logging.WARNING):
            remote.ask(range(1, len(remote.members)))
            for member in range(1, len(remote.members)):
                assert remote.read_member(member).tolist() == local.read_member(member).tolist()
        assert len(served.requests) == len(remote.members) - 1, "once each, though nothing could be kept"
    told = [record.getMessage() for record in caplog.records if "data.cache_folder" in record.getMessage()]
    assert len(told) == 1 and str(folder) in told[0]
    monkeypatch.undo()
    assert not folder.is_dir() or not [path for path in files(folder) if path.suffix == ".partial"]
