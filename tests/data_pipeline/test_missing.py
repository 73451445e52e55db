"""A shard that is not there stops a loader, or counts for nothing in it; order, digests and the rest stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.fetch import Missing
from data_pipeline.index import Index
from data_pipeline.loader import IGNORE, Loader, StepBatch
from range_server import serve
from samples import EOS, random_documents, write_split
from sisa_dist.config import UserError

GONE = "000001.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_split(root / "train", random_documents(3, 60))
    return root


@pytest.fixture
def holed(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "holed"
    shutil.copytree(whole, folder)
    (folder / "train" / GONE).unlink()
    return folder


def loader(index: Index, **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(seq_len=7, seed=5, global_batch_windows=4, micro_batch_size=1, lanes=3, prefetch=2)
    return Loader(index, **settings | {"on_missing": "skip"} | changes)


def steps(of: Loader, number: int) -> list[StepBatch]:
    with of.steps(0) as stream:
        return [next(stream) for _ in range(number)]


def touched(of: Loader, cursor: int) -> list[list[bool]]:
    """By slot of the step and run in it: whether a part of it lies in GONE."""
    index = of.stage.sources["train"].index
    return [
        [any(index.shard_name(r.member) == GONE for r in run.ranges) for run in of.stage.sources["train"].runs(place)]
        for place in of.window_ids(cursor)
    ]


def test_it_stops_with_the_name_and_says_the_way_out(holed: Path) -> None:
    with pytest.raises(Missing, match=rf"{GONE}: the shard is missing"):
        Index.load(holed / "train")
    index = Index.load(holed / "train", absent_ok=True)
    with pytest.raises(Missing, match=rf"{GONE}: the shard is missing.*data\.on_missing=skip") as caught:
        steps(loader(index, on_missing="stop"), 40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_touches_it_counts_for_nothing_and_the_rest_is_as_it_was(
    whole: Path, holed: Path, remote: bool, document_mask: bool, packing: str
) -> None:
    same = dict(document_mask=document_mask, packing=packing)
    plain = loader(Index.load(whole / "train"), **same)
    number = 2 * plain.windows_per_epoch // 4
    expected = steps(plain, number)
    with serve(holed) as served:
        place = f"{served.url}/train" if remote else holed / "train"
        of = loader(Index.load(place, absent_ok=True), **same)
        of.without = frozenset({f"train/{GONE}"})
        found = steps(of, number)
        assert not any(GONE in path for path in served.requests), "known, and not asked for"
    masked = 0
    for step, (there, here) in enumerate(zip(expected, found, strict=True)):
        hits = touched(plain, 4 * step)
        assert here.digest == there.digest and here.next_cursor == there.next_cursor and here.padding == there.padding
        assert here.missing_windows == sum(any(runs) for runs in hits) and not here.found_missing
        for row, runs in enumerate(hits):
            a, b = there.micro_batches[row], here.micro_batches[row]
            assert (a.doc_ids is None) == (b.doc_ids is None)
            assert a.doc_ids is None or b.doc_ids is None or torch.equal(a.doc_ids, b.doc_ids)
            gone = torch.zeros(7, dtype=torch.bool)
            position = 0
            for run, hit in zip(plain.stage.sources["train"].runs(plain.window_ids(4 * step)[row]), runs, strict=True):
                gone[position : position + run.inputs] = hit
                position += run.inputs
            assert torch.equal(b.labels[0], a.labels[0].masked_fill(gone, IGNORE))
            filled = gone.clone()
            assert torch.equal(b.tokens[0][~filled], a.tokens[0][~filled]) or position < 7
            assert (b.tokens[0][gone] == EOS).all()
            masked += int(gone.sum())
    assert masked > 20


def test_what_is_found_on_the_way_is_told_and_read_again(holed: Path) -> None:
    of = loader(Index.load(holed / "train", absent_ok=True))
    found = steps(of, 30)
    first = next(batch for batch in found if batch.found_missing)
    assert first.found_missing == {f"train/{GONE}"} and first.missing_windows == 0
    of.without = first.found_missing
    again = of.again(first)
    assert again.without == of.without and not again.found_missing and again.missing_windows >= 1
    assert of.again(again) is again
    for a, b in zip(first.micro_batches, again.micro_batches, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)


def test_every_data_rank_says_the_same_of_the_whole_batch(holed: Path) -> None:
    index = Index.load(holed / "train", absent_ok=True)
    counts = []
    for rank in range(2):
        of = loader(index, dp_rank=rank, dp_size=2)
        of.without = frozenset({f"train/{GONE}"})
        counts.append([batch.missing_windows for batch in steps(of, 30)])
    assert counts[0] == counts[1] and sum(counts[0]) > 4


def test_damage_a_refusal_and_a_folder_that_is_gone_stop_all_the_same(whole: Path, holed: Path) -> None:
    index = Index.load(holed / "train", absent_ok=True)
    (holed / "train" / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: gone as well"):
        steps(loader(index), 30)
    shutil.copy(whole / "train" / GONE, holed / "train" / GONE)
    content = bytearray((holed / "train" / GONE).read_bytes())
    content[int(index.members[4]["offset"])] ^= 1
    (holed / "train" / GONE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{GONE}: member 4 is not what was written"):
        steps(loader(index), 30)
    with serve(whole) as served:
        remote = Index.load(f"{served.url}/train")
        served.fault = lambda path, number: 403 if path.endswith(GONE) else None
        with pytest.raises(UserError, match=rf"{GONE}: .*no right to read it"):
            steps(loader(remote), 30)
        served.fault = lambda path, number: 404 if GONE in path or "index" in path else None
        with pytest.raises(UserError, match=r"index\.json: gone as well"):
            steps(loader(remote), 30)
