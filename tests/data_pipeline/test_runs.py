"""The external sort: any corpus, any buffers, any partitions: the documents of a plain sort by (key, slice, number)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cutting import lay_out
from data_pipeline.runs import Run, RunWriter, partition_of, partition_start, read_documents, shuffle_key

DTYPE = np.dtype("<u2")
TOP = 2**64


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 40), max_size=25), min_size=1, max_size=5),
    keys=st.sampled_from(["random", "few", "edges"]),
    buffer=st.sampled_from([1, 700, 10**6]),
    group=st.sampled_from([1, 64, 10**6]),
    partitions=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    drops=st.booleans(),
)
def test_a_plain_sort(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    keys: str,
    buffer: int,
    group: int,
    partitions: int,
    seed: int,
    drops: bool,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(seed)
    edges = [partition_start(p, partitions) for p in range(1, partitions)]
    border = [0, TOP - 1, *edges, *(e - 1 for e in edges)]
    draw = {
        "random": lambda: int(rng.integers(0, TOP, dtype=np.uint64)),
        "few": lambda: int(rng.integers(0, 3)) << 62,  # ties, which only (slice, number) can break
        "edges": lambda: border[int(rng.integers(len(border)))],
    }[keys]
    expected, runs, dropped = [], [], []
    for slice_, sizes in enumerate(lengths):
        writer = RunWriter(folder, f"{slice_}", DTYPE, buffer_bytes=buffer)
        mask = (rng.random(len(sizes)) < 0.3) & drops
        for number, size in enumerate(sizes):
            key, ids = draw(), rng.integers(0, 60_000, size).astype(DTYPE)
            writer.add(key=key, number=number, text_bytes=3 * size, ids=ids)
            if not mask[number]:
                expected.append((key, slice_, number, ids.tolist()))
        written = writer.close()
        assert written == {name: (folder / name).stat().st_size for name in written}
        runs.append(Run(folder / f"{slice_}", writer.runs))
        path = folder / f"{slice_}.dropped"
        path.write_bytes(mask.astype(np.uint8).tobytes())
        dropped.append(path if drops else None)
    assert buffer > 1 or all(n == 1 for run in runs for n in run.runs)
    expected.sort(key=lambda row: row[:3])
    found, counts = [], []
    for partition in range(partitions):
        low, high = partition_start(partition, partitions), partition_start(partition + 1, partitions)
        ids = list(read_documents(runs, low, high, dtype=DTYPE, dropped=dropped, group_bytes=group))
        assert [row[3] for row in expected if low <= row[0] < high] == [each.tolist() for each in ids]
        found += ids
        counts.append(len(ids))
    assert [row[3] for row in expected] == [each.tolist() for each in found]
    where = partition_of(np.array([row[0] for row in expected], np.uint64), partitions)
    assert np.bincount(where, minlength=partitions).tolist() == counts


def test_partitions_tile_the_keys_evenly() -> None:
    for partitions in (1, 2, 3, 7, 4096):
        starts = [partition_start(p, partitions) for p in range(partitions + 1)]
        assert starts[0] == 0 and starts[-1] == TOP
        sizes = np.diff(np.array(starts, object))
        assert max(sizes) - min(sizes) <= 2**32
        keys = np.array([*starts[:-1], *(s - 1 for s in starts[1:])], np.uint64)
        assert partition_of(keys, partitions).tolist() == 2 * list(range(partitions))


def test_keys_are_uniform_and_of_seed_file_and_place() -> None:
    keys = np.array([shuffle_key(0, 3, place) for place in range(4000)], np.uint64)
    counts = np.bincount(partition_of(keys, 16), minlength=16)
    assert abs(counts - 250).max() < 5 * np.sqrt(250)
    assert abs(np.corrcoef(keys.astype(float)[:-1], keys.astype(float)[1:])[0, 1]) < 0.08
    assert len({shuffle_key(s, f, p) for s in (0, 1, 2**64 - 1) for f in (0, 1) for p in (0, 1, 10**15)}) == 18
    assert shuffle_key(0, 1, 2) != shuffle_key(0, 12, 0) != shuffle_key(0, 0, 12)


def test_members_and_shards_are_numbered_on() -> None:
    cuts = lay_out(np.array([3, 0, 1, 9]), np.array([10, 0, 1, 41]), member_tokens=5, shard_members=2)
    assert [(cut.partition, cut.first_member, cut.first_shard) for cut in cuts] == [(0, 0, 0), (2, 2, 1), (3, 3, 2)]
    assert [(cut.documents, cut.tokens) for cut in cuts] == [(3, 10), (1, 1), (9, 41)]
