"""Our checkpoints in lm-evaluation-harness: each number equals one worked out from plain logits, a text at a time."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from data_pipeline.tokenizer import Tokenizer
from runs import QUICKSTART
from sisa_dist.checkpoint import load_model
from sisa_dist.config import UserError, load_config
from sisa_dist.evaluation.lm_eval_model import SisaLM
from sisa_dist.evaluation.lm_eval_run import run_lm_eval, summary
from sisa_dist.model import LM
from sisa_dist.training.trainer import train

SEQ_LEN = 64
LONG = (
    "    for name, value in sorted(values.items()):\n        print(name, value)\n" * 6
)  # more than 2 × SEQ_LEN tokens
CONTEXTS = ["def load(path):", "x", "import os\n", "return the sum of all", LONG, "    assert total > 0, "]


@pytest.fixture(scope="module")
def run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lm_eval") / "run"
    train(load_config(QUICKSTART, [*tiny_overrides, f"output_dir={output}"]), quiet=True)
    return output


class Plain:
    """The expected: fp64 log-softmax of the plain model's logits, one unpadded sequence at a time."""

    def __init__(self, run: Path) -> None:
        self.model: LM
        self.tokenizer: Tokenizer
        self.model, self.tokenizer = load_model(run)
        self.eos = self.tokenizer.eos_id

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(torch.tensor([ids]))
        assert isinstance(logits, torch.Tensor)
        return logits[0].double().log_softmax(-1)

    def likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """At most SEQ_LEN tokens are seen, the last of them."""
        ids = (context + continuation)[-(SEQ_LEN + 1) :]
        log_probs = self.log_probs(ids[:-1])[-len(continuation) :]
        picked = log_probs[torch.arange(len(continuation)), torch.tensor(continuation)]
        return float(picked.sum()), log_probs.argmax(-1).tolist() == continuation

    def of_text(self, context: str, continuation: str) -> tuple[float, bool]:
        """Texts whose pieces do not span the boundary. The context's last spaces are the continuation's."""
        before = context.rstrip()
        start, end = self.tokenizer.encode(before), self.tokenizer.encode(context[len(before) :] + continuation)
        assert self.tokenizer.encode(context + continuation) == start + end
        return self.likelihood([self.eos, *start], end)

    def rolling(self, text: str) -> float:
        """Windows of SEQ_LEN tokens; the last is filled up with context."""
        ids = [self.eos, *self.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + SEQ_LEN, len(ids))
            begin = max(0, end - 1 - SEQ_LEN)
            total += self.likelihood(ids[begin:done], ids[done:end])[0]
            done = end
        return total

    def greedy(self, context: str, tokens: int) -> str:
        ids = [self.eos, *self.tokenizer.encode(context)][-(SEQ_LEN - tokens) :]
        made: list[int] = []
        for _ in range(tokens):
            made.append(int(self.log_probs(ids + made)[-1].argmax()))
            if made[-1] == self.eos:
                break
        return self.tokenizer.decode(made)


@pytest.fixture(scope="module")
def plain(run: Path) -> Plain:
    return Plain(run)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


def task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    body = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body), encoding="utf-8")


