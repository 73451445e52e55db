"""Passes keep the same documents on any number of workers, in order, and every removal is counted with its reason."""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.passes import Counts, Decider, base, build_passes, evaluation_files, examine, run_passes, runner
from data_pipeline.passes.table import Table
from data_pipeline.sources import Document
from samples import make_text
from sisa_dist.config import RunConfig, UserError
from sisa_dist.config.passes import PassesConfig

ALL: dict[str, Any] = {
    "length": {"min_characters": 20, "max_characters": 5_000},
    "quality": {"min_words": 5, "min_stop_words": 0, "min_alphabetic_words": 0.1, "max_hashes_per_word": 0.5},
    "repetition": {},
    "exact_dedup": {},
    "near_dedup": {},
}


def corpus() -> list[Document]:
    """Texts, short and long ones, loops, copies (also in another case and spacing) and near copies of them."""
    rng = random.Random(1)
    texts = [make_text(i) for i in range(60)]
    texts += ["tiny", "again and again " * 200, "x" * 6_000]
    texts += [rng.choice(texts[:60]) for _ in range(20)]
    texts += [rng.choice(texts[:60]).upper().replace(" ", "  ") for _ in range(10)]
    texts += [rng.choice(texts[:60]) + " one word more" for _ in range(10)]
    rng.shuffle(texts)
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def run(passes: dict[str, Any], documents: list[Document], **options: Any) -> tuple[list[str], Counts]:
    counts = Counts()
    made = build_passes(PassesConfig.model_validate(passes))
    return [d.id for d in run_passes(documents, made, counts=counts, **options)], counts


def test_any_number_of_workers_keeps_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_BATCH_CHARACTERS", 10_000)  # so that there are many batches
    documents = corpus()
    kept, counts = run(ALL, documents)
    assert kept == sorted(kept, key=lambda name: int(name[1:])) and 40 < len(kept) < 65
    assert run(ALL, documents, workers=2) == (kept, counts)


def test_every_document_is_kept_or_counted() -> None:
    documents = corpus()
    kept, counts = run(ALL, documents)
    assert counts.documents == len(documents) == len(kept) + counts.removed_documents
    assert counts.characters == sum(len(d.text) for d in documents)
    gone = [d for d in documents if d.id not in kept]
    assert sum(c for reasons in counts.removed.values() for _, c in reasons.values()) == sum(len(d.text) for d in gone)
    assert counts.removed["length"] == {"fewer than 20 characters": (1, 4), "more than 5000 characters": (1, 6_000)}
    assert counts.removed["exact_dedup"].keys() == {"a copy of an earlier document"}
    assert counts.removed["near_dedup"].keys() == {"much like an earlier document"}
    assert list(counts.removed) == list(ALL)
    told = "\n".join(counts.lines())
    assert f"passes: {len(kept):,} kept of 103 documents" in told and "length: 1 documents, 4 characters: fewer" in told
    assert "quality: nothing removed" in told
    assert counts.as_dict()["removed"]["length"]["fewer than 20 characters"] == {"documents": 1, "characters": 4}


def test_the_first_copy_stays_and_only_kept_ones_count_as_earlier() -> None:
    """A copy of a document that an earlier pass removed is not a copy of anything."""
    long, short = "word " * 30, "word " * 30 + "  "
    documents = [Document("a", short), Document("b", long), Document("c", long)]
    assert run({"exact_dedup": {}}, documents)[0] == ["a"]
    assert run({"length": {"max_characters": 150}, "exact_dedup": {}}, documents)[0] == ["b"]


def test_nothing_is_asked_nothing_is_done() -> None:
    assert build_passes(PassesConfig()) == []
    documents = corpus()
    assert list(run_passes(documents, [])) == documents


