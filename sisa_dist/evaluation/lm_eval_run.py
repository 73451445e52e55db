"""Runs tasks of lm-evaluation-harness on a checkpoint and keeps the harness's own results, as one JSON file.

The model is `lm_eval_model.SisaLM`; lm-eval is looked for when called. Whatever the harness offers beyond these few
settings is had from its own command line, see there.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sisa_dist.checkpoint import find_checkpoint, run_folder_of
from sisa_dist.config import UserError
from sisa_dist.evaluation.harness import write_results


def run_lm_eval(
    run: str | Path,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    model_args: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_iters: int = 100_000,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """(the harness's results, the JSON file they are in: lm_eval.json beside the run's evaluation.json, or `out`).

    tasks: names of tasks, groups or tags, or patterns of them; those in `task_folder` (YAML files) come before the
    harness's own, and where they suffice nothing else is read and no network is touched. model_args: KEY=VALUE of
    SisaLM, besides checkpoint. limit: documents a task. bootstrap_iters: draws behind the standard errors, 0 for none.
    Raises UserError where lm-eval, the checkpoint, a task or its data is missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable

        from sisa_dist.evaluation.lm_eval_model import SisaLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError("lm-eval is not installed: pip install 'sisa-dist[eval]'") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("lm-eval runs on one process here: start it without torchrun")
    checkpoint = find_checkpoint(run)
    path = out or run_folder_of(checkpoint) / "lm_eval.json"
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}: make it, or name another file")
    arguments = _read_arguments(model_args, inspect.signature(SisaLM).parameters)
    manager, names = _find_tasks(tasks, task_folder)
    try:
        with _uncounted():
            results = simple_evaluate(
                model="sisa",
                model_args={"checkpoint": str(checkpoint), **arguments},
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                bootstrap_iters=bootstrap_iters,
                log_samples=False,
            )
    except ConnectionError as error:
        raise UserError(
            f"{' '.join(str(error).split())}: the harness's tasks fetch their data once: connect, or name a folder of "
            "tasks with data of your own"
        ) from error
    assert results is not None  # one process
    # Functions, numpy numbers and dtypes become what the harness would have written.
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    write_results(path, plain)
    return plain, path


def summary(results: dict[str, Any]) -> str:
    """A line for each metric of each task and group, and one where contexts were cut."""
    lines = []
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")  # "acc,none", "acc_stderr,none"; without a comma it is no metric
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(f"{name}: {label} {_short(value)}" + (f" ± {_short(error)}" if _is_number(error) else ""))
    config = results["config"]
    for request, count in config["contexts_cut"].items():
        if count:
            fit = f"did not fit {config['max_length']} tokens and lost their beginning"
            lines.append(f"{request}: {count} contexts {fit}")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _short(value: Any) -> str:
    return f"{value:.6g}" if _is_number(value) else str(value)


@contextmanager
def _uncounted() -> Iterator[None]:
    """`datasets` tells a server of every file format it opens, local files too: 3 s each where no network answers."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _read_arguments(given: Sequence[str], known: Iterable[str]) -> dict[str, Any]:
    names = [name for name in known if name != "checkpoint"]
    found = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or name not in names:
            raise UserError(f"--model-arg {argument}: give KEY=VALUE, KEY one of {', '.join(names)}")
        found[name] = yaml.safe_load(value)
    return found


def _find_tasks(patterns: Sequence[str], folder: Path | None) -> tuple[Any, list[str]]:
    """The harness's task manager and the names that `patterns` match."""
    from lm_eval.tasks import TaskManager

    if not patterns:
        raise UserError("no task is named: give one of lm-eval's, for example lambada_openai")
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of task YAML files")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        found = [own.match_tasks([pattern]) for pattern in patterns]
        # The harness's own are 14 000 files, 8 s to list. A group may need them.
        if all(names and set(names) <= set(own.all_subtasks) for names in found):
            return own, _distinct(found)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    found = []
    for pattern in patterns:
        names = manager.match_tasks([pattern])
        if not names:
            near = difflib.get_close_matches(pattern, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them"
            raise UserError(f"{pattern}: lm-eval has no such task{'' if folder is None else f', nor {folder}'}; {hint}")
        found.append(names)
    return manager, _distinct(found)


def _distinct(found: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))
