"""What `parallel.cp` asks of the rest of a config, each said in one line that names what to set."""

from __future__ import annotations

from pathlib import Path

import pytest

from sisa_dist.config import UserError, load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ULYSSES = "parallel.cp_kind=ulysses"
HYMBA = ("model.mixer=hymba", "model.d_s=null", "model.n_heads=4")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["training.seq_len=510", "training.global_batch_tokens=4080"],
            "into 2 × cp = 8 stretches, which does not come ",
        ),
        (["training.seq_len=510", "training.global_batch_tokens=4080"], "set seq_len to 504 or 512"),
        (
            [
                "training.seq_len=520",
                "training.global_batch_tokens=4160",
                "parallel.tp=4",
                "parallel.sequence_parallel=true",
            ],
            "8 stretches, and tp 4 each rank's two, which does not come out even: set seq_len to 512 or 528",
        ),
        (["model.mixer=fox", "model.d_s=null"], "for the mixers fox and sigmoid_sisa, and layer 0 has fox"),
        (
            ["model.mixer=mamba2", "model.d_s=null", "parallel.cp_kind=ring"],
            "parallel.cp_kind ring is of scores, and no layer has any: remove it",
        ),
        (
            [*HYMBA, "model.hymba={meta_tokens: 8, global_layers: [0]}"],
            "cp_kind all_gather meets all keys, and layer 1 of hymba has a window: set cp_kind to ulysses",
        ),
        (
            [*HYMBA, "model.hymba={meta_tokens: 20}", ULYSSES],
            "hymba.meta_tokens 20 lengthen, which 8 does not divide: set it to 16 or 24",
        ),
        (["model.mlp=moe", "model.moe={experts: 4}"], "does not go with model.moe"),
        (["attention.path=single"], "attention.path single has no effect under parallel.cp_kind all_gather"),
        (["model.n_heads=8", "model.n_kv_heads=2", ULYSSES], "tp × cp = 4 does not divide n_kv_heads 2"),
        (["model.n_heads=4", "parallel.tp=2", ULYSSES], "tp × cp = 8 does not divide n_heads 4"),
        (["parallel.ep=2"], "ep 2 does not go with cp 4: set one of them to 1"),
        (["parallel.cp=1", ULYSSES], "cp_kind ulysses has no effect with cp 1"),
        (["parallel.cp_kind=tree"], "parallel.cp_kind"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(QUICKSTART, ["parallel.cp=4", *overrides])
    assert says in str(refused.value)


def test_what_fits_is_taken() -> None:
    for more in (
        [],
        [ULYSSES, "model.n_heads=4", "attention.path=single"],
        ["parallel.cp_kind=ring", "parallel.tp=2"],
        ["model.mixer=mamba3", "model.d_s=null"],
        [*HYMBA, "model.hymba={meta_tokens: 16}", ULYSSES],
        [*HYMBA, "model.hymba={meta_tokens: 0, global_layers: [0, 1, 2, 3]}", "parallel.cp_kind=ring"],
    ):
        assert load_config(QUICKSTART, ["parallel.cp=4", *more]).parallel.cp == 4
