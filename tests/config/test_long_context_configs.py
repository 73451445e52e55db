"""configs/long_context: stages that can follow one another, from the weights they name, and fit where they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.pretending import alone
from sisa_dist.config import RunStage, load_config, load_run
from sisa_dist.config.parameters import other_parameters
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.estimate import Estimate, estimate

FOLDER = Path(__file__).parents[2] / "configs" / "long_context"
GPUS = {"1.3b_sisa": 8, "7b_llama": 16}
STAGES = {(name, stage.name): stage for name in GPUS for stage in load_run(FOLDER / f"{name}.yaml").stages}


def test_there_are_these_files_and_no_others() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*GPUS}
    assert {name for _, name in STAGES} == {"4k", "32k", "128k"}


@pytest.mark.parametrize("name", GPUS)
def test_the_context_grows_and_the_batch_stays(name: str) -> None:
    stages = load_run(FOLDER / f"{name}.yaml").stages
    assert [stage.config.training.seq_len for stage in stages] == [2**12, 2**15, 2**17]
    assert len({stage.config.training.global_batch_tokens for stage in stages}) == 1
    thetas = [stage.config.model.rope_theta for stage in stages]
    assert thetas == sorted(set(thetas)) and thetas[0] == 10_000
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
    assert alone(_estimate, STAGES[name, stage]).peak < 70e9
