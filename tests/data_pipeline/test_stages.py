"""Exactly once an epoch, whatever the stages: sequence length, packing, lanes and mixture changed in mid-epoch."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import packing
from data_pipeline.index import Index
from data_pipeline.lines import Run
from data_pipeline.loader import Loader, StepBatch
from data_pipeline.stage import Stage
from samples import random_documents, write_split
from sisa_dist.config import UserError

SLOW = settings(max_examples=60, deadline=None)
Token = tuple[int, int]  # member, place in it


class Indexes(dict[str, Index]):
    def __repr__(self) -> str:  # short, in what hypothesis prints
        return ", ".join(self)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    folder = tmp_path_factory.mktemp("data")
    sizes = {"web": (1, 30), "code": (2, 9), "books": (3, 4)}
    return Indexes(
        (name, write_split(folder / name, random_documents(seed, number), member_tokens=10 + seed))
        for name, (seed, number) in sizes.items()
    )


@pytest.fixture(autouse=True, scope="module")
def small_groups() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", 60)
        patch.setattr(packing, "_GROUP_BINS", 1)
        yield


def tokens(run: Run) -> list[Token]:
    return [(member, place) for member, start, stop in run.ranges for place in range(start, stop)]


class Reader:
    """Walks through stages and keeps what each epoch of each source had as inputs and labels."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, int], Counter[Token]] = defaultdict(Counter)
        self.labels: dict[tuple[str, int], Counter[Token]] = defaultdict(Counter)

    def read(self, stage: Stage, windows: range) -> None:
        for number in windows:
            place = stage.place(number)
            source = stage.sources[place.source]
            runs = source.runs(place)
            assert 0 < sum(run.inputs for run in runs) == source.fill(place) <= stage.seq_len
            for run in runs:
                found = tokens(run)
                assert len(found) == run.inputs + run.tail
                self.inputs[place.source, place.epoch].update(found[: run.inputs])
                self.labels[place.source, place.epoch].update(found[1:])

    def check(self, name: str, index: Index, epochs: int, *, packed: bool) -> None:
        """`epochs` are complete: each token was read, as an input or a label, and neither twice."""
        everything = {(member, place) for member, size in enumerate(index.tokens) for place in range(size)}
        for epoch in range(epochs):
            inputs, labels = self.inputs[name, epoch], self.labels[name, epoch]
            assert set(inputs.values()) == set(labels.values()) == {1}
            missing = everything - labels.keys()
            starts = document_starts(index) | {(member, 0) for member in range(len(index.members))}
            if packed:  # what opens a document, or a part of one, is predicted by nothing
                assert missing <= starts
                # A stream's last token is no input. Where bins follow and it is a document of its own, it is no label.
                assert len(everything - inputs.keys() - labels.keys()) <= 1
            else:
                assert len(missing) == 1 and inputs.keys() | labels.keys() == everything


def document_starts(index: Index) -> set[Token]:
    found = set()
    for member in range(len(index.members)):
        parts = index.segments(member).tolist()
        starts = list(itertools.accumulate([0, *parts[:-1]]))
        found |= {(member, start) for start in starts[int(index.members["continued"][member]) :]}
    return found


ORDERS = st.fixed_dictionaries(
    {
        "seq_len": st.integers(1, 40),
        "lanes": st.integers(1, 9),
        "seed": st.integers(0, 2),
        "packing": st.sampled_from(["concat", "best_fit"]),
    }
)


def following(stage: Stage, cursor: int, indexes: dict[str, Index], order: dict[str, Any], **more: Any) -> Stage:
    """As a resume does it, through JSON."""
    after = Stage(indexes, document_mask=False, **order, **more)
    described, begun = (json.loads(json.dumps(part)) for part in (stage.describe(), stage.begun))
    begun = json.loads(json.dumps(after.carry(described, begun, cursor)))
    return Stage(indexes, document_mask=False, **order, **more, begun=begun)


