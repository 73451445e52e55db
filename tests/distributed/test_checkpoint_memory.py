"""What saving and loading need beside the state itself, in resident memory: nothing gathers the model."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.moving import Here, Place
from distributed.ranks import run_ranks
from distributed.test_resume_anywhere import run_of
from runs import tensors
from sisa_dist.checkpoint import list_checkpoints, load_checkpoint
from sisa_dist.checkpoint.staging import local_memory, num_bytes
from sisa_dist.config import RunConfig

MODEL = ("model.d_model=512", "model.d_ff=4096", "model.n_layers=2", "model.n_heads=8")
BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}}
WHOLE = 4 * 4096 * 512  # bytes of the largest parameter
SLACK = 1_500_000  # Python objects, pages of code


def measures(config: RunConfig, run: Path, foreign: Path) -> dict[str, int]:
    """Bytes of this rank by what it did: its state, then how far resident memory rose above what stood before."""
    here = Here(config)
    views = here.engine.state_tensors()
    for view in views.values():  # zeros stand in no memory yet
        local_memory(view).normal_()
    found = {"state": num_bytes(views)}
    model, tokenizer = config.model, here.data.tokenizer

    def load(checkpoint: Path) -> None:
        load_checkpoint(checkpoint, here.engine, model=model, tokenizer=tokenizer, loader=here.loader, mesh=here.mesh)

    with here.saver(run) as saver:

        def save(*, wait: bool) -> None:
            saver.save(here.state, wait=wait)
            saver.finish()

        save(wait=True)
        load(list_checkpoints(run)[0])  # once each before it counts: code and libraries come in
        found["save, waited for"] = _rise(lambda: save(wait=True))
        found["load"] = _rise(lambda: load(list_checkpoints(run)[0]))
        found["load of one process's"] = _rise(lambda: load(foreign))
        found["save, copied"] = _rise(lambda: save(wait=False))
        found["save, copied again"] = _rise(lambda: save(wait=False))
        found["all read whole"] = _rise(lambda: tensors(foreign))
    return found


def _rise(call: Callable[[], None]) -> int:
    """How far the process's resident memory rises at most while `call` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    stood = _status("VmRSS")
    call()
    return _status("VmHWM") - stood


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measured(config: RunConfig, run: Path, foreign: Path) -> dict[str, int]:
    # What is freed goes back at once: else a peak could hide in memory kept from the one before.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    return measures(config, run, foreign)


def makes(config: RunConfig, run: Path) -> None:
    here = Here(config)
    with here.saver(run) as saver:
        saver.save(here.state, wait=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_saving_and_loading_hold_one_part_beside_the_state(
    tiny_overrides: list[str], tmp_path: Path, engine: str
) -> None:
    base = run_of(tiny_overrides, MODEL, 20)
    alone = Place("fsdp2", 1).config(base, tmp_path / "alone")
    run_ranks(makes, 1, tmp_path / "a", alone, tmp_path / "alone")
    config = Place(engine, 2).config(base, tmp_path / "run")
    if engine != "fsdp2":
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed_config": BUCKETS})})
    foreign = list_checkpoints(tmp_path / "alone")[0]
    for rank in run_ranks(measured, 2, tmp_path / "b", config, tmp_path / "run", foreign):
        print(engine, {name: f"{n / 1e6:.1f} MB" for name, n in rank.items()})
        state = rank["state"]
        assert 80e6 < state < 90e6 and rank["all read whole"] > 2 * state, "what is measured must show"
        # A rank stores and reads its half of a parameter, one process all of it.
        assert rank["save, waited for"] < WHOLE / 2 + SLACK
        assert rank["load"] < WHOLE / 2 + SLACK
        assert rank["load of one process's"] < WHOLE + SLACK
        assert state - SLACK < rank["save, copied"] < state + WHOLE / 2 + SLACK
        assert rank["save, copied again"] < WHOLE / 2 + SLACK, "one copy, whose memory stays"
