"""A checkpoint goes on anywhere: any engine, any number of ranks, any split gives the steps the run itself went on to.

The fast suite walks: one run that is moved every three steps, through every engine at half of the splits and every
split, each place held against the one before, which went on too. The slow one walks through all of them so that every
two values follow each other, and takes the full product of places.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from distributed.comparing import BF16_LOSS, BF16_NORM, FP32, red
from distributed.moving import AFTER, BEFORE, WHOLE, WINDOWS, Place, Track, moves, refuses, stays, trains
from distributed.pool import run_job
from runs import QUICKSTART, tensors
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.config import RunConfig, load_config

ENGINES = ("fsdp2", "zero0", "zero1", "zero2", "zero3")
SPLITS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # ranks, tp
PLACES = [
    Place(engine, ranks, tp, sp)
    for engine, (ranks, tp), sp in itertools.product(ENGINES, SPLITS, (False, True))
    if tp > 1 or not sp
]
# Where there is tp, every engine with and without sequence parallelism, which stores nothing otherwise, but not each.
VISITED = [
    place
    for place in PLACES
    if place.tp == 1 or place.sp == bool((ENGINES.index(place.engine) + SPLITS.index((place.ranks, place.tp))) // 2 % 2)
]
HSDP = Place("fsdp2", 4, replicate=2)
AXES = ("engine", "ranks", "tp", "sp")
# Where a run comes back to where it was saved: to the bit. One place of each engine.
LOOPED = [("fsdp2", 4, 2), ("zero0", 2, 1), ("zero1", 2, 2), ("zero2", 2, 1), ("zero3", 4, 2)]
LOOPS = [place for place in VISITED if (place.engine, place.ranks, place.tp) in LOOPED]
OFFLOADED = [Place(engine, 2, offload=True) for engine in ("zero3", "fsdp2", "zero1")]


def in_bf16(*way: Place) -> list[Place]:
    return [replace(place, precision="bf16") for place in way]


BF16 = in_bf16(Place("fsdp2", 2), Place("zero2", 2, 2), Place("zero2", 2, 2), Place("fsdp2", 2, 2, True))
BF16_WAY = [*in_bf16(Place("zero3", 2), Place("fsdp2", 1), Place("zero1", 2), Place("zero1", 2)), *BF16]


def long_walk() -> list[Place]:
    """All of VISITED, in an order in which every pair of axis values occurs as a move from the one to the other."""
    missing = {
        (a, x, b, y)
        for a, b in itertools.product(AXES, AXES)
        for x, y in itertools.product(*({getattr(place, axis) for place in VISITED} for axis in (a, b)))
    }

    def covered(source: Place, place: Place) -> set[tuple[str, object, str, object]]:
        return {(a, getattr(source, a), b, getattr(place, b)) for a, b in itertools.product(AXES, AXES)}

    def leads(place: Place, gap: tuple[str, object, str, object]) -> bool:
        return getattr(place, gap[0]) == gap[1]

    way, left = [VISITED[0]], VISITED[1:]
    while left or missing:  # what the places leave missing takes a few of them twice
        # Where nothing missing begins: to where most of it does.
        place = max(
            left or VISITED,
            key=lambda place: (len(covered(way[-1], place) & missing), sum(leads(place, gap) for gap in missing)),
        )
        missing -= covered(way[-1], place)
        left = [other for other in left if other != place]
        way += [place] * (1 + (place in LOOPS and place not in way))
    return [*way, HSDP, *OFFLOADED, HSDP]


# By their numbers in ENGINES: three rounds, in no two of which an engine follows the same one.
_ORDERS = ((0, 1, 2, 3, 4), (2, 0, 3, 1, 4), (3, 0, 4, 2, 1))


def short_walk() -> list[Place]:
    """Every engine at three splits, and every split: half of VISITED; the engines in another order each time."""
    chosen = [place for number, place in enumerate(VISITED) if (number + number // len(SPLITS)) % 2 == 0]
    way = [chosen[turn::3][order] for turn, orders in enumerate(_ORDERS) for order in orders]
    return [*(again for place in way for again in [place] * (1 + (place in LOOPS))), HSDP, *OFFLOADED, HSDP]


WALKS = WAY, LONG_WAY = short_walk(), long_walk()


@dataclass(frozen=True)
class Move:
    source: Place
    place: Place
    stayed: Track  # the source's, which went on
    moved: Track


# One kv head is fewer than tp: it is held whole. Without QK-norm, under which a change of every weight by one ulp, on
# one process, makes 1e-4 of a gain's first moment ten steps later at some points of training; here it makes 5e-6.
SISA = ("model.n_layers=1",)
MIXED = ("model.mixer=[sisa,attention]", "model.d_s=[8,0]", "model.tie_embeddings=false")
GATED = ("model.ffn=[ssm_gated,parallel]", *MIXED)  # with a parameter of three dimensions


def run_of(tiny_overrides: list[str], model: tuple[str, ...], steps: int) -> RunConfig:
    tokens = 32
    own = [f"training.seq_len={tokens}", f"training.global_batch_tokens={WINDOWS * tokens}"]
    # A rate at which rounding does not grow: Adam must not make a step of noise (eps), nor training be wild (lr).
    own += [f"training.steps={steps}", "training.eval_every=null", "optimizer.lr=6e-4", "optimizer.eps=1e-6"]
    own += ["model.n_heads=4", "model.n_kv_heads=1", "model.vocab_multiple=16", *model]
    return load_config(QUICKSTART, [*tiny_overrides, *own])


def go(base: RunConfig, way: Sequence[Place], folder: Path) -> list[Move]:
    """Walk: at each place three steps of the run's own, then on to where the next is compared."""
    found: list[Move] = []
    run = folder / "0"
    track = run_job(way[0].ranks, stays, way[0].config(base, run), run)[0]
    for number, (source, place) in enumerate(itertools.pairwise(way), start=1):
        pair, run = whole(run), folder / str(number)
        moved = merged([ranks[0] for ranks in run_job(place.ranks, moves, place.config(base, run), [pair], run=run)])
        found.append(Move(source, place, track, moved))
        track = moved
    return found


