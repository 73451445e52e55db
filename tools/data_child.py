"""One measurement of `benchmark.py data`, in a process of its own: python tools/data_child.py 'JSON' prints JSON.

    {"kind", "place", "shape", "passes": n, "half"}   n epochs timed; with `half` one more, summed, and its state there
    {"kind", "place", "shape", "state", "skip"}       from the state to the first batch, over `skip` batches where given

A pass is timed from its first batch on, so that starting workers is not taken for reading; what starting takes is
`start`. Nothing here knows one loader from another.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from data_loaders import KINDS, Reader, Shape


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    kind, shape = KINDS[job["kind"]], Shape(**job["shape"])
    if kind.requires:
        __import__(kind.requires)  # what importing takes is not the loader's speed
    started = time.perf_counter()
    reader = kind(job["place"], shape, job.get("state"))
    if "passes" not in job:
        batches = reader.epoch()
        for _ in range(job.get("skip", 0) + 1):
            next(batches)
        return {"resume": time.perf_counter() - started}
    found: dict[str, Any] = {"rates": []}
    for number in range(job["passes"]):
        batches = reader.epoch()
        next(batches)
        first = time.perf_counter()
        if number == 0:
            found["start"] = first - started
        count = sum(tokens.numel() for tokens, _ in batches)
        found["rates"].append(count / max(1e-9, time.perf_counter() - first))
    return found | (_checked(reader, job["half"]) if "half" in job else {})


def _checked(reader: Reader, half: int) -> dict[str, Any]:
    """One more epoch, summed; the state after `half` of its batches."""
    total, state = 0, None
    for number, (tokens, labels) in enumerate(reader.epoch(), start=1):
        assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape
        total += int(tokens.sum())
        if number == half:
            state = reader.state()
    return {"sum": total, "state": state}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
