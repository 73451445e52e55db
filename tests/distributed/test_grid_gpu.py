"""The equivalence grid on GPUs against a single one: ranks share a GPU over gloo, or have one each over NCCL."""

from __future__ import annotations

import functools

import pytest
import torch

from distributed.comparing import errors, red
from distributed.grid import Case, Outcome, covering_subset, run_case
from distributed.pool import run_job
from distributed.test_grid import MISTAKES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@functools.cache
def reference(case: Case) -> Outcome:
    return run_job(1, run_case, case, device="cuda")[0]


@pytest.mark.parametrize("case", sorted(covering_subset(), key=lambda case: case.world_size), ids=str)
def test_layout_equals_one_gpu(case: Case) -> None:
    got = run_job(case.world_size, run_case, case, device="cuda")[0]
    found = errors(case, got, reference(case.reference()), gpu=True)
    assert len(found) > 60 and not red(found)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_turns_the_grid_red(name: str) -> None:
    case, term = MISTAKES[name]
    got = run_job(case.world_size, run_case, case, name, device="cuda")[0]
    assert term in red(errors(case, got, reference(case.reference()), gpu=True))
