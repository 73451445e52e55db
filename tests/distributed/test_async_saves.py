"""A save that is written while training goes on is, to the bit, the one that training waited for."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
from torch import Tensor

from distributed.moving import Here, Place
from distributed.pool import run_job
from distributed.test_resume_anywhere import SISA, run_of
from sisa_dist.checkpoint import list_checkpoints
from sisa_dist.checkpoint.manifest import FileEntry, read_manifest
from sisa_dist.checkpoint.save import Saver
from sisa_dist.checkpoint.staging import Moment, Staging
from sisa_dist.config import RunConfig

STEPS = 4
ENGINES = ("fsdp2", "zero0", "zero1", "zero2", "zero3")
FAST = ("fsdp2", "zero3")
How = Literal["waited for", "copied", "copied, and not waited for"]


def saves(config: RunConfig, run: Path, how: How) -> int:
    """Trains with a save after every step; how many went through a copy.

    Half of each copy is made before the next step begins, half when that step asks to change the weights: at the last
    moment. Without the wait there, when it has changed them.
    """
    here, slow = Here(config), _SlowCopy(forgotten=how == "copied, and not waited for")
    with slow.in_force(), here.saver(run) as saver:
        for step in range(1, STEPS + 1):
            here.train(step)
            slow.updated()
            slow.saved += step < STEPS
            saver.save(here.state, wait=step == STEPS)
    return slow.copied


class _SlowCopy:
    def __init__(self, *, forgotten: bool) -> None:
        self._forgotten = forgotten
        self._half = [threading.Event() for _ in range(STEPS)]  # of the copies, by number
        self.saved, self.copied = 0, 0

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        real_copy, real_wait = Staging.copy, Saver._before_update

        def copy(staging: Staging, tensors: Mapping[str, Tensor], *, after: Moment) -> dict[str, Tensor]:
            half = self._half[self.copied]
            self.copied += 1
            middle = len(tensors) // 2
            copies = real_copy(staging, dict(itertools.islice(tensors.items(), middle)), after=after)
            assert half.wait(60), "training stood still"
            return copies | real_copy(staging, dict(itertools.islice(tensors.items(), middle, None)), after=after)

        def before_update(saver: Saver) -> None:
            if not self._forgotten:
                self._release()
                real_wait(saver)

        patches: list[Any] = [mock.patch.object(Staging, "copy", copy)]
        patches.append(mock.patch.object(Saver, "_before_update", before_update))
        with patches[0], patches[1]:
            yield

    def updated(self) -> None:
        if self._forgotten:
            self._release()

    def _release(self) -> None:
        if self.saved:
            self._half[self.saved - 1].set()


@pytest.mark.parametrize("engine", [e if e in FAST else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES])
def test_asynchronous_saves_change_nothing(tiny_overrides: list[str], tmp_path: Path, engine: str) -> None:
    place = Place(engine, 2, *((2, True) if engine in ("fsdp2", "zero2") else ()))
    base = run_of(tiny_overrides, SISA, STEPS)

    def folders(how: How, *, asked: bool = True) -> list[dict[str, FileEntry]]:
        training = base.training.model_copy(update={"async_save": asked, "keep_last": STEPS})
        run = tmp_path / how
        config = place.config(base.model_copy(update={"training": training}), run)
        copies = run_job(2, saves, config, run, how)
        assert copies == [STEPS - 1 if asked else 0] * 2
        found = [read_manifest(checkpoint) for checkpoint in list_checkpoints(run)]
        assert len(found) == STEPS
        for files in found:
            del files["config.yaml"]  # says how
        return found

    waited = folders("waited for", asked=False)
    assert len({files["weights_0.distcp"].sha256 for files in waited}) == STEPS, "every step changes the weights"
    assert folders("copied") == waited
    torn = folders("copied, and not waited for")
    assert [a == b for a, b in zip(torn, waited, strict=True)] == [False] * (STEPS - 1) + [True]
