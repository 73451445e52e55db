"""Our checkpoints as a model of lm-evaluation-harness: each number is the one of plain logits, a text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import CachingLM
from lm_eval_expected import CONTEXTS, LONG, SEQ_LEN, Plain, requests

from sisa_dist.config import UserError
from sisa_dist.evaluation import lm_eval_model
from sisa_dist.evaluation.lm_eval_model import SisaLM
from sisa_dist.evaluation.until import generate_texts


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_do_not_depend_on_the_batch(
    trained_run: Path, plain: Plain, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order of the requests; a context too long keeps its end, and is counted."""
    pairs = [(context, end) for context in CONTEXTS for end in (" return", " import the value of", " x")]
    model = SisaLM(str(trained_run), add_bos_token=True, batch_size=batch_size)
    found = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert len(found) == 18
    for pair, (log_prob, greedy) in zip(pairs, found, strict=True):
        expected = plain.of_text(*pair)
        assert log_prob == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert model.contexts_cut["loglikelihood"] == 3
    assert f"loglikelihood: 3 of 18 contexts did not fit {SEQ_LEN} tokens and lost their beginning" in caplog.text


def test_a_shorter_length_sees_less_and_a_continuation_must_fit(trained_run: Path, plain: Plain) -> None:
    model = SisaLM(str(trained_run), add_bos_token=True, max_length=4)
    ids = plain.tokenizer.encode("return the sum of all values")
    context, end = plain.tokenizer.decode(ids[:-1]), plain.tokenizer.decode(ids[-1:])
    ((log_prob, _),) = model.loglikelihood(requests("loglikelihood", [(context, end)]), disable_tqdm=True)
    log_probs = plain.log_probs(ids[-5:-1])
    assert log_prob == pytest.approx(float(log_probs[-1, ids[-1]]), abs=1e-4)
    with pytest.raises(UserError, match=r"a continuation has \d+ tokens, the model sees 4: set max_length"):
        model.loglikelihood(requests("loglikelihood", [("x", LONG)]), disable_tqdm=True)


def test_a_context_begins_as_a_document_does(trained_run: Path, plain: Plain) -> None:
    encode, eos = plain.tokenizer.encode, plain.eos
    pairs = requests("loglikelihood", [("x", " return"), ("", " return"), ("  ", "return")])
    started = SisaLM(str(trained_run), add_bos_token=True).loglikelihood(pairs, disable_tqdm=True)
    bare = SisaLM(str(trained_run), add_bos_token=False).loglikelihood(pairs, disable_tqdm=True)
    expected = plain.likelihood([eos, *encode("x")], encode(" return"))[0]
    without = plain.likelihood(encode("x"), encode(" return"))[0]
    assert started[0][0] == pytest.approx(expected, abs=1e-4) and bare[0][0] == pytest.approx(without, abs=1e-4)
    assert abs(expected - without) > 1e-3
    # Nothing to predict from but a document's start; of a context of spaces the harness leaves none.
    for number, text in ((1, " return"), (2, "  return")):
        expected = plain.likelihood([eos], encode(text))[0]
        assert started[number][0] == pytest.approx(expected, abs=1e-4) and bare[number] == started[number]
    rolling = requests("loglikelihood_rolling", [("x return",), ("",)])
    for model in (SisaLM(str(trained_run), add_bos_token=True), SisaLM(str(trained_run), add_bos_token=False)):
        assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == [
            pytest.approx(plain.rolling("x return")),
            0.0,
        ]


