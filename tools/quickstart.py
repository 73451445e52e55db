"""The first run, end to end: prepare, train, evaluate, plot, generate, and a table of what came out.

Calls the same public functions as the `sisa` command and prints the command a user would type for each step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # plot_run, when this file is imported rather than run

import plot_run
from rich.console import Console
from rich.table import Table

from data_pipeline.prepare import prepare
from sisa_dist.config import RunConfig, UserError, load_config
from sisa_dist.training.evaluate import evaluate_checkpoint
from sisa_dist.training.generate import stream_text
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.trainer import train

PROMPT = "def read_file(path):\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--prompt", default=PROMPT, help="what the sample continues")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments.config, arguments.overrides, arguments.prompt)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


def _run(path: Path, overrides: list[str], prompt: str) -> None:
    started = time.perf_counter()
    config = load_config(path, overrides)
    run = Path(config.output_dir)
    given = "".join(f" --set {override}" for override in overrides)
    console = Console(highlight=False)

    _say(console, f"sisa prepare {path}{given}")
    prepare(config)
    _say(console, f"sisa train {path}{given}")
    train(config)
    results: dict[str, Any] = {}
    if config.data.validation_fraction or config.evaluation.niah or config.evaluation.lambada:
        _say(console, f"sisa eval {run}")
        results, _ = evaluate_checkpoint(run)
    _say(console, f"python tools/plot_run.py {run}")
    plot = run / "curves.png"
    if plot_run.main([str(run), "--out", str(plot)]) != 0:
        raise UserError(f"{run}: the plot could not be made")
    _say(console, f"sisa generate {run} --prompt {json.dumps(prompt)} --max-tokens 120")
    sample = "".join(stream_text(run, prompt=prompt, max_tokens=120, temperature=0.8, top_p=0.95, seed=config.seed))
    console.print(f"{prompt}{sample}", markup=False)
    (run / "sample.txt").write_text(prompt + sample, encoding="utf-8")

    console.print(_table(config, run, results, plot, time.perf_counter() - started))


def _say(console: Console, command: str) -> None:
    console.print(f"\n$ {command}", style="bold", markup=False, soft_wrap=True)


def _table(config: RunConfig, run: Path, results: dict[str, Any], plot: Path, seconds: float) -> Table:
    steps = read_metrics(run)["train"]
    rates = sorted(step["tokens_per_second"] for step in steps)
    table = Table(title=f"{config.name}: done in {seconds / 60:.1f} min", show_header=False, title_justify="left")
    table.add_row("training loss, first → last", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} nats/token")
    if "perplexity" in results:
        uniform, unigram = config.model.vocab_size, results["perplexity"]["unigram_perplexity"]
        table.add_row("validation perplexity", f"{results['perplexity']['perplexity']:.1f}")
        table.add_row("  unigram / uniform baseline", f"{unigram:.1f} / {uniform} (loss {math.log(uniform):.2f})")
    if "niah" in results:
        table.add_row("needle in a haystack", f"{100 * results['niah']['accuracy']:.0f} %")
    table.add_row("training speed", f"{rates[len(rates) // 2]:,.0f} tokens/s (median step)")
    table.add_row("checkpoint", str(run / "checkpoints"))
    table.add_row("metrics", str(run / "metrics.jsonl"))
    if results:
        table.add_row("evaluation", str(run / "evaluation.json"))
    table.add_row("curves", str(plot))
    table.add_row("sample", str(run / "sample.txt"))
    table.add_row("data and tokenizer", str(config.data_place))
    table.add_row("next: your own text", "./launch.sh quickstart --set data.input=FILES --set output_dir=runs/mine")
    table.add_row("next: the Transformer", "… --set model.mixer=attention --set model.d_s=null --set output_dir=…")
    table.add_row("next: ask it", f"sisa generate {run} --prompt 'class Reader:'")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
