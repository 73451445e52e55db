"""Tasks of lm-evaluation-harness, whole: its numbers, its results file, no network, and `sisa lm-eval`."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval_expected import CONTEXTS, LONG, SEQ_LEN, Plain, task

from sisa_dist.config import UserError
from sisa_dist.evaluation.lm_eval_run import run_lm_eval, summary


def test_tasks_of_every_kind_give_the_numbers_of_plain_logits(
    trained_run: Path, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    results, path = run_lm_eval(
        trained_run,
        ["tiny_*"],
        task_folder=tmp_path,
        model_args=["batch_size=4", "add_bos_token=True"],
        bootstrap_iters=0,
    )
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
    assert path == trained_run / "lm_eval.json" and json.loads(path.read_text(encoding="utf-8")) == results
    config = results["config"]
    assert config["model"] == "sisa" and config["checkpoint"] == str(trained_run / "checkpoints" / "step_00000008")
    assert config["contexts_cut"] == {"loglikelihood": 0, "generate_until": 1}
    lines = summary(results).splitlines()
    assert "tiny_choice: acc 0.75" in lines
    assert f"generate_until: 1 contexts did not fit {SEQ_LEN} tokens and lost their beginning" in lines


@pytest.fixture
def sisa(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple]:
    """`sisa lm-eval RUN …`: (exit code, stdout, stderr)."""
    from sisa_dist import cli

    def command(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["sisa", "lm-eval", str(trained_run), *arguments])
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
    start = ("--model-arg", "add_bos_token=True")
    code, said, _ = sisa("one", "--tasks", str(tmp_path), "--limit", "1", *start, "--out", str(out))
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
    # The harness's own 14 000 tasks take 8 s to list.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    task(tmp_path, "one", [{"q": "x"}], output_type="loglikelihood")
    code, _, error = sisa(*(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert code == 2 and error.startswith("sisa: " + says.replace("FOLDER", str(tmp_path)))
    assert len(error.splitlines()) == 1


def test_without_lm_eval_one_line_says_how_to_get_it(
    sisa: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, error = sisa("lambada_openai")
    assert code == 2 and error == "sisa: lm-eval is not installed: pip install 'sisa-dist[eval]'\n"


def test_without_network_one_line_says_so(
    sisa: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'one' on the Hub\n(offline)")

    monkeypatch.setattr(lm_eval, "simple_evaluate", unreachable, raising=False)
    task(tmp_path, "one", [{"q": "x"}], output_type="loglikelihood")
    code, _, error = sisa("one", "--tasks", str(tmp_path))
    assert code == 2 and len(error.splitlines()) == 1
    assert error.startswith("sisa: Couldn't reach 'one' on the Hub (offline): the harness's tasks fetch their data")


def test_several_processes_are_refused(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run_lm_eval(trained_run, ["one"])