@SLOW
@given(st.lists(st.tuples(ORDERS, st.floats(0, 2.5)), min_size=2, max_size=5), st.sampled_from(["any", "concat"]))
def test_one_source_through_stages_is_read_once_an_epoch(
    indexes: dict[str, Index], stages: list[tuple[dict[str, Any], float]], kind: str
) -> None:
    one = {"web": indexes["web"]}
    reader, stage, cursor = Reader(), None, 0
    for order, length in stages:
        if kind == "concat":
            order = order | {"packing": "concat"}
        if stage is None:
            stage = Stage(one, document_mask=False, **order)
        else:
            before, stage = stage, following(stage, cursor, one, order)
            if kind == "concat":  # the same share of the epoch is behind the run, to a window of each
                near = 1 / before.sources["web"].windows + 1 / stage.sources["web"].windows
                assert stage.epochs(0)["web"] == pytest.approx(before.epochs(cursor)["web"], abs=near)
        cursor = int(length * stage.sources["web"].windows)
        reader.read(stage, range(cursor))
    assert stage is not None
    finish = stage.sources["web"].rest_windows + stage.sources["web"].windows
    reader.read(stage, range(cursor, finish))
    whole = int(stage.epochs(max(finish, cursor))["web"])
    reader.check("web", one["web"], whole, packed=any(order["packing"] == "best_fit" for order, _ in stages))


def test_the_rest_of_a_stage_is_at_most_one_interval_a_lane(indexes: dict[str, Index]) -> None:
    one = {"web": indexes["web"]}
    for lanes in (1, 3, 8):
        stage = Stage(one, document_mask=False, seq_len=5, lanes=lanes, seed=0, packing="concat")
        for cursor in range(stage.sources["web"].windows + 1):
            after = Stage(one, document_mask=False, seq_len=9, lanes=2, seed=0, packing="concat")
            begun = after.carry(stage.describe(), None, cursor)
            rest = begun["sources"]["web"]["rest"]
            left = sum(b - a for a, b in rest["cut"]["intervals"]) if rest else 0
            assert rest is None or len(rest["cut"]["intervals"]) <= lanes
            if 0 < cursor < stage.sources["web"].windows:
                whole = stage.sources["web"].windows * 5 - (-(one["web"].num_tokens - 1) % 5)
                assert whole - 5 * cursor <= left <= whole - 5 * (cursor - 1)


@SLOW
@given(
    st.lists(
        st.tuples(ORDERS, st.tuples(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1)), st.integers(0, 120)),
        min_size=2,
        max_size=4,
    ),
    st.booleans(),
)
def test_mixtures_through_stages_are_read_once_an_epoch_of_each_source(
    indexes: dict[str, Index],
    stages: list[tuple[dict[str, Any], tuple[float, float, float], int]],
    alone_first: bool,
) -> None:
    """Sources join (from nothing, or from a run of one source) and rest (share 0); each is read once an epoch."""
    reader, cursor = Reader(), 0
    stage: Stage | None = None
    for order, weights, length in stages:
        shares = {name: round(weight, 2) for name, weight in zip(indexes, weights, strict=True)}
        if stage is None and alone_first:
            stage = Stage({"web": indexes["web"]}, document_mask=False, **order)
        elif stage is None:
            stage = Stage(indexes, document_mask=False, **order, shares=shares)
        else:
            stage = following(stage, cursor, indexes, order, shares=shares)
        cursor = length
        reader.read(stage, range(cursor))
    assert stage is not None
    counts = stage.counts(cursor)
    for name, source in stage.sources.items():
        epochs = int(source.epochs(counts[name]) + 1e-9)
        reader.check(name, indexes[name], epochs, packed=True)


def take(loader: Loader, cursor: int, steps: int) -> list[StepBatch]:
    with loader.steps(cursor) as stream:
        return [next(stream) for _ in range(steps)]


