"""The paper's configurations have the paper's parameter totals (sisa.md §2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sisa_dist.config import load_config
from sisa_dist.model import build_model, num_parameters

PAPER = Path(__file__).parents[2] / "configs" / "paper"

TOTALS = {
    "50m_transformer": 50_914_304,
    "50m_mamba3": 49_176_768,
    "50m_sisa_ds16": 50_917_472,
    "50m_sisa_ds32": 50_914_400,
    "50m_sisa_ds64": 50_917_472,
    "50m_sisa_ds128": 50_914_400,
    "152m_transformer": 151_878_144,
    "152m_mamba3": 149_878_944,
    "152m_sisa_ds16": 151_878_432,
    "152m_sisa_ds32": 151_878_432,
    "152m_sisa_ds64": 151_878_432,
    "152m_sisa_ds128": 151_878_432,
    "369m_transformer": 369_252_352,
    "369m_mamba3": 365_526_016,
    "369m_sisa_ds16": 369_228_544,
    "369m_sisa_ds32": 369_253_120,
    "369m_sisa_ds64": 369_228_544,
    "369m_sisa_ds128": 369_253_120,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_parameter_totals_are_the_papers(name: str, total: int) -> None:
    config = load_config(PAPER / f"{name}.yaml")
    with torch.device("meta"):
        assert num_parameters(build_model(config.model)) == total


def test_every_paper_config_is_checked() -> None:
    assert {path.stem for path in PAPER.glob("*.yaml")} == set(TOTALS)
