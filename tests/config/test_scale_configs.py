"""configs/scale: what the file names say is so, and each file's layout can be carried out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distributed.pretending import alone
from sisa_dist.config import RunConfig, load_config
from sisa_dist.model import build_model, num_parameters
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.rehearsal import pretended_mesh
from sisa_dist.training.states import states

SCALE = Path(__file__).parents[2] / "configs" / "scale"
SIZES = {"1.3b": 1.3e9, "3b": 3e9, "7b": 7e9}
MIXERS = ("sisa", "transformer")
BASES = [f"{size}_{mixer}" for size in SIZES for mixer in MIXERS]
LAID_OUT = [f"{base}_{gpus}gpu_{engine}" for base in BASES for gpus in (8, 16, 64) for engine in ("fsdp2", "zero3")]
TP = (1, 2, 4, 8)


def test_there_are_these_files_and_no_others() -> None:
    assert {path.stem for path in SCALE.iterdir()} == {*BASES, *LAID_OUT}


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return num_parameters(build_model(load_config(SCALE / f"{name}.yaml").model))


@pytest.mark.parametrize("size", SIZES)
def test_both_mixers_have_the_size_of_the_name(size: str) -> None:
    sisa, transformer = (_parameters(f"{size}_{mixer}") for mixer in MIXERS)
    assert abs(sisa / transformer - 1) < 0.005
    assert abs(transformer / SIZES[size] - 1) < 0.04
    ours, theirs = (load_config(SCALE / f"{size}_{mixer}.yaml") for mixer in MIXERS)
    different = {"mixer", "d_s", "d_ff"}
    assert ours.model.model_dump(exclude=different) == theirs.model.model_dump(exclude=different)
    for block in ("optimizer", "schedule", "training", "engine", "data"):
        assert getattr(ours, block) == getattr(theirs, block)


@pytest.mark.parametrize("name", BASES)
def test_every_tp_offered_divides(name: str) -> None:
    config = load_config(SCALE / f"{name}.yaml")
    for tp in TP:
        check_tp(config.model, tp)
        assert config.model.kv_heads % tp == 0  # no kv head is held twice
    # A bf16 row of a tp-8 slice is a multiple of 16 bytes, which tensor cores want.
    assert config.model.d_ff % 64 == 0 and config.model.padded_vocab_size % (8 * 8) == 0
    assert config.training.seq_len % max(TP) == 0 and config.training.seq_len in (2048, 4096)
    assert config.engine.precision == "bf16" and config.engine.activation_checkpointing


def _dry_run(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(bytes of weights of the fullest rank, data ranks) of the layout on meta."""
    with pretended_mesh(config, world_size) as mesh:
        with torch.device("meta"):
            model = build_model(config.model)
        slices = apply_plan(model, mesh)
        return states(config, slices, mesh).weights, mesh.dp_size


@pytest.mark.parametrize("name", LAID_OUT)
def test_the_layout_can_be_carried_out(name: str) -> None:
    config = load_config(SCALE / f"{name}.yaml")
    found = re.search(r"_(\d+)gpu_(fsdp2|zero3)$", name)
    assert found is not None
    gpus = int(found[1])
    assert config.engine.kind == {"fsdp2": "fsdp2", "zero3": "deepspeed"}[found[2]] and config.engine.zero_stage == 3
    weights, data_ranks = alone(_dry_run, config, gpus)
    assert data_ranks * config.parallel.tp == gpus
    assert config.training.global_batch_windows % (data_ranks * config.training.micro_batch_size) == 0
    # Evenly cut, but for norms that tp holds whole and rows that the ranks do not divide.
    copies = config.parallel.dp_replicate
    share = 4 * _parameters(name.split(f"_{gpus}gpu")[0]) * copies / gpus
    assert share <= weights < 1.01 * share
