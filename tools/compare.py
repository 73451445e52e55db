"""Systems side by side on one machine: the same tokens, parameters, optimizer and seeds, and one page of what came out.

    ./launch.sh compare                         attention, mamba3, fox and sisa, three seeds
    ./launch.sh compare --all                   every mixer and variant this version has
    ./launch.sh compare --plan                  only the plan: what would run, and for how long

(a) real text: held-out perplexity, the paper's needle in a haystack over training, LAMBADA and BLiMP where their files
are given; (b) multi-query associative recall; (c) parity. The plan is measured from a few steps of each before anything
is trained. Whatever stops it, the same command goes on: finished runs are skipped, others go on from their checkpoint.
More systems, seeds or evaluations later in the same --out do only what is new.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, when it is imported rather than run

from compare_page import write_page
from compare_plan import Comparison, Job, load_bases
from compare_pool import run_jobs
from compare_systems import choose, systems
from rich.console import Console

from data_pipeline.building import locked
from data_pipeline.prepare import prepare
from sisa_dist.config import UserError

TASKS = ("text", "recall", "parity")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    stops = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, _leave) for number in stops]  # runs under way are asked to save, by the pool
    try:
        _run(arguments, console)
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted: the same command goes on", file=sys.stderr)
        return 130
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./launch.sh compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every system: " + ", ".join(systems()))
    which.add_argument("--systems", type=_words, metavar="A,B,…", help="these systems")
    parser.add_argument("--tasks", type=_words, default=list(TASKS), metavar="A,B,…", help="of text, recall, parity")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--lr", type=_factors, default=[1.0], metavar="F,…", help=_LR)
    parser.add_argument("--text", nargs="+", metavar="FILE", help=_TEXT)
    parser.add_argument("--lambada", type=Path, metavar="FILE", help="the LAMBADA .jsonl file; without it: skipped")
    parser.add_argument("--blimp", type=Path, metavar="PATH", help="BLiMP's folder or zip; without it: skipped")
    parser.add_argument("--lambada-items", type=int, default=300, metavar="N", help="passages scored (default: 300)")
    parser.add_argument("--blimp-pairs", type=int, default=10, metavar="N", help="pairs a paradigm (default: 10)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="F times as many steps of everything")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TASK.KEY=VALUE", help=_SET)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help=_JOBS)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="(runs/compare)")
    parser.add_argument("--plan", action="store_true", help="measure, print the plan, and train nothing")
    return parser


_LR = "factors on the learning rate of the task's config; of several, every system's best counts (default: 1)"
_TEXT = "instead of the sources of Python's library. NIAH, LAMBADA and BLiMP are English and want English, and more "
_TEXT += "steps of it (--set text.training.steps=…): after 1,000, NIAH is 0 on either"
_SET = "a key of configs/compare/TASK.yaml, e.g. text.training.steps=2000"
_JOBS = "runs side by side, which share the cores (default: one a core); 1: in this process"


def _run(arguments: argparse.Namespace, console: Console) -> None:
    for name in ("seeds", "jobs", "scale", "lambada_items", "blimp_pairs"):
        value = getattr(arguments, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    for name, words in (("--tasks", arguments.tasks), ("--systems", arguments.systems)):
        if words == []:
            raise UserError(f"{name}: names nothing: give one, or leave the option out")
    unknown = [task for task in arguments.tasks if task not in TASKS]
    if unknown:
        raise UserError(f"--tasks: there is no {unknown[0]}: choose of {', '.join(TASKS)}")
    for path in (arguments.lambada, arguments.blimp, *_plain(arguments.text)):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file: name it, or leave the option out to skip that evaluation")
    out: Path = arguments.out
    bases = load_bases(
        arguments.tasks, arguments.overrides, text=arguments.text, folder=out / "data", scale=arguments.scale
    )
    comparison = Comparison(
        out=out,
        bases=bases,
        systems=choose(arguments.systems, everything=arguments.all),
        seeds=arguments.seeds,
        lr_factors=arguments.lr,
        evaluations={
            "lambada": {"path": _absolute(arguments.lambada), "items": arguments.lambada_items},
            "blimp": {"path": _absolute(arguments.blimp), "items": arguments.blimp_pairs},
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"{out}: another comparison is at work here: wait for it, or name another --out"):
        left = [job for job in comparison.jobs() if not job.done()]
        if left and "text" in bases and not arguments.plan:
            prepare(bases["text"])
        failed = run_jobs(comparison.measurements(left), arguments.jobs, console, what="measuring")
        _refuse_failed(failed, comparison)
        comparison.print_plan(left, arguments.jobs, console)
        if arguments.plan:
            return
        failed = run_jobs(left, arguments.jobs, console, what="training")
        page = write_page(comparison, arguments.jobs)
        console.print(f"\nthe page: {page}\nthe figures of it: {out / 'comparison.json'}", markup=False)
        _refuse_failed(failed, comparison)


def _refuse_failed(failed: dict[Job, str], comparison: Comparison) -> None:
    if failed:
        job, why = next(iter(failed.items()))
        raise UserError(f"{len(failed)} run(s) failed, the first in {job.folder}: {why}; the same command tries again")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(os.EX_TEMPFAIL)


def _plain(texts: list[str] | None) -> list[Path]:
    """Those that are one file's name: no globs, no URLs."""
    return [Path(text) for text in texts or [] if not set(text) & set("*?[:")]


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _factors(text: str) -> list[float]:
    try:
        found = list(dict.fromkeys(float(word) for word in _words(text)))
    except ValueError:
        found = []
    if not found or not all(0 < factor < math.inf for factor in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of factors above 0: give for example 0.5,1,2")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