def test_tasks_of_every_kind_give_the_numbers_of_plain_logits(
    run: Path, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = [" return", " import", " the value"]
    likelihoods = [[plain.of_text(context, choice)[0] for choice in choices] for context in CONTEXTS[:4]]
    best = [values.index(max(values)) for values in likelihoods]
    gold = [best[0], (best[1] + 1) % 3, best[2], best[3]]  # one of four is wrong
    per_letter = [max(range(3), key=lambda c: values[c] / len(choices[c])) for values in likelihoods]
    questions = [{"q": q, "choices": choices, "a": a} for q, a in zip(CONTEXTS, gold, strict=False)]
    task(
        tmp_path, "tiny_choice", questions, output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_choice="{{choices}}", doc_to_target="{{a}}", target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    texts = [{"text": LONG}, {"text": "short"}, {"text": "two words"}]
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task(
        tmp_path, "tiny_text", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": metric} for metric in metrics],
    )  # fmt: skip
    answers = [plain.greedy(context, 12) for context in CONTEXTS]
    stop = next(character for character in answers[0][1:] if not character.isspace())
    assert any(stop in answer for answer in answers)
    expected = [answer.split(stop)[0] for answer in answers]
    wanted = [
        {"q": q, "a": text if i % 3 else f"{text}?"} for i, (q, text) in enumerate(zip(CONTEXTS, expected, strict=True))
    ]
    task(
        tmp_path, "tiny_written", wanted, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs={"until": [stop], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    last_words = [plain.of_text(context, " value") for context in CONTEXTS[:4]]
    task(
        tmp_path, "tiny_last", [{"q": q} for q in CONTEXTS[:4]], output_type="loglikelihood", doc_to_text="{{q}}",
        doc_to_target=" value", metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )  # fmt: skip
    # No network for tasks of one's own: not even one that is tried and given up.
    reached: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: reached.append(arguments))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    results, path = run_lm_eval(run, ["tiny_*"], task_folder=tmp_path, model_args=["batch_size=4"], bootstrap_iters=0)
    assert reached == []
    found = results["results"]
    assert found["tiny_choice"]["acc,none"] == 0.75
    assert found["tiny_choice"]["acc_norm,none"] == sum(a == b for a, b in zip(per_letter, gold, strict=True)) / 4
    total = sum(plain.rolling(text["text"]) for text in texts)
    words = sum(len(re.split(r"\s+", text["text"])) for text in texts)
    letters = sum(len(text["text"]) for text in texts)
    assert found["tiny_text"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["tiny_text"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / letters), rel=1e-5)
    assert found["tiny_text"]["bits_per_byte,none"] == pytest.approx(-total / letters / math.log(2), rel=1e-5)
    assert found["tiny_written"]["exact_match,none"] == pytest.approx(4 / 6)
    mean = sum(log_prob for log_prob, _ in last_words) / 4
    assert found["tiny_last"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["tiny_last"]["acc,none"] == sum(greedy for _, greedy in last_words) / 4
    assert path == run / "lm_eval.json" and json.loads(path.read_text(encoding="utf-8")) == results
    config = results["config"]
    assert config["model"] == "sisa" and config["checkpoint"] == str(run / "checkpoints" / "step_00000008")
    assert config["contexts_cut"] == {"loglikelihood": 0, "generate_until": 1}
    lines = summary(results).splitlines()
    assert "tiny_choice: acc 0.75" in lines
    assert f"generate_until: 1 contexts did not fit {SEQ_LEN} tokens and lost their beginning" in lines


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_do_not_depend_on_the_batch(
    run: Path, plain: Plain, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order of the requests; a context too long keeps its end, and is counted."""
    pairs = [(context, end) for context in CONTEXTS for end in (" return", " import the value of", " x")]
    model = SisaLM(str(run), batch_size=batch_size)
    found = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert len(found) == 18
    for pair, (log_prob, greedy) in zip(pairs, found, strict=True):
        expected = plain.of_text(*pair)
        assert log_prob == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert model.contexts_cut["loglikelihood"] == 3
    assert f"loglikelihood: 3 of 18 contexts did not fit {SEQ_LEN} tokens and lost their beginning" in caplog.text


def test_a_shorter_length_sees_less_and_a_continuation_must_fit(run: Path, plain: Plain) -> None:
    model = SisaLM(str(run), max_length=4)
    ids = plain.tokenizer.encode("return the sum of all values")
    context, end = plain.tokenizer.decode(ids[:-1]), plain.tokenizer.decode(ids[-1:])
    ((log_prob, _),) = model.loglikelihood(requests("loglikelihood", [(context, end)]), disable_tqdm=True)
    log_probs = plain.log_probs(ids[-5:-1])
    assert log_prob == pytest.approx(float(log_probs[-1, ids[-1]]), abs=1e-4)
    with pytest.raises(UserError, match=r"a continuation has \d+ tokens, the model sees 4: set max_length"):
        model.loglikelihood(requests("loglikelihood", [("x", LONG)]), disable_tqdm=True)


def test_a_context_begins_as_a_document_does(run: Path, plain: Plain) -> None:
    encode, eos = plain.tokenizer.encode, plain.eos
    pairs = requests("loglikelihood", [("x", " return"), ("", " return"), ("  ", "return")])
    started = SisaLM(str(run)).loglikelihood(pairs, disable_tqdm=True)
    bare = SisaLM(str(run), add_bos_token=False).loglikelihood(pairs, disable_tqdm=True)
    expected = plain.likelihood([eos, *encode("x")], encode(" return"))[0]
    without = plain.likelihood(encode("x"), encode(" return"))[0]
    assert started[0][0] == pytest.approx(expected, abs=1e-4) and bare[0][0] == pytest.approx(without, abs=1e-4)
    assert abs(expected - without) > 1e-3
    # Nothing to predict from but a document's start; of a context of spaces the harness leaves none.
    for number, text in ((1, " return"), (2, "  return")):
        expected = plain.likelihood([eos], encode(text))[0]
        assert started[number][0] == pytest.approx(expected, abs=1e-4) and bare[number] == started[number]
    rolling = requests("loglikelihood_rolling", [("x return",), ("",)])
    for model in (SisaLM(str(run)), SisaLM(str(run), add_bos_token=False)):
        assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == [
            pytest.approx(plain.rolling("x return")),
            0.0,
        ]


def test_where_context_ends_and_continuation_begins(run: Path, plain: Plain) -> None:
    model, encode = SisaLM(str(run), add_bos_token=False), plain.tokenizer.encode
    # Spaces at the end of the context belong to the continuation.
    assert model._encode_pair("x ", "return") == (encode("x"), encode(" return"))
    assert SisaLM(str(run))._encode_pair("x", " return") == ([plain.eos, *encode("x")], encode(" return"))
    # A piece that spans the boundary is the continuation's, where otherwise nothing would be left of it.
    assert [len(encode(text)) for text in ("def", "de", "x def", "x")] == [1, 1, 3, 1]
    assert model._encode_pair("x de", "f") == (encode("x def")[:2], encode("def"))
    assert SisaLM(str(run))._encode_pair("x de", "f") == ([plain.eos, *encode("x def")[:2]], encode("def"))
    assert model._encode_pair("de", "f") == ([plain.eos], encode("def"))
    # An empty continuation is certain.
    assert model.loglikelihood(requests("loglikelihood", [("x", "")]), disable_tqdm=True) == [(0.0, True)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_greedy_and_do_not_depend_on_the_batch(run: Path, plain: Plain, batch_size: int) -> None:
    model = SisaLM(str(run), batch_size=batch_size)
    options = [{"until": [], "max_gen_toks": 10}, {"until": ["\n"], "max_gen_toks": 5}]
    asked = requests("generate_until", [(context, option) for context in [*CONTEXTS, ""] for option in options])
    expected = []
    for context in [*CONTEXTS, ""]:
        expected += [plain.greedy(context, 10), plain.greedy(context, 5).split("\n")[0]]
    assert model.generate_until(asked) == expected
    assert model.contexts_cut["generate_until"] == 2
    with pytest.raises(UserError, match="max_gen_toks=64 does not fit a model of 64 tokens: set 1 to 63"):
        model.generate_until(requests("generate_until", [("x", {"max_gen_toks": SEQ_LEN})]))


def test_without_a_number_half_the_length_is_written_at_most(run: Path, plain: Plain) -> None:
    (text,) = SisaLM(str(run)).generate_until(requests("generate_until", [("x", {})]))
    assert text == plain.greedy("x", SEQ_LEN // 2)


def test_the_harness_cache_holds_each_answer_once(run: Path, tmp_path: Path) -> None:
    model = SisaLM(str(run))
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


def test_bf16_is_near_and_not_the_same(run: Path, plain: Plain) -> None:
    pair = requests("loglikelihood", [("def load(path):", " return the value")])
    ((found, _),) = SisaLM(str(run), dtype="bfloat16").loglikelihood(pair, disable_tqdm=True)
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
def test_settings_that_cannot_serve(run: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SisaLM(**{"checkpoint": str(run), **arguments})


@pytest.fixture
def sisa(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """`sisa lm-eval RUN …`: (exit code, stdout, stderr)."""
    from sisa_dist import cli

    def command(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["sisa", "lm-eval", str(run), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return command


def test_the_command(sisa: Callable[..., tuple], plain: Plain, tmp_path: Path) -> None:
    task(
        tmp_path, "one", [{"q": "x"}, {"q": "y"}], output_type="loglikelihood", doc_to_text="{{q}}",
        doc_to_target=" value", metric_list=[{"metric": "perplexity"}],
    )  # fmt: skip
    out = tmp_path / "out.json"
    code, said, _ = sisa("one", "--tasks", str(tmp_path), "--limit", "1", "--out", str(out))
    assert code == 0
    assert json.loads(out.read_text(encoding="utf-8"))["n-samples"]["one"] == {"original": 2, "effective": 1}
    value = math.exp(-plain.of_text("x", " value")[0])
    first, last = said.splitlines()
    assert first.startswith("one: perplexity ") and float(first.split()[2]) == pytest.approx(value, rel=1e-4)
    assert last == f"results: {out}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("oen", "--tasks", "FOLDER"), "oen: lm-eval has no such task, nor FOLDER; did you mean one?"),
        (("one", "--tasks", "absent"), "absent: no such folder of task YAML files"),
        (("one", "--model-arg", "batch=3"), "--model-arg batch=3: give KEY=VALUE, KEY one of batch_size, device"),
        (("one", "--out", "absent/x.json"), "--out absent/x.json: there is no folder absent"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    sisa: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    from lm_eval.tasks import manager

    # The harness's own 14 000 tasks take 8 s to list.
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    task(tmp_path, "one", [{"q": "x"}], output_type="loglikelihood")
    code, _, error = sisa(*(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert code == 2 and error.startswith("sisa: " + says.replace("FOLDER", str(tmp_path)))
    assert len(error.splitlines()) == 1


def test_without_lm_eval_one_line_says_how_to_get_it(
    sisa: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, error = sisa("lambada_openai")
    assert code == 2 and error == "sisa: lm-eval is not installed: pip install 'sisa-dist[eval]'\n"


def test_several_processes_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run_lm_eval(run, ["one"])
