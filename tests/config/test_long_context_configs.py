"""configs/long_context: stages that can follow one another, from the weights they name, and fit where they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.pretending import alone
from sisa_dist.config import RunStage, load_config, load_run
from sisa_dist.config.parameters import other_parameters
from sisa_dist.model.rope_scaling import frequencies
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.estimate import Estimate, estimate

FOLDER = Path(__file__).parents[2] / "configs" / "long_context"
GPUS = {"1.3b_sisa": 8, "7b_llama": 16}
STAGES = {(name, stage.name): stage for name in GPUS for stage in load_run(FOLDER / f"{name}.yaml").stages}


def test_there_are_these_files_and_no_others() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*GPUS}
    assert {name for _, name in STAGES} == {"4k", "32k", "128k"}


def slowest_turn(stage: RunStage) -> float:
    """Radians a token of the slowest pair."""
    model, length = stage.config.model, stage.config.training.seq_len
    device = torch.device("cpu")
    turns = frequencies(model.rotary_channels, model.rope_theta, model.rope_scaling, length=length, device=device)
    return turns.min().item()


@pytest.mark.parametrize("name", GPUS)
def test_yarn_reaches_from_what_was_trained_to_the_stages_length(name: str) -> None:
    """Under one base: the lengths before it were trained with that."""
    trained = {10_000.0: 4096}  # of each base
    for stage in load_run(FOLDER / f"{name}.yaml").stages:
        model, length = stage.config.model, stage.config.training.seq_len
        if model.rope_scaling is None:
            trained[model.rope_theta] = length
        else:
            assert model.rope_scaling.original_length == trained[model.rope_theta]
            assert model.rope_scaling.factor == length / trained[model.rope_theta]
    assert model.rope_scaling is not None and length == 2**17


def test_windows_of_128k_are_cut_over_the_ranks_of_a_host() -> None:
    for name in GPUS:
        parallel = STAGES[name, "128k"].config.parallel
        assert parallel.cp > 1 and parallel.cp * parallel.tp == 8


@pytest.mark.parametrize("name", GPUS)
def test_the_context_grows_and_the_batch_stays(name: str) -> None:
    stages = load_run(FOLDER / f"{name}.yaml").stages
    assert [stage.config.training.seq_len for stage in stages] == [2**12, 2**15, 2**17]
    assert len({stage.config.training.global_batch_tokens for stage in stages}) == 1
    assert len({slowest_turn(stage) for stage in stages}) == 3  # every stage stretches RoPE further
    assert sorted(map(slowest_turn, stages), reverse=True) == list(map(slowest_turn, stages))
    for stage in stages:
        training = stage.config.training
        assert stage.processes == GPUS[name]
        assert training.global_batch_windows % ((stage.config.parallel.dp or 1) * training.micro_batch_size) == 0
        check_tp(stage.config.model, stage.config.parallel.tp)


def test_sisa_goes_on_where_scale_ends() -> None:
    begun = load_config(FOLDER.parent / "scale" / "1.3b_sisa.yaml")
    first = load_run(FOLDER / "1.3b_sisa.yaml").stages[0].config
    assert other_parameters(begun.model, first.model) is None and begun.model == first.model
    assert first.start.weights == begun.output_dir


def _estimate(stage: RunStage) -> Estimate:
    return estimate(stage.config)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_step_fits_into_80_gb(name: str, stage: str) -> None:
    # The three of the 7B took 43 minutes at the lowest priority beside busy cores.
    assert alone(_estimate, STAGES[name, stage], timeout=3600).peak < 70e9
