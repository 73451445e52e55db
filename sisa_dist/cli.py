"""The `sisa` command. Every subcommand is a thin call of a public function; imports are late, so --help is quick."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from sisa_dist.config import UserError, load_run
from sisa_dist.data_cli import app as data_app

_OTHER_HOSTS_WAIT, _OTHER_RANKS_WAIT = 2.0, 4.0  # seconds; the slowest launcher looks once a second

app = typer.Typer(
    help="Pretrain SISA language models: prepare data, train, evaluate, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML file.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set training.steps=200. Repeatable."),
]
StageName = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="One stage of a run that has some.")]


@app.callback()
def every_command(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    """Takes the --local_rank that a bare `deepspeed` writes before the command; LOCAL_RANK says the same."""


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild data made with other settings.")] = False,
) -> None:
    """Train the tokenizer and write the WebDataset token shards, of a run of stages those of each."""
    from data_pipeline.prepare import prepare as run

    made: set[str] = set()
    for stage in load_run(config, overrides or ()).stages:
        place = str(stage.config.data_place)
        folder = run(stage.config, force=force and place not in made)
        made.add(place)
        if folder is not None:
            print(f"data: {folder}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue a run although its config changed.")
    ] = False,
) -> None:
    """Train, or resume from the run folder's newest checkpoint. Under torchrun: one process of many.

    SIGTERM or SIGUSR1 (to any rank): saves a checkpoint and exits with code 75, "run me again"; a scheduler requeues on
    it. Code 2: something to mend, in one line. Code 1: a failure; where a rank died or hung, a line names it. Code 76:
    a stage of the run is done, and the next wants other processes: the same command, launched for them, goes on.
    """
    from sisa_dist.training.trainer import train as run

    main_rank = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sisa_dist").setLevel(logging.INFO if main_rank else logging.WARNING)
    folder = run(load_run(config, overrides or ()), accept_changes=accept_changes)
    if main_rank:
        print(f"run: {folder}")


@app.command()
def stages(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[
        bool,
        typer.Option(
            "--processes", help="Only how many processes the stage to train wants, or `all`; nothing without stages."
        ),
    ] = False,
    accept_changes: Annotated[bool, typer.Option("--accept-changes", hidden=True)] = False,
) -> None:
    """Each stage of a run in full: every key, and what differs from the stage before marked with *."""
    from sisa_dist.training.stages import describe_stage, stage_to_train

    run = load_run(config, overrides or ())
    if processes:
        if run.staged:
            print(stage_to_train(run, Path(run.stages[0].config.output_dir)).processes or "all")
        return
    for stage in run.stages:
        print(describe_stage(run, stage))


@app.command("eval")
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes; default: evaluation.json in the run.")] = None,
) -> None:
    """Perplexity on held-out text, LAMBADA and NIAH, as the config's evaluation block asks; JSON out."""
    from sisa_dist.training.evaluate import evaluate_checkpoint

    results, path = evaluate_checkpoint(run, overrides or (), out=out)
    for name, values in results.items():
        print(f"{name}: {values}")
    print(f"results: {path}")


@app.command("lm-eval")
def lm_eval(
    run: RunPath,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK[,TASK]…", help="Tasks, groups, tags, or patterns.")],
    folder: Annotated[Path | None, typer.Option("--tasks", help="A folder of task YAML files of your own.")] = None,
    model_args: Annotated[
        list[str] | None,
        typer.Option("--model-arg", metavar="KEY=VALUE", help="E.g. batch_size=32, add_bos_token=True. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes; default: lm_eval.json in the run.")] = None,
) -> None:
    r"""Tasks of EleutherAI's lm-evaluation-harness; JSON out, in its format. Needs `pip install 'sisa-dist\[eval]'`."""
    from sisa_dist.evaluation.lm_eval_run import run_lm_eval, summary

    names = [name for listed in tasks for name in listed.split(",") if name]
    results, path = run_lm_eval(
        run, names, task_folder=folder, model_args=model_args or (), limit=limit, num_fewshot=num_fewshot, out=out
    )
    print(summary(results))
    print(f"results: {path}")


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Nucleus mass in (0, 1].")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1)] = 0,
) -> None:
    """Continue a prompt, streaming."""
    from sisa_dist.training.generate import stream_text

    made = stream_text(run, prompt=prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    sys.stdout.write(prompt)
    for text in made:
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def estimate(
    config: ConfigPath,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Processes; default: the config's tp × dp.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Time a step on a100-80gb, h100, h200, b200 …, or `here`.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of an hour of one device.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Propose layouts for --gpus of --device, ranked.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of --search: how many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    stage: StageName = None,
) -> None:
    """Parameters, FLOPs, bytes of every rank and their peak, what ranks send. Needs no data, processes or GPU.

    With --device also a step's time by the device's ceilings, days and price of the run, and the settings that would
    help most. Of a run of stages one after the other, or that of --stage.
    """
    from sisa_dist.training.show_estimate import estimate_run

    run = load_run(config, overrides or ())
    estimate_run(run, stage=stage, world=world, device=device, price=price, search=search, gpus=gpus, as_json=as_json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN… | SWEEP", help="Run folders, or that of a sweep.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: report.html in the run or the sweep; of several runs, here."),
    ] = None,
) -> None:
    """One HTML page that needs nothing else: curves, layers, retrieval, speed, what differs, a sweep's fits."""
    from sisa_dist.report.page import write_report

    print(f"report: {write_report(folders, out)}")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file: show and check its layout too.")] = None,
    overrides: Overrides = None,
    stage: StageName = None,
) -> None:
    """Check this machine; with a CONFIG, under any launcher, also the mesh, the slices and that all ranks agree."""
    from sisa_dist.training.doctor import diagnose

    passed = diagnose()
    if config is not None:
        from sisa_dist.training.layout import diagnose_layout

        run = load_run(config, overrides or ())
        if run.staged and stage is None:
            raise UserError(f"a launch is of one stage: name it by --stage: {', '.join(s.name for s in run.stages)}")
        passed = diagnose_layout((run.named(stage) if stage else run.stages[0]).config) and passed
    elif overrides or stage:
        raise UserError("--set and --stage have no effect without a CONFIG: name the run's YAML file")
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2."""
    code = _run()
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A library's exit handler may wait for ranks that are gone, or abort after right results.
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _run() -> int:
    try:
        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:  # no file of the user's: ours to mend, with its traceback
            traceback.print_exc()
            return 1
        message = f"{error.filename}: {error.strerror}: mend or name another path"
    except Exception:
        traceback.print_exc()
        return 1
    else:
        return 0
    _say_once(message)
    return 2


def _say_once(message: str) -> None:
    """Prints `message` from as few ranks as will do: one mistake is met by all of them, and one line is enough.

    Rank 0 speaks at once, and its launcher ends the others of its host before they do. Any that are still there after
    a while may have met something of their own, a damaged shard say: they speak up, with their names. Before there is
    a process group nothing differs between the ranks of one host, and one of them speaks.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank == 0:
        print(f"sisa: {message}", file=sys.stderr, flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever training did with it, here it ends us
    torch = sys.modules.get("torch")
    time.sleep(_OTHER_HOSTS_WAIT if local_rank == 0 else _OTHER_RANKS_WAIT)
    if local_rank == 0 or (torch is not None and torch.distributed.is_initialized()):
        print(f"sisa: rank {rank} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