def whole(run: Path) -> tuple[Path, Path]:
    """The two checkpoints of a run, with their tensors written out whole beside them."""
    first, last = list_checkpoints(run)
    for checkpoint in (first, last):
        torch.save(tensors(checkpoint), checkpoint / WHOLE)
    return first, last


def merged(ranks: list[Track]) -> Track:
    """What all ranks found: each compared what it holds."""
    loaded, final = (
        {name: max(getattr(track, kind)[name] for track in ranks) for name in getattr(ranks[0], kind)}
        for kind in ("loaded", "final")
    )
    return Track(ranks[0].rows, loaded, final, all(track.guard for track in ranks))


def errors(move: Move) -> dict[str, float]:
    """Term → error ÷ tolerance. Exact terms give 0 or infinity."""
    bf16 = move.place.precision == "bf16"
    assert bf16 == (move.source.precision == "bf16")
    found = {f"loaded {name}": 0.0 if error == 0 else float("inf") for name, error in move.moved.loaded.items()}
    found["guard"] = 0.0 if move.moved.guard else float("inf")
    steps = list(move.moved.rows)[:AFTER]
    for step in steps:
        (loss, norm, digest), (stayed_loss, stayed_norm, stayed_digest) = move.moved.rows[step], move.stayed.rows[step]
        found[f"loss {step}"] = abs(loss - stayed_loss) / (BF16_LOSS if bf16 else FP32)
        found[f"norm {step}"] = abs(norm - stayed_norm) / stayed_norm / (BF16_NORM if bf16 else FP32)
        found[f"samples {step}"] = 0.0 if digest == stayed_digest else float("inf")
    if not bf16:  # there Adam makes signs of rounding
        found |= {f"final {name}": error / FP32 for name, error in move.moved.final.items()}
    if move.source == move.place:
        found = {term: float("inf") if error else 0.0 for term, error in found.items()}
        assert bf16 or any(term.startswith("final") for term in found)
    return {term: float("inf") if error != error else error for term, error in found.items()}


