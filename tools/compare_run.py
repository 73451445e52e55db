"""One run of tools/compare.py: trains what FOLDER/job.json says, scores it, leaves FOLDER/result.json.

    python tools/compare_run.py FOLDER

A run of its own process, so that one which fails or is killed takes no other with it. It goes on where it was stopped;
what is in result.json already is not done again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, when it is imported rather than run

import torch
from compare_task import accuracy_of, train_task

from data_pipeline.baseline import unigram_perplexity
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.window import IGNORE, Batch
from sisa_dist.checkpoint import list_checkpoints, load_weights, read_state
from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.engine import Engine, build_engine
from sisa_dist.evaluation.blimp import blimp
from sisa_dist.evaluation.harness import write_results
from sisa_dist.evaluation.lambada import make_example, read_passages
from sisa_dist.evaluation.niah import make_item
from sisa_dist.evaluation.scorer import Example, score_examples
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.training.memory_meter import MemoryMeter
from sisa_dist.training.run_data import RunData, held_out_batches, open_data
from sisa_dist.training.trainer import train

_SEQUENCES = 512  # of a task's last evaluation
_MEASURED = 4  # steps timed
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    _leave_with_the_parent()
    try:
        execute(Path(arguments[0]))
    except UserError as error:
        print(f"compare_run: {error}", file=sys.stderr)
        return 2
    return 0


def _leave_with_the_parent() -> None:
    """SIGTERM, which saves, when what started this is killed. Linux; elsewhere the run goes on to its end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def execute(folder: Path) -> None:
    """Raises UserError where it cannot be done, Requeue where it was asked to stop."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = parse_config(job["config"], source=str(folder / "job.json"))
    if job["measure"]:
        write_results(folder / "result.json", measure(config))
    elif job["task"] == "text":
        _run_text(config, job["evaluations"], folder)
    else:
        _run_task(config, job["task"], folder)


def is_done(folder: Path, evaluations: dict[str, Any]) -> bool:
    """Whether result.json holds all that is asked for; `evaluations` as in job.json."""
    found = read_result(folder)
    return bool(found) and not any(_is_asked(found, name, asked) for name, asked in evaluations.items())


def _is_asked(found: dict[str, Any], name: str, asked: dict[str, Any]) -> bool:
    """Whether an evaluation is wanted that is not there, or that was made of another file or of other items."""
    return asked["path"] is not None and found.get("asked", {}).get(name) != asked


def read_result(folder: Path) -> dict[str, Any]:
    """{} where there is none yet, or none that can be read."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def measure(config: RunConfig) -> dict[str, Any]:
    """tokens_per_step, seconds_per_step (median), score_tokens_per_second, peak_bytes of a step (live tensors, weights
    and moments included), start_seconds (to build). On tokens drawn at random: the time does not depend on what they
    say.
    """
    started = time.perf_counter()
    mesh = init_mesh(config.parallel, device=config.device)
    engine = build_engine(config, mesh)
    training, vocab = config.training, config.model.vocab_size
    micro_batches = [
        Batch(*torch.randint(vocab, (2, training.micro_batch_size, training.seq_len)).unbind(), None)
        for _ in range(training.global_batch_windows // training.micro_batch_size)
    ]
    engine.train_step(micro_batches, 0.0)
    start = time.perf_counter() - started
    meter = MemoryMeter()
    with meter:
        meter.mark(engine.state_tensors().values(), "states")
        engine.train_step(micro_batches, 0.0)
    seconds = []
    for _ in range(_MEASURED):
        started = time.perf_counter()
        engine.train_step(micro_batches, 0.0)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    engine.score(micro_batches[0].tokens, micro_batches[0].labels)
    return {
        "tokens_per_step": training.global_batch_tokens,
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "score_tokens_per_second": micro_batches[0].tokens.numel() / (time.perf_counter() - started),
        "peak_bytes": max(sum(peak.values()) for peak in meter.peaks.values()),
        "start_seconds": start,
    }


def _run_task(config: RunConfig, kind: str, folder: Path) -> None:
    engine = train_task(config, kind, folder)
    result = {"accuracies": accuracy_of(engine, kind, config.training.seq_len, sequences=_SEQUENCES)}
    # Never trained on: what a rule learned on one length does on twice of it.
    result["accuracies_twice_as_long"] = accuracy_of(engine, kind, 2 * config.training.seq_len, sequences=_SEQUENCES)
    write_results(folder / "result.json", result)


def _run_text(config: RunConfig, evaluations: dict[str, Any], folder: Path) -> None:
    train(config, quiet=True)
    result = read_result(folder)
    mesh = init_mesh(config.parallel, device=config.device)
    data = open_data(config)
    engine = build_engine(config, mesh)
    tokenizer, asked = data.tokenizer, config.evaluation
    niah = {found["step"]: found for found in result.get("niah", [])}
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints:  # the last one's weights stay in the engine
        load_weights(checkpoint, engine, model=config.model, tokenizer=tokenizer, mesh=mesh)
        step = read_state(checkpoint).step
        if step not in niah:
            # Always of seed 0: every run answers the same items.
            items = [make_item(tokenizer, i, context=asked.niah_context, seed=0) for i in range(asked.niah_items)]
            hits = _hits(engine, [item.example for item in items], asked.batch_size)
            niah[step] = {"step": step, "hits": hits}
    result["niah"] = [niah[step] for step in sorted(niah)]
    if "losses" not in result:
        result |= _perplexity(config, data, engine)
    _more(result, evaluations, engine, tokenizer, config)
    write_results(folder / "result.json", result)
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)


