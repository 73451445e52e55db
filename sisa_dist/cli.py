"""The `sisa` command. Every subcommand is a thin call of a public function; imports are late, so --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sisa_dist.config import UserError, load_config

app = typer.Typer(
    help="Pretrain SISA language models: prepare data, train, evaluate, generate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML file.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder (its newest checkpoint) or a checkpoint folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set training.steps=200. Repeatable."),
]


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild data made with other settings.")] = False,
) -> None:
    """Train the tokenizer and write the WebDataset token shards."""
    from data_pipeline.prepare import prepare as run

    folder = run(load_config(config, overrides or ()), force=force)
    print(f"data: {folder}")


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue a run although its config changed.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train, or resume from the run folder's newest checkpoint. Under torchrun: one process of many."""
    from sisa_dist.training.trainer import train as run

    folder = run(load_config(config, overrides or ()), accept_changes=accept_changes)
    print(f"run: {folder}")


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Parameters, FLOPs, bytes of every rank and their peak in a step. Needs no data, processes or GPU."""
    from sisa_dist.training.estimate import print_estimate

    print_estimate(load_config(config, overrides or ()), world_size=world, as_json=as_json)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file: show and check its layout too.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine; with a CONFIG, under any launcher, also the mesh, the slices and that all ranks agree."""
    from sisa_dist.training.doctor import diagnose

    passed = diagnose()
    if config is not None:
        from sisa_dist.training.layout import diagnose_layout

        passed = diagnose_layout(load_config(config, overrides or ())) and passed
    elif overrides:
        raise UserError("--set has no effect without a CONFIG: name the run's YAML file")
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"sisa: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:  # no file of the user's: ours to mend, with its traceback
            raise
        print(f"sisa: {error.filename}: {error.strerror}: mend or name another path", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
