"""Documents whole wherever they fit, bins well filled, everything read once, labels only inside a document."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import bin_counts, packing
from data_pipeline.index import Index
from data_pipeline.loader import IGNORE, Loader
from data_pipeline.packing import Bins, Documents, best_fit
from samples import EOS, random_documents, write_split

QUICK = settings(max_examples=40, deadline=None)
DOCUMENTS = st.lists(st.integers(0, 60), min_size=1, max_size=40)
FOLDERS = itertools.count()


def numbered(lengths: list[int], folder: Path, member_tokens: int) -> tuple[Index, list[list[int]]]:
    """Documents of ids that stand nowhere else, and the eos."""
    ids = itertools.count(3)
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    return write_split(folder / str(next(FOLDERS)), documents, member_tokens=member_tokens, vocab=60_000), documents


@QUICK
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_best_fit_is_best_fit_decreasing(lengths: list[int], size: int) -> None:
    """Against the definition: the longest first, each into the fullest bin that has room."""
    bins, count = best_fit(np.array(lengths, dtype=np.int64), size)
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(fill, -i) for i, fill in enumerate(fills) if fill + length <= size]
        if rooms:
            fills[-max(rooms)[1]] += length
        else:
            fills.append(length)
    found = np.bincount(bins, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert count == len(fills) and sorted(found.tolist()) == sorted(fills)


@QUICK
@given(DOCUMENTS, st.integers(1, 40), st.integers(1, 25), st.integers(1, 60), st.integers(0, 3))
def test_an_epoch_of_bins_reads_every_document_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    member_tokens: int,
    group: int,
    seed: int,
) -> None:
    index, documents = numbered(lengths, tmp_path_factory.getbasetemp(), member_tokens)
    if index.num_tokens < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", group)
        patch.setattr(packing, "_GROUP_BINS", 1)
        loader = Loader(
            index, seq_len=seq_len, seed=seed, global_batch_windows=1, micro_batch_size=1, packing="best_fit",
            document_mask=True, prefetch=0, lanes=2,
        )  # fmt: skip
        with loader.steps(0) as stream:
            steps = [next(stream) for _ in range(loader.windows_per_epoch)]
    labels: list[int] = []
    of = {token: number for number, document in enumerate(documents) for token in document}
    places: Counter[int] = Counter()
    parts = 0
    for step in steps:
        (batch,) = step.micro_batches
        assert batch.doc_ids is not None
        row = list(zip(batch.tokens[0].tolist(), batch.labels[0].tolist(), batch.doc_ids[0].tolist(), strict=True))
        labels += [label for _, label, _ in row if label != IGNORE]
        assert all(token == EOS or label in (token + 1, EOS, IGNORE) for token, label, _ in row)
        assert all(label == IGNORE for token, label, _ in row if token == EOS), "nothing follows the end of a document"
        parts += len({doc_id for *_, doc_id in row[: round((1 - step.padding) * seq_len)]})
        inside = {doc_id: {of[t] for t, _, d in row if d == doc_id and t != EOS} for *_, doc_id in row}
        assert all(len(found) <= 1 for found in inside.values()), "two documents under one doc_id"
        places.update(document for found in inside.values() for document in found)
    # Every token but a document's first is a label once, its closing eos too.
    want = [token for document in documents if document for token in [*document[1:], EOS]]
    assert sorted(labels) == sorted(want)
    assert parts == sum(max(1, -(-len(document) // seq_len)) for document in documents), "an eos alone"
    for number, document in enumerate(documents):
        if document:
            assert places[number] == -(-len(document) // seq_len), "cut, and not longer than seq_len"


def test_bins_are_fuller_than_windows_of_whole_documents_in_turn(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", random_documents(1, 2000, longest=300), member_tokens=512)
    bins = Bins(Documents(index, 512), 512)
    assert bins.padding < 0.01
    in_turn, room = 1, 512  # windows that close when the next document does not fit
    for length in (document for member in [index] for document in np.diff(Documents(member, 512)._find(0))):
        in_turn, room = (in_turn + 1, 512 - int(length)) if length > room else (in_turn, room - int(length))
    assert int(bins.counts.sum()) < 0.9 * in_turn


def test_padding_is_counted(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", [[5] * 6, [6] * 6, [7] * 2])  # 7, 7 and 3 tokens
    loader = Loader(
        index, seq_len=10, seed=0, global_batch_windows=2, micro_batch_size=1, packing="best_fit", prefetch=0
    )
    with loader.steps(0) as steps:
        step = next(steps)
    assert loader.windows_per_epoch == 2
    assert step.padding == loader.describe()["padding"]["train"] == pytest.approx(3 / 20)


def test_one_document_longer_than_a_group_of_members(tmp_path: Path) -> None:
    index, _ = numbered([4, 95, 0, 3], tmp_path, member_tokens=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GROUP_TOKENS", 14)
        documents = Documents(index, 1)
        lengths = [documents.lengths(group)[0].tolist() for group in range(documents.groups)]
    assert [found for found in lengths if found] == [[5, 96], [1, 4]]
    assert len(lengths) == 8 and lengths[0] == [5, 96]


def test_what_was_planned_is_kept_and_damage_is_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_split(tmp_path / "train", random_documents(1, 300), member_tokens=16)
    monkeypatch.setattr(packing, "_GROUP_TOKENS", 40)
    monkeypatch.setattr(packing, "_GROUP_BINS", 1)
    made: list[int] = []
    true = packing.best_fit
    monkeypatch.setattr(packing, "best_fit", lambda lengths, size: made.append(size) or true(lengths, size))

    def plan(seq_len: int) -> tuple[list[int], bool]:
        """(bins of each group, whether they were planned now)."""
        made.clear()
        bins = Bins(Documents(Index.load(index.folder), seq_len), seq_len)
        return [*bins.counts.tolist(), *bins.slots.tolist()], bool(made)

    small = plan(20)
    assert plan(20) == small == (small[0], True), "not worth a file"
    monkeypatch.setattr(bin_counts, "_WORTH_KEEPING", 1)
    assert plan(20) == small and plan(20) == (small[0], False)
    assert plan(30)[1] and not plan(30)[1] and plan(20) == (small[0], False)
    (kept,) = Path(index.folder).glob("best_fit_20_*.counts")
    content = bytearray(kept.read_bytes())
    content[40] ^= 1
    kept.write_bytes(content)
    assert plan(20) == small and plan(20) == (small[0], False)
    kept.write_bytes(content[:-8])
    assert plan(20) == small
    assert not list(Path(index.folder).glob("*.tmp"))
