"""`benchmark.py data`: our loader beside those of others on the same tokens, each measurement in a process of its own.

    python tools/benchmark.py data [--megatokens 32] [--rounds 3] [--seq-len 2048] [--rows 8] [--workers 1 2]

Tokens/s `cold` (a new process, the files dropped from the page cache: their disk is read), `first` (a new process, the
page cache full) and `warm` (the second epoch of that process); seconds from a state in mid-epoch to the first batch;
and bytes a token asked of an HTTP server. In every round each loader has its turn, and the medians over the rounds are
given: on a busy machine only ratios within one run mean anything. What a worker is, and what each loader does not do,
stands in data_loaders.py and in the figures. A loader whose library is not installed is skipped with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from data_http import counting_server
from data_loaders import EOS, KINDS, NOTES, VOCAB
from numpy.typing import NDArray

OVER_HTTP = ("ours", "webdataset")
NOT_OVER_HTTP = "reads no http:// (its remotes are object stores)"


def add_parser(commands: Any) -> None:
    data = commands.add_parser("data", help="our loader beside webdataset, Streaming, LitData and a memory map")
    data.add_argument("--megatokens", type=float, default=32.0, help="2^20 tokens each")
    data.add_argument("--seq-len", type=int, default=2048)
    data.add_argument("--rows", type=int, default=8, help="windows in a batch")
    data.add_argument("--step", type=int, default=4, help="batches in an optimizer step, of ours")
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    data.add_argument("--rounds", type=int, default=3)
    data.add_argument("--member-tokens", type=int, default=16_384)
    data.add_argument("--loaders", nargs="+", choices=list(KINDS), default=list(KINDS))
    data.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    unit = arguments.rows * arguments.step * arguments.seq_len
    tokens = corpus(max(1, round(arguments.megatokens * 2**20 / unit)) * unit)
    figures: dict[str, Any] = {"tokens": len(tokens), "skipped": {}, "notes": {}}
    present = []
    for name in arguments.loaders:
        library = KINDS[name].requires
        if library and importlib.util.find_spec(library) is None:
            figures["skipped"][name] = f"{library} is not installed"
        else:
            present.append(name)
            figures["notes"][name] = NOTES[name]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        places = {name: str(Path(folder, name.replace(" ", "_"))) for name in present}
        for name, place in places.items():
            Path(place).mkdir()
            KINDS[name].write(tokens, Path(place), seq_len=arguments.seq_len, member_tokens=arguments.member_tokens)
        figures["loaders"] = _in_rounds(places, arguments, int(tokens.sum(dtype=np.int64)))
        figures["http"] = _over_http(places, arguments, len(tokens))
    figures["load average"] = os.getloadavg()[0]
    return figures


def corpus(count: int) -> NDArray[np.uint16]:
    """Ids with a few frequent ones, in documents of 1000 tokens on average; the last token ends one."""
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.3, count) % (VOCAB - 3) + 3).astype(np.uint16)
    tokens[rng.random(count) < 1e-3] = EOS
    tokens[-1] = EOS
    return tokens


def _in_rounds(places: dict[str, str], arguments: argparse.Namespace, total: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            for name, place in places.items():
                row = found[f"{name}, {workers}"]
                job = _job(name, place, arguments, workers)
                drop(Path(place))
                cold = _child(job | {"passes": 1})
                warm = _child(job | {"passes": 2, "half": _batches(job, arguments) // 2})
                if warm["sum"] != total:
                    raise SystemExit(f"{name}: its tokens sum to {warm['sum']}, not {total}: it served others")
                row["cold"].append(cold["rates"][0])
                row["first"].append(warm["rates"][0])
                row["warm"].append(warm["rates"][1])
                row["start, s"].append(warm["start"])
                row["resume, s"].append(_resume(job, warm["state"], arguments))
    middle = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in found.items()}
    for name, row in middle.items():
        floor = middle.get(f"memory map, {name.rpartition(', ')[2]}")
        if floor:
            row["warm / memory map"] = round(row["warm"] / floor["warm"], 3)
    return {
        name: {key: round(value) if key in ("cold", "first", "warm") else round(value, 4) for key, value in row.items()}
        for name, row in middle.items()
    }


def _resume(job: dict[str, Any], state: Any, arguments: argparse.Namespace) -> float:
    """Without a state: from the start, and over all batches before the place."""
    skip = {} if state is not None else {"skip": _batches(job, arguments) // 2}
    found: float = _child(job | {"state": state} | skip)["resume"]
    return found


def _over_http(places: dict[str, str], arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, place in places.items():
        if name not in OVER_HTTP:
            figures[name] = "a local file" if name == "memory map" else NOT_OVER_HTTP
            continue
        with counting_server(Path(place)) as server:
            found = _child(_job(name, server.url, arguments, 1) | {"passes": 1})
        figures[name] = {
            "bytes of shards a token": round(server.counts["shards"] / count, 4),
            "bytes of the index": server.counts["others"],
            "requests": server.counts["requests"],
            "tokens/s": round(found["rates"][0]),
        }
    return figures


def _job(name: str, place: str, arguments: argparse.Namespace, workers: int) -> dict[str, Any]:
    shape = {"rows": arguments.rows, "seq_len": arguments.seq_len, "step": arguments.step, "workers": workers}
    return {"kind": name, "place": place, "shape": shape, "tokens": int(arguments.megatokens * 2**20)}


def _batches(job: dict[str, Any], arguments: argparse.Namespace) -> int:
    unit = arguments.rows * arguments.step * arguments.seq_len
    return max(1, round(job["tokens"] / unit)) * arguments.step


def _child(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("data_child.py")), json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{job['kind']}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def drop(folder: Path) -> None:
    """Takes the files out of the page cache; what is not on the disk yet is put there first."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
