"""The harness's own `hf` model on an exported folder and ours on the checkpoint: one model, one set of answers."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval_expected import CONTEXTS, requests

from runs import QUICKSTART
from sisa_dist.config import load_config
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.evaluation.lm_eval_model import SisaLM
from sisa_dist.training.trainer import train

TEXTS = [*CONTEXTS, "été 🙂"]


@pytest.fixture(scope="module", params=["sisa", "attention"])
def models(
    request: pytest.FixtureRequest, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SisaLM, Any]:
    from lm_eval.models.huggingface import HFLM

    home = tmp_path_factory.mktemp("exported")
    mixer = ["model.mixer=attention", "model.d_s=null"] if request.param == "attention" else []
    overrides = [*tiny_overrides, *mixer, f"output_dir={home / 'run'}"]
    train(load_config(QUICKSTART, overrides), quiet=True)
    for _ in convert(plan(home / "run", to="hf"), home / "hf"):
        pass
    ours = SisaLM(str(home / "run"), batch_size=4)
    theirs = HFLM(
        pretrained=str(home / "hf"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=4,
        max_length=ours.max_length,
    )  # fmt: skip
    return ours, theirs


def both(models: tuple[SisaLM, Any], kind: str, arguments: list[tuple]) -> list[list[Any]]:
    return [getattr(model, kind)(requests(kind, arguments)) for model in models]


def test_likelihoods(models: tuple[SisaLM, Any]) -> None:
    ends = (" return", "x", "\n    value", "name of the value", "ément 🙂")
    pairs = [(context, end) for context in [*TEXTS, ""] for end in ends]
    ours, theirs = both(models, "loglikelihood", pairs)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [log_prob for log_prob, _ in ours] == pytest.approx([log_prob for log_prob, _ in theirs], abs=1e-4)
    # Otherwise this would not see a context cut, or not told apart.
    assert len({round(log_prob, 3) for log_prob, _ in ours}) == len(pairs)


def test_likelihoods_of_whole_texts(models: tuple[SisaLM, Any]) -> None:
    ours, theirs = both(models, "loglikelihood_rolling", [(context,) for context in TEXTS])
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-5)


def test_generated_texts(models: tuple[SisaLM, Any]) -> None:
    options = [{"until": [], "max_gen_toks": 9, "do_sample": False}, {"until": ["\n", "e"], "max_gen_toks": 20}]
    ours, theirs = both(models, "generate_until", [(context, some) for context in TEXTS for some in options])
    assert ours == theirs and len(set(ours)) > 4