def _more(
    result: dict[str, Any], evaluations: dict[str, Any], engine: Engine, tokenizer: Tokenizer, config: RunConfig
) -> None:
    """LAMBADA and BLiMP, where a file is given and they are not there yet."""
    seq_len, batch_size = config.training.seq_len, config.evaluation.batch_size
    asked = evaluations["lambada"]
    if _is_asked(result, "lambada", asked):
        passages = read_passages(asked["path"])[: asked["items"]]
        made = [make_example(tokenizer, text, seq_len=seq_len, where=str(line))[0] for line, text in passages]
        result["lambada"] = {"hits": _hits(engine, made, batch_size)}
    asked = evaluations["blimp"]
    if _is_asked(result, "blimp", asked):
        result["blimp"] = blimp(
            engine, tokenizer, asked["path"], pairs=asked["items"], batch_size=batch_size, seq_len=seq_len, quiet=True
        )
    result["asked"] = evaluations


def _hits(engine: Engine, examples: list[Example], batch_size: int) -> list[int]:
    """1 for every example whose labels are all the argmax."""
    hits = [0] * len(examples)
    for number, _, is_argmax_T in score_examples(engine, examples, batch_size=batch_size, what="", quiet=True):
        hits[number] = int(is_argmax_T.all())
    return hits


def _perplexity(config: RunConfig, data: RunData, engine: Engine) -> dict[str, Any]:
    """Nats per token and tokens of every held-out window, and the unigram baseline."""
    if not data.validation:
        raise UserError("the text has no held-out part: set text.data.validation_fraction above 0, or give more text")
    (validation,) = data.validation.values()
    windows, losses, tokens = config.evaluation.perplexity_windows, [], []
    batches = held_out_batches(config, validation, engine, batch_size=config.evaluation.batch_size, max_windows=windows)
    for batch in batches:
        log_prob_BT, _ = engine.score(batch.tokens, batch.labels)
        count_B = (batch.labels != IGNORE).sum(1)
        loss_B = -log_prob_BT.double().sum(1) / count_B.clamp(min=1)
        losses += loss_B.tolist()
        tokens += count_B.tolist()
    most = None if windows is None else windows * config.training.seq_len
    unigram = unigram_perplexity(data.train, validation, max_tokens=most)
    return {"losses": losses, "tokens": tokens, "unigram_perplexity": unigram}


if __name__ == "__main__":
    raise SystemExit(main())