def check(move: Move) -> None:
    found = errors(move)
    assert len(found) > 3 * AFTER + 40
    assert not red(found), f"{move.source} → {move.place}"


MIXED_WAY = [Place("zero2", 2, 2), Place("fsdp2", 4, 4, True), Place("zero3", 4, 2), Place("fsdp2", 1)]
MIXED_WAY += [Place("zero0", 4, 4), Place("zero0", 4, 4)]
# Into context parallelism, about in it, and out again.
CONTEXT_WAY = [Place("fsdp2", 1), Place("fsdp2", 2, cp=2, cp_kind="ring"), Place("zero2", 4, 2, cp=2)]
CONTEXT_WAY += [Place("zero3", 4, cp=2), Place("fsdp2", 2, 2)]
WAYS = {
    "every engine": (SISA, WAY),
    "every pair": (SISA, LONG_WAY),
    "context": (SISA, CONTEXT_WAY),
    "bf16": (SISA, BF16),
    "bf16, every engine": (SISA, BF16_WAY),
    "mixed": (MIXED, MIXED_WAY),
    "gated": (GATED, MIXED_WAY),
}
SLOW = ("every pair", "bf16, every engine", "mixed", "gated")
MOVES = [
    pytest.param(name, number, id=f"{a}->{b}", marks=[pytest.mark.slow] * (name in SLOW))
    for name, (_, way) in WAYS.items()
    for number, (a, b) in enumerate(itertools.pairwise(way))
]


@pytest.fixture(scope="module")
def walked(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Move]]:
    """Walks by name, each walked once."""

    @functools.cache
    def along(name: str) -> list[Move]:
        model, way = WAYS[name]
        return go(
            run_of(tiny_overrides, model, BEFORE * len(way) + AFTER),
            way,
            tmp_path_factory.mktemp(name.replace(" ", "_")),
        )

    return along


@pytest.mark.parametrize(("name", "number"), MOVES)
def test_a_moved_run_goes_on_as_if_it_had_stayed(walked: Callable[[str], list[Move]], name: str, number: int) -> None:
    check(walked(name)[number])


def test_after_all_moves_it_is_still_the_run_of_one_process(
    walked: Callable[[str], list[Move]], tiny_overrides: list[str], tmp_path: Path
) -> None:
    steps = BEFORE * len(WAY) + AFTER
    config = PLACES[0].config(run_of(tiny_overrides, SISA, steps), tmp_path)
    want = run_job(1, trains, config, steps)[0].rows
    seen = set()
    for move in walked("every engine"):
        for step, (loss, _, digest) in move.moved.rows.items():
            assert digest == want[step][2] and abs(loss - want[step][0]) <= FP32, (move.place, step)
            seen.add(step)
    assert len(seen) > steps - 2 * BEFORE
    assert want[steps][0] < want[1][0] - 0.3, "it must have learnt something"  # 0.44 measured


def test_the_walks_are_as_long_as_they_say() -> None:
    assert len(PLACES) == 45 and len(VISITED) == 30 and {*VISITED, HSDP, *OFFLOADED} == set(LONG_WAY)
    for a, b in itertools.product(AXES, AXES):
        for values in itertools.product(*({getattr(place, axis) for place in PLACES} for axis in (a, b))):
            assert any((getattr(x, a), getattr(y, b)) == values for x, y in itertools.pairwise(LONG_WAY)), (
                a,
                b,
                values,
            )
    assert len(LOOPS) == 5 and all((place, place) in set(itertools.pairwise(way)) for place in LOOPS for way in WALKS)
    short = set(WAY) - {HSDP, *OFFLOADED}
    assert len(short) == 15 and len(WAY) == 25
    assert all(sum(place.engine == each for place in short) == 3 for each in ENGINES)
    assert {(place.ranks, place.tp) for place in short} == set(SPLITS)
    assert {place.sp for place in short} == {False, True}
    changes = {(a.engine, b.engine) for a, b in itertools.pairwise(WAY)}
    assert len(changes) >= 20 and len({a for a, b in changes if a != b}) == len(ENGINES)