def test_a_pass_and_its_verdict_can_be_sent_to_a_worker() -> None:
    passes = build_passes(PassesConfig.model_validate(ALL))
    again = pickle.loads(pickle.dumps(passes))
    for document in corpus()[:20]:
        verdict = examine(document, passes)
        assert pickle.loads(pickle.dumps(examine(document, again))) == verdict


def test_an_unread_iterator_reads_no_more_than_its_workers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_BATCH_CHARACTERS", 100)
    read = 0

    def documents() -> Any:
        nonlocal read
        for i in range(1_000):
            read += 1
            yield Document(str(i), "x" * 100)

    passes = build_passes(PassesConfig.model_validate({"length": {}}))
    made = run_passes(documents(), passes, workers=1)
    assert next(made).id == "0" and read == runner._BATCHES_A_WORKER
    made.close()


@pytest.mark.parametrize(
    ("section", "values", "what"),
    [
        ("length", {"min_characters": 5, "max_characters": 4}, "below min_characters"),
        ("decontaminate", {"min_ngram": 14}, "above ngram"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    make_config: Callable[..., RunConfig], section: str, values: dict[str, int], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        make_config("x", passes={section: values})


def test_decontamination_is_against_lambada_by_default(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("x", passes={"decontaminate": {}})
    with pytest.raises(UserError, match=r"evaluation\.lambada"):
        evaluation_files(config)
    with_lambada = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"lambada": "lambada.jsonl"})}
    )
    assert evaluation_files(with_lambada) == ["lambada.jsonl"]
    assert evaluation_files(make_config("x", passes={"decontaminate": {"against": ["a", "b"]}})) == ["a", "b"]
    assert evaluation_files(make_config("x")) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 10**9)), max_size=300), st.sampled_from([0, 2**10, 2**30]))
def test_a_table_is_a_dict_of_lists(entries: list[tuple[int, int]], memory_bytes: int) -> None:
    check_table(entries, memory_bytes)


def check_table(entries: list[tuple[int, int]], memory_bytes: int) -> None:
    truth: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table"
        table = Table(memory_bytes=memory_bytes, file=file, slots=4)
        for small, value in entries:
            # Many keys of one home slot, and runs that go over the end.
            key = (small % 7) + (small << 59)
            truth.setdefault(key, []).append(value)
            table.add(key, value)
        assert {key: table.find(key) for key in truth} == truth
        assert table.find(5 << 50) == [] and table.entries == len(entries)
        assert file.exists() == (16 * (table._mask + 1) > memory_bytes)
        table.close()


def _never_grows_in_order(table: Table) -> None:
    old, cells, slots = table._map, table._cells, table._mask + 1
    table._allocate(2 * slots)
    for slot in range(slots):  # from slot 0, which may lie in the middle of a run
        if held := cells[2 * slot + 1]:
            table._put(cells[2 * slot], held)
    cells.release()
    old.close()


def _ignores_earlier_passes(decider: Decider, verdict: base.Verdict) -> bool:
    """Asks every decision, also of a document that is gone already."""
    keep = verdict.drop is None
    for decision, signature in zip(decider._decisions, verdict.signatures, strict=False):
        if decision is not None and decision(signature) is not None:
            keep = False
    return keep


def test_mutations_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Table, "_grow", _never_grows_in_order)
        entries = [(small, i) for i, small in enumerate([3, 3, 10, 3, 24, 3])]
        with pytest.raises(AssertionError):
            check_table(entries, 2**30)
    with monkeypatch.context() as patch:
        patch.setattr(Decider, "keep", _ignores_earlier_passes)
        with pytest.raises(AssertionError):
            test_every_document_is_kept_or_counted()
    with monkeypatch.context() as patch:  # workers' batches come back in another order
        patch.setattr(runner, "_next", lambda waiting: _last(waiting))
        with pytest.raises(AssertionError):
            test_any_number_of_workers_keeps_the_same(patch)


def _last(waiting: Any) -> Any:
    batch, future = waiting.pop()
    yield from zip(batch, future.result(), strict=True)
