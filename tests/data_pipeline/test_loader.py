"""Exactly once, in one order, whatever the layout; boundaries where the documents end; no hang, no silent end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.baseline import unigram_perplexity
from data_pipeline.index import Index
from data_pipeline.loader import IGNORE, Batch, Loader, StepBatch, validation_batches
from data_pipeline.order import member_order
from samples import EOS, random_documents, write_split
from sisa_dist.config import UserError

REPEAT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_split(tmp_path_factory.mktemp("data") / "train", random_documents(1, 40))


def make(index: Index, **changes: Any) -> Loader:
    usual: dict[str, Any] = dict(seq_len=7, seed=5, global_batch_windows=4, micro_batch_size=1, lanes=3, prefetch=0)
    return Loader(index, **usual | changes)


def take(loader: Loader, steps: int, cursor: int = 0) -> list[StepBatch]:
    with loader.steps(cursor) as batches:
        return [next(batches) for _ in range(steps)]


def rows(steps: list[StepBatch]) -> list[list[int]]:
    """Every window of the steps in order: its inputs with the labels."""
    batches = [batch for step in steps for batch in step.micro_batches]
    return [[*t, *y] for batch in batches for t, y in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)]


def expected_epoch(index: Index, epoch: int, *, seq_len: int, seed: int, lanes: int) -> list[list[int]]:
    """The definition of the order in DESIGN, in lists: permuted members, windows, lanes, dealt in turn."""
    order = member_order(len(index.members), seed=seed, source="train", epoch=epoch)
    stream = [int(i) for member in order for i in index.read_member(int(member))]
    windows = []
    for start in range(0, len(stream) - 1, seq_len):
        labels = stream[start + 1 : start + seq_len + 1]
        pad = seq_len - len(labels)
        tokens = stream[start : start + seq_len]
        windows.append([*tokens, *[EOS] * (seq_len - len(tokens)), *labels, *[IGNORE] * pad])
    sizes = [len(windows) // lanes + (lane < len(windows) % lanes) for lane in range(lanes)]
    cut = [windows[sum(sizes[:lane]) : sum(sizes[: lane + 1])] for lane in range(lanes)]
    return [lane[entry] for entry in range(max(sizes)) for lane in cut if entry < len(lane)]


@REPEAT
@given(
    st.integers(1, 80), st.integers(1, 60), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9)
)
def test_two_epochs_exactly_once_at_any_layout(
    index: Index, seq_len: int, lanes: int, micro: int, dp: int, accumulate: int, seed: int
) -> None:
    batch = micro * dp * accumulate
    want = [row for epoch in range(2) for row in expected_epoch(index, epoch, seq_len=seq_len, seed=seed, lanes=lanes)]
    steps = -(-len(want) // batch)
    settings = dict(
        seq_len=seq_len, seed=seed, lanes=lanes, global_batch_windows=batch, micro_batch_size=micro, dp_size=dp
    )
    ranks = [take(make(index, dp_rank=rank, **settings), steps) for rank in range(dp)]
    found = []
    for step in range(steps):
        slots = [rows([rank[step]]) for rank in ranks]
        found += [slots[slot % dp][slot // dp] for slot in range(batch)]
        assert len({rank[step].digest for rank in ranks}) == 1
        assert {len(rank[step].micro_batches) for rank in ranks} == {accumulate}
    assert found[: len(want)] == want


def test_the_global_stream_is_the_same_at_every_dp(index: Index) -> None:
    single = take(make(index), 9)
    for dp in (2, 4):
        ranks = [take(make(index, dp_size=dp, dp_rank=rank), 9) for rank in range(dp)]
        for step, one in enumerate(single):
            assert [rank[step].digest for rank in ranks] == [one.digest] * dp
            assert sum(rank[step].num_targets for rank in ranks) == one.num_targets
            whole = rows([one])
            assert [rows([rank[step]]) for rank in ranks] == [whole[rank::dp] for rank in range(dp)]


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_resumed_cursor_goes_on_as_if_never_stopped(index: Index, prefetch: int) -> None:
    straight = take(make(index, prefetch=prefetch), 60)
    assert straight[-1].next_cursor == 240 > 2 * make(index).windows_per_epoch
    for stop in (1, 13, 40):
        resumed = take(make(index, prefetch=prefetch), 60 - stop, cursor=straight[stop - 1].next_cursor)
        assert rows(resumed) == rows(straight[stop:])
        assert [step.digest for step in resumed] == [step.digest for step in straight[stop:]]


def test_another_global_batch_reads_the_same_windows(index: Index) -> None:
    assert rows(take(make(index), 12)) == rows(take(make(index, global_batch_windows=6), 8))


def test_digest_and_fingerprint_see_what_changes_the_order(index: Index, tmp_path: Path) -> None:
    other = write_split(tmp_path / "other", random_documents(2, 40))
    loaders = [
        make(index),
        make(index, seed=6),
        make(index, lanes=4),
        make(index, seq_len=8),
        make(index, document_mask=True),
        make(other),
    ]
    assert len({loader.fingerprint for loader in loaders}) == len(loaders)
    assert len({take(loader, 1)[0].digest for loader in loaders}) == len(loaders)
    same = [make(index, dp_size=2), make(index, prefetch=9), make(index, global_batch_windows=8)]
    assert {loader.fingerprint for loader in same} == {loaders[0].fingerprint}


def test_batches_that_cannot_be_dealt_name_the_nearest(index: Index) -> None:
    with pytest.raises(UserError, match="set it to 84 or 126"):
        make(index, global_batch_windows=16, dp_size=3, micro_batch_size=2)
    with pytest.raises(UserError, match="set it to 56"):
        make(index, global_batch_windows=4, dp_size=4, micro_batch_size=2)


def test_too_few_tokens_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 1 tokens"):
        make(write_split(tmp_path / "train", [[]]))


# --- documents


WHOLE = 20  # a seq_len that divides the 700 targets, so that no window is padded


def check_documents(batches: list[Batch]) -> None:
    """doc_ids rise by one after every eos; the label that crosses is ignored, and no other."""
    crossings = 0
    for batch in batches:
        assert batch.doc_ids is not None
        for tokens, labels, ids in zip(batch.tokens, batch.labels, batch.doc_ids, strict=True):
            assert ids[0] == 0 and set(torch.diff(ids).tolist()) <= {0, 1}
            for t in range(len(tokens) - 1):
                if tokens[t] == EOS:
                    assert ids[t + 1] == ids[t] + 1, "a document goes on after its eos"
                crosses = bool(ids[t + 1] != ids[t])
                crossings += crosses
                assert labels[t] == (IGNORE if crosses else tokens[t + 1]), "a wrong label at a boundary"
    assert crossings > 20


def masked(index: Index) -> list[Batch]:
    assert (index.num_tokens - 1) % WHOLE == 0
    loader = make(index, document_mask=True, seq_len=WHOLE, global_batch_windows=5)
    steps = take(loader, loader.windows_per_epoch // 5)
    return [batch for step in steps for batch in step.micro_batches]


def test_documents_end_where_the_eos_is(index: Index) -> None:
    check_documents(masked(index))
    check_documents(list(validation_batches(index, seq_len=WHOLE, batch_size=3, document_mask=True)))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_boundary_shifted_by_one_is_seen(index: Index, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    true_segments = Index.segments

    def shifted(self: Index, member: int) -> np.ndarray:
        found = true_segments(self, member).copy()
        if len(found) > 1:
            found[0] += shift
            found[-1] -= shift
        return found

    monkeypatch.setattr(Index, "segments", shifted)
    with pytest.raises(AssertionError):
        check_documents(masked(index))


def test_a_document_over_several_members_is_one_only_in_stored_order(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", [[5] * 34, [6] * 4])  # members of 10: the first document fills 3.5
    (batch,) = validation_batches(index, seq_len=39, batch_size=1, document_mask=True)
    assert batch.doc_ids is not None and batch.doc_ids[0].tolist() == [0] * 35 + [1] * 4
    assert batch.labels[0].tolist() == [5] * 33 + [EOS, IGNORE] + [6] * 3 + [EOS]
    seed = next(s for s in range(99) if member_order(4, seed=s, source="train", epoch=0).tolist() == [2, 1, 0, 3])
    (step,) = take(make(index, seq_len=39, seed=seed, global_batch_windows=1, document_mask=True), 1)
    doc_ids = step.micro_batches[0].doc_ids
    assert doc_ids is not None and doc_ids[0].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5 + [4] * 4


def test_only_the_last_window_is_padded_with_a_document_of_its_own(index: Index) -> None:
    loader = make(index, seq_len=9, lanes=1, global_batch_windows=1, document_mask=True)
    *full, last = [step.micro_batches[0] for step in take(loader, loader.windows_per_epoch)]
    real = (index.num_tokens - 1) % 9 + 1  # tokens of the last window
    assert 1 < real < 9 and last.doc_ids is not None
    assert last.tokens[0, real:].tolist() == [EOS] * (9 - real)
    assert last.labels[0, real - 1 :].tolist() == [IGNORE] * (10 - real)
    assert set(last.doc_ids[0, real:].tolist()) == {int(last.doc_ids[0, real - 1]) + 1}
    plain = take(make(index, seq_len=9, global_batch_windows=1), loader.windows_per_epoch)
    assert sum((step.micro_batches[0].labels == IGNORE).any().item() for step in plain) == 1
    assert len(full) == (index.num_tokens - 1) // 9


def test_dtypes_and_no_document_ids_unless_asked(index: Index) -> None:
    batch = take(make(index), 1)[0].micro_batches[0]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64 and batch.doc_ids is None
    (masked_batch, *_) = masked(index)
    assert masked_batch.doc_ids is not None and masked_batch.doc_ids.dtype == torch.int64


# --- validation


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("windows", [None, 1, 7])
def test_validation_is_dealt_once_and_evenly(index: Index, dp: int, windows: int | None) -> None:
    def labels(batches: list[Batch]) -> list[list[int]]:
        return [row for batch in batches for row in batch.labels.tolist() if set(row) != {IGNORE}]

    common: dict[str, Any] = dict(seq_len=7, batch_size=2, max_windows=windows)
    whole = labels(list(validation_batches(index, **common)))
    ranks = [list(validation_batches(index, dp_rank=rank, dp_size=dp, **common)) for rank in range(dp)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(batch.tokens.shape == batch.labels.shape for rank in ranks for batch in rank)
    assert sorted(row for rank in ranks for row in labels(rank)) == sorted(whole)
    targets = [i for row in whole for i in row if i != IGNORE]
    stream = [int(i) for member in range(len(index.members)) for i in index.read_member(member)]
    assert targets == stream[1:] if windows is None else targets == stream[1 : 7 * windows + 1]


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("windows", [None, 3])
def test_unigram_baseline_counts_the_loader_s_targets(
    index: Index, tmp_path: Path, document_mask: bool, windows: int | None
) -> None:
    held_out = write_split(tmp_path / "validation", random_documents(3, 9))
    train_ids = [int(i) for member in range(len(index.members)) for i in index.read_member(member)]
    probability = (np.bincount(train_ids, minlength=97) + 1) / (len(train_ids) + 97)
    batches = validation_batches(held_out, seq_len=7, batch_size=2, max_windows=windows, document_mask=document_mask)
    targets = torch.cat([batch.labels.flatten() for batch in batches]).numpy()
    want = np.exp(-np.log(probability[targets[targets != IGNORE]]).mean())
    found = unigram_perplexity(
        index, held_out, max_tokens=None if windows is None else windows * 7, document_mask=document_mask
    )
    assert found == pytest.approx(want, rel=1e-12)


# --- the reading thread


def test_damage_met_by_the_thread_surfaces_in_next_and_stays(tmp_path: Path) -> None:
    index = write_split(tmp_path / "train", random_documents(4, 40))
    shard = tmp_path / "train" / "000002.tar"
    content = bytearray(shard.read_bytes())
    content[1536] ^= 1
    shard.write_bytes(content)
    with make(index, prefetch=3).steps(0) as batches:
        for _ in range(2):
            with pytest.raises(UserError, match=r"000002.tar: member 6 is not what was written"):
                for _ in range(2 * make(index).windows_per_epoch):
                    next(batches)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize("leave", ["at once", "after a step", "by an error"])
def test_the_thread_ends_with_the_block(index: Index, leave: str) -> None:
    def run() -> None:
        with make(index, prefetch=2).steps(0) as batches:
            if leave != "at once":
                next(batches)
                time.sleep(0.05)  # the queue fills and the thread blocks
            if leave == "by an error":
                raise KeyError

    before = time.monotonic()
    if leave == "by an error":
        with pytest.raises(KeyError):
            run()
    else:
        run()
    assert threads() == [] and time.monotonic() - before < 2


def test_reading_ahead_is_bounded(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    true: Callable[..., Any] = Loader._step
    monkeypatch.setattr(Loader, "_step", lambda self, cursor: made.append(cursor) or true(self, cursor))
    with make(index, prefetch=3).steps(0) as batches:
        next(batches)
        time.sleep(0.3)
        assert 1 < len(made) <= 1 + 3 + 1  # served, waiting, and the one the thread holds


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("raise RuntimeError('stop')", 1), ("stream.__enter__(); next(stream)", 0)]
)
def test_the_interpreter_leaves_without_a_hang(index: Index, end: str, code: int) -> None:
    """Also where the block is never left: the thread is then cut off with the process."""
    script = f"""
        import sys
        from data_pipeline.index import Index
        from data_pipeline.loader import Loader
        loader = Loader(Index.load({index.folder!r}), seq_len=7, seed=0, global_batch_windows=4, micro_batch_size=1)
        stream = loader.steps(0)
        if {end.startswith("stream")}:
            {end}
        else:
            with stream:
                next(stream)
                {end}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