@SLOW
@given(
    ORDERS,
    st.sampled_from([None, (1, 1, 1), (5, 2, 0.5)]),
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3), st.integers(0, 4), st.integers(1, 4)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 200),
)
def test_the_same_step_at_any_dp_and_number_of_threads(
    indexes: dict[str, Index],
    order: dict[str, Any],
    weights: tuple[float, ...] | None,
    mask: bool,
    schedule: list[tuple[int, int, int, int]],
    start: int,
) -> None:
    """dp, prefetch and threads change at every resume: the rows of each step, and its digest, are those of one rank."""
    shares = None if weights is None else dict(zip(indexes, weights, strict=True))
    data: Any = indexes["web"] if shares is None else indexes
    common: dict[str, Any] = dict(global_batch_windows=24, document_mask=mask, shares=shares, **order)
    straight = take(
        Loader(data, micro_batch_size=24, prefetch=0, **common), start, sum(steps for _, steps, *_ in schedule)
    )
    cursor, number = start, 0
    for dp, steps, prefetch, threads in schedule:
        ahead: dict[str, Any] = dict(micro_batch_size=2, dp_size=dp, prefetch=prefetch, read_threads=threads)
        ranks = [take(Loader(data, dp_rank=rank, **ahead, **common), cursor, steps) for rank in range(dp)]
        for step in range(steps):
            (whole,) = straight[number].micro_batches
            for rank, parts in enumerate(ranks):
                part = parts[step]
                assert part.digest == straight[number].digest and part.padding == straight[number].padding
                for name in ("tokens", "labels", "doc_ids"):
                    found = [getattr(batch, name) for batch in part.micro_batches]
                    want = getattr(whole, name)
                    if want is None:
                        assert found == [None] * len(found)
                    else:
                        assert [row for batch in found for row in batch.tolist()] == want[rank::dp].tolist()
            number += 1
        cursor = ranks[0][-1].next_cursor
    assert cursor == straight[-1].next_cursor


def test_a_later_stage_of_the_same_order_has_other_digests(indexes: dict[str, Index]) -> None:
    loader = Loader(indexes["web"], seq_len=5, seed=0, global_batch_windows=2, micro_batch_size=1, prefetch=0)
    first = take(loader, 0, 1)[0].digest
    before = Stage({"train": indexes["web"]}, document_mask=False, seq_len=6, lanes=8, seed=0, packing="concat")
    loader.begin(loader.stage.carry(before.describe(), None, 7))
    assert take(loader, 0, 1)[0].digest != first


def test_what_cannot_be_continued_is_named(indexes: dict[str, Index], tmp_path: Path) -> None:
    common: dict[str, Any] = dict(document_mask=False, seq_len=5, lanes=2, seed=0, packing="concat")
    both = Stage({name: indexes[name] for name in ("web", "code")}, **common, shares={"web": 1, "code": 1})
    one = Stage({"train": indexes["web"]}, **common)
    with pytest.raises(UserError, match=r"its source code is none of the data here \(train\): .* with weight 0"):
        one.carry(both.describe(), None, 9)
    other = Stage({"train": write_split(tmp_path / "train", random_documents(9, 5))}, **common)
    with pytest.raises(UserError, match="its source train holds other data here, made anew since or of another folder"):
        other.carry(one.describe(), None, 9)
    older = one.describe()
    older["order"] = older["order"] | {"version": 0}
    with pytest.raises(UserError, match="data order is version 0"):
        one.carry(older, None, 9)


def test_a_source_keeps_its_place_under_another_name(indexes: dict[str, Index]) -> None:
    common: dict[str, Any] = dict(document_mask=False, seq_len=5, lanes=2, seed=0, packing="concat")
    alone = Stage({"train": indexes["web"]}, **common)
    mixed = Stage(indexes, **common, shares={"web": 1, "code": 1, "books": 1})
    begun = mixed.carry(alone.describe(), None, 11)
    assert begun["number"] == 1 and begun["sources"].keys() == {"web"}
    rest = begun["sources"]["web"]["rest"]
    assert rest["name"] == "train" and rest["epoch"] == 0
    windows = alone.sources["train"].windows
    after = Stage(indexes, **common, shares={"web": 1, "code": 1, "books": 1}, begun=begun)
    assert after.epochs(0) == {"web": pytest.approx(11 / windows), "code": 0.0, "books": 0.0}
