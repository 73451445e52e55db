"""One measurement of `benchmark.py data`, in a process of its own: python tools/data_child.py 'JSON' prints JSON.

    {"kind", "place", "shape", "passes": n}   open, n passes timed, one in which the tokens are summed; a state at half
    {"kind", "place", "shape", "state"}       from the state to the first batch

A pass is timed from its first batch on, so that starting workers is not taken for reading; what starting takes is
`start`. Nothing here knows one loader from another.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from data_loaders import KINDS, Shape


def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    kind, shape = KINDS[job["kind"]], Shape(**job["shape"])
    if kind.requires:
        __import__(kind.requires)  # what importing takes is not the loader's speed
    started = time.perf_counter()
    reader = kind(job["place"], shape, job.get("state"))
    if "passes" not in job:
        next(reader.epoch())
        return {"resume": time.perf_counter() - started}
    found: dict[str, Any] = {"rates": []}
    for number in range(job["passes"]):
        began = started if number == 0 else time.perf_counter()
        batches = reader.epoch()
        next(batches)
        first = time.perf_counter()
        if number == 0:
            found["start"] = first - began
        count = 0
        for tokens, _ in batches:
            count += tokens.numel()
        found["rates"].append(count / max(1e-9, time.perf_counter() - first))
    total = tokens_seen = 0
    for number, (tokens, labels) in enumerate(reader.epoch(), start=1):
        assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape
        total, tokens_seen = total + int(tokens.sum()), tokens_seen + tokens.numel()
        if number == job["half"]:
            found["state"] = reader.state(number)
    return found | {"sum": total, "tokens": tokens_seen}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
