"""Batches read together are, bit by bit, their windows read one by one."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.index import Index
from data_pipeline.rows import Rows
from data_pipeline.source import Place
from data_pipeline.stage import Stage
from data_pipeline.window import fill_row
from samples import write_split

CASES = 45


def random_split(rng: random.Random, folder: Path) -> Index:
    """Of 2 to 80 documents in members of 8 to 64 tokens: most members begin or end amid a document."""
    documents = [[rng.randint(3, 96) for _ in range(rng.randint(0, 60))] for _ in range(rng.randint(2, 8))]
    return write_split(folder, documents, member_tokens=rng.choice([8, 16, 32, 64]))


def length(rng: random.Random, tokens: int) -> int:
    """Of a window: one that the stream's last token ends, as an input or as a label, or any."""
    exact = rng.choice([0, 1, None])
    divisors = [] if exact is None else [size for size in range(1, 34) if tokens % size == exact % size]
    return rng.choice(divisors or range(1, 34))


def test_rows_are_the_windows_one_by_one(tmp_path: Path) -> None:
    """Labels, doc_ids and the number of targets; the cases that have a rule of their own are all met."""
    met: Counter[str] = Counter()
    for case in range(CASES):
        rng = random.Random(case)
        indexes = {name: random_split(rng, tmp_path / f"{case}-{name}") for name in ("one", "two")}
        chosen = rng.choice([None, {"one": 1.0, "two": 2.0}])
        first, seq_len = indexes["one"], length(rng, indexes["one"].num_tokens)
        document_mask = rng.random() < 0.7
        order: dict[str, Any] = dict(
            seq_len=seq_len,
            seed=rng.randint(0, 9),
            lanes=rng.choice([1, 2, 3, 8]),
            packing=rng.choice(["concat", "concat", "best_fit"]),
            document_mask=document_mask,
        )
        stage = Stage(indexes, **order, shares=chosen) if chosen else Stage({"one": first}, **order)
        count = rng.randint(1, 9)
        for begin in range(0, 2 * stage.sources["one"].windows + 1, count):
            shape = (count, seq_len)
            got = [np.full(shape, -7) for _ in range(2 + document_mask)]  # what the row before left in a buffer
            rows, targets = Rows(*got), 0
            want = [np.full(shape, -7) for _ in range(3)]
            for name, at, places in stage.places(begin, begin + count):
                source = stage.sources[name]
                rows.read(source, at, places)
                for row, epoch, window in zip(at, places.epochs, places.windows, strict=True):
                    runs = source.runs(Place(name, int(epoch), int(window)))
                    doc_ids = want[2][row] if document_mask else None
                    targets += fill_row(source.index, runs, want[0][row], want[1][row], doc_ids)
                    met.update(kinds(source.index, runs[-1].ranges, seq_len))
            for name, one, other in zip(("tokens", "labels", "doc_ids"), got, want, strict=False):
                np.testing.assert_array_equal(one, other, err_msg=f"{name} of case {case}, window {begin}")
            assert rows.targets == targets == (want[1] >= 0).sum(), (case, begin)
    assert min(met[kind] for kind in ("last token an input", "last token a label", "goes on")) > 20, met


def kinds(index: Index, ranges: list[Any], seq_len: int) -> list[str]:
    """Of a window's only or last run."""
    found: list[str] = []
    tokens = sum(r.stop - r.start for r in ranges)
    if len(ranges) == 1 and tokens == seq_len:
        found.append("last token an input")
    if tokens == seq_len + 1:
        whole = ranges[0].stop - ranges[0].start == seq_len
        if whole and ranges[-1].member == ranges[0].member + 1 and index.members["continued"][ranges[-1].member]:
            found.append("goes on")
        if index.num_tokens % seq_len == 1:
            found.append("last token a label")
    return found