def test_where_context_ends_and_continuation_begins(trained_run: Path, plain: Plain) -> None:
    model, encode = SisaLM(str(trained_run), add_bos_token=False), plain.tokenizer.encode
    started = SisaLM(str(trained_run), add_bos_token=True)
    # Spaces at the end of the context belong to the continuation.
    assert model._encode_pair("x ", "return") == (encode("x"), encode(" return"))
    assert started._encode_pair("x", " return") == (
        [plain.eos, *encode("x")],
        encode(" return"),
    )
    # A piece that spans the boundary is the continuation's, where otherwise nothing would be left of it.
    assert [len(encode(text)) for text in ("def", "de", "x def", "x")] == [1, 1, 3, 1]
    assert model._encode_pair("x de", "f") == (encode("x def")[:2], encode("def"))
    assert started._encode_pair("x de", "f") == (
        [plain.eos, *encode("x def")[:2]],
        encode("def"),
    )
    assert model._encode_pair("de", "f") == ([plain.eos], encode("def"))
    # An empty continuation is certain.
    pairs = requests("loglikelihood", [("x", ""), ("x", " return")])
    certain, other = SisaLM(str(trained_run), add_bos_token=True).loglikelihood(pairs, disable_tqdm=True)
    assert certain == (0.0, True) and other[0] == pytest.approx(plain.of_text("x", " return")[0], abs=1e-4)
    assert model.loglikelihood(pairs[:1], disable_tqdm=True) == [certain]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_greedy_and_do_not_depend_on_the_batch(
    trained_run: Path, plain: Plain, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    monkeypatch.setattr(
        lm_eval_model, "generate_texts", lambda *a, **k: prompts.extend(a[2]) or generate_texts(*a, **k)
    )
    model = SisaLM(str(trained_run), add_bos_token=True, batch_size=batch_size)
    options = [{"until": [], "max_gen_toks": 10}, {"until": ["\n"], "max_gen_toks": 5}]
    asked = requests("generate_until", [(context, option) for context in [*CONTEXTS, ""] for option in options])
    expected = []
    for context in [*CONTEXTS, ""]:
        expected += [plain.greedy(context, 10), plain.greedy(context, 5).split("\n")[0]]
    assert model.generate_until(asked) == expected
    # As many tokens as leave room for those to be written.
    long = plain.tokenizer.encode(LONG)
    assert long[-(SEQ_LEN - 10) :] in prompts and long[-(SEQ_LEN - 5) :] in prompts
    assert prompts.count([plain.eos]) == 2 and max(map(len, prompts)) == SEQ_LEN - 5
    assert model.contexts_cut["generate_until"] == 2
    with pytest.raises(UserError, match="max_gen_toks=64 does not fit a model of 64 tokens: set 1 to 63"):
        model.generate_until(requests("generate_until", [("x", {"max_gen_toks": SEQ_LEN})]))


def test_without_a_number_half_the_length_is_written_at_most(trained_run: Path, plain: Plain) -> None:
    (text,) = SisaLM(str(trained_run), add_bos_token=True).generate_until(requests("generate_until", [("x", {})]))
    assert text == plain.greedy("x", SEQ_LEN // 2)


def test_the_harness_cache_holds_each_answer_once(trained_run: Path, tmp_path: Path) -> None:
    model = SisaLM(str(trained_run), add_bos_token=True)
    cached: Any = CachingLM(model, str(tmp_path / "cache.db"))
    asked = {
        "loglikelihood": requests("loglikelihood", [("x", " return"), ("", " y")]),
        "loglikelihood_rolling": requests("loglikelihood_rolling", [("x",), (LONG,)]),
        "generate_until": requests("generate_until", [("x", {"max_gen_toks": 3}), ("y", {"max_gen_toks": 2})]),
    }
    first = {kind: getattr(cached, kind)(some) for kind, some in asked.items()}
    assert len(cached.dbdict) == 6
    del model.model
    assert {kind: getattr(cached, kind)(some) for kind, some in asked.items()} == first


def test_bf16_is_near_and_not_the_same(trained_run: Path, plain: Plain) -> None:
    pair = requests("loglikelihood", [("def load(path):", " return the value")])
    ((found, _),) = SisaLM(str(trained_run), add_bos_token=True, dtype="bfloat16").loglikelihood(
        pair, disable_tqdm=True
    )
    expected = plain.of_text("def load(path):", " return the value")[0]
    assert found == pytest.approx(expected, rel=2e-2) and found != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": "auto"}, "batch_size=auto: set a positive number"),
        ({"max_length": -1}, "max_length=-1: set a positive number"),
        ({"dtype": "float16"}, "dtype=float16: set float32 or bfloat16"),
        ({"device": "tpu9"}, "device=tpu9: set auto, cpu"),
        ({"add_bos_token": "no"}, "add_bos_token=no: set True or False"),
        ({"checkpoint": "nowhere"}, "nowhere: no checkpoint here"),
    ],
)
def test_settings_that_cannot_serve(trained_run: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SisaLM(**{"checkpoint": str(trained_run), **arguments})