ALL = [*PLACES, HSDP]


@pytest.fixture(scope="module")
def stayed(
    tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Track, tuple[Path, Path]]]:
    """The run of a place that stays there, and its two checkpoints; run once each."""

    @functools.cache
    def at(place: Place, *, mistake: str | None = None) -> tuple[Track, tuple[Path, Path]]:
        run = tmp_path_factory.mktemp(str(place))
        config = place.config(run_of(tiny_overrides, SISA, BEFORE + AFTER), run)
        return run_job(place.ranks, stays, config, run, mistake=mistake)[0], whole(run)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("place", ALL, ids=str)
def test_every_place_goes_on_from_every_other(
    stayed: Callable[..., tuple[Track, tuple[Path, Path]]], tiny_overrides: list[str], tmp_path: Path, place: Place
) -> None:
    config = place.config(run_of(tiny_overrides, SISA, BEFORE + AFTER), tmp_path)
    checked = 0
    for sources in (ALL[i : i + 8] for i in range(0, len(ALL), 8)):  # what a job of the pool has time for
        found = run_job(place.ranks, moves, config, [stayed(source)[1] for source in sources])
        for source, *ranks in zip(sources, *found, strict=True):
            check(Move(source, place, stayed(source)[0], merged(ranks)))
            checked += 1
    assert checked == 46


FSDP2, ZERO1, ZERO3 = Place("fsdp2", 2, 2), Place("zero1", 2, 2, True), Place("zero3", 2)
SEEN = {  # terms that must be red, by their beginning
    "a moment dropped": ("loaded exp_avg_sq.", "loss", "norm", "final model.", "final exp_avg_sq."),
    "Adam's step forgotten": ("loss", "norm", "final model."),
    "the cursor off by one": ("samples", "loss", "norm", "final model."),
    "slices stored plain": ("loaded model.", "loss", "norm"),
}
MISTAKEN = [  # the first of each in the fast suite too; without tp there is nothing to slice
    ("a moment dropped", (FSDP2, ZERO3)),
    ("Adam's step forgotten", (ZERO3, FSDP2)),
    ("the cursor off by one", (FSDP2, ZERO3)),
    ("slices stored plain", (ZERO1, FSDP2)),
]


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        pytest.param(mistake, place, id=f"{mistake}, {place}", marks=[pytest.mark.slow] * number)
        for mistake, places in MISTAKEN
        for number, place in enumerate(places)
    ],
)
def test_a_mistake_is_seen(
    stayed: Callable[..., tuple[Track, tuple[Path, Path]]],
    tiny_overrides: list[str],
    tmp_path: Path,
    mistake: str,
    place: Place,
) -> None:
    plain = mistake == "slices stored plain"
    source = place if plain else FSDP2
    track, pair = stayed(source, mistake=mistake if plain else None)
    config = place.config(run_of(tiny_overrides, SISA, BEFORE + AFTER), tmp_path)
    ranks = run_job(place.ranks, moves, config, [pair], mistake=mistake)
    found = red(errors(Move(source, place, track, merged([tracks[0] for tracks in ranks]))))
    for term in SEEN[mistake]:
        assert any(name.startswith(term) for name in found), (term, found)
    if plain:  # where the slices are asked for as what they are, it is no silent thing
        assert "cannot be loaded (" in run_job(place.ranks, refuses, config, pair[0])[0]
