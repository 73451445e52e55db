"""What tools/compare.py will run, where, with which config, and for how long: nothing here trains or evaluates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compare_run import is_done, read_result
from compare_systems import Matched, match
from compare_task import make_task
from rich.console import Console
from rich.table import Table

from sisa_dist.config import RunConfig, UserError, load_config, parse_config, replace_file

CONFIGS = Path(__file__).parents[1] / "configs" / "compare"
_SCALED = ("training.steps", "training.eval_every", "training.checkpoint_every", "training.keep_every")
_SCALED += ("schedule.warmup_steps", "schedule.decay_steps")
_PROCESS = 8.0  # seconds to start one and to open what it needs, beyond the building that is measured
# Tokens of an item on average, generously: what the plan counts for files it does not read.
_PASSAGE, _SENTENCE, _PARADIGMS = 130, 25, 67


@dataclass(frozen=True)
class Job:
    """A run in a folder of its own, or, with `measure`, a few steps of one."""

    folder: Path
    name: str
    task: str
    system: str
    config: RunConfig = field(hash=False, compare=False)
    evaluations: dict[str, Any] = field(hash=False, compare=False)
    seed: int = 0
    lr_factor: float = 1.0
    measure: bool = False

    def done(self) -> bool:
        """Raises UserError where what is there was made by another config."""
        done = is_done(self.folder, self.evaluations)
        if not (self.folder / "job.json").is_file():
            return False
        try:
            stored = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["config"]
        except ValueError:
            return False  # cut off while it was written: nothing was begun
        differs = _difference(_of_result(stored), _of_result(self.config.model_dump()))
        if differs and self.measure:
            return False  # measured in a moment
        if differs:
            raise UserError(f"{self.folder}: was begun with another {differs}: set it as it was, or name another --out")
        return done

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "task": self.task,
            "system": self.system,
            "measure": self.measure,
            "evaluations": self.evaluations,
            "config": self.config.model_dump(),
        }
        replace_file(self.folder / "job.json", json.dumps(content, indent=1))


@dataclass(frozen=True)
class Comparison:
    out: Path
    bases: dict[str, RunConfig]  # by task
    systems: list[str]
    seeds: int
    lr_factors: list[float]
    evaluations: dict[str, Any]

    @cached_property
    def matched(self) -> dict[tuple[str, str], Matched]:
        """By (task, system)."""
        return {(task, name): match(base, name) for task, base in self.bases.items() for name in self.systems}

    def jobs(self) -> list[Job]:
        """Seed by seed, so that whatever ends it early leaves systems that can be compared."""
        return [
            self.job(task, system, seed, factor)
            for seed in range(self.seeds)
            for task in self.bases
            for factor in self.lr_factors
            for system in self.systems
        ]

    def job(self, task: str, system: str, seed: int, factor: float) -> Job:
        config = self.matched[task, system].config
        name = f"{task}/{system}/" + ("" if factor == 1 else f"lr{factor:g}_") + f"seed{seed}"
        tree = config.model_dump()
        folder = self.out / name
        tree |= {"seed": seed, "name": f"compare-{name.replace('/', '-')}", "output_dir": str(folder)}
        tree["optimizer"]["lr"] = config.optimizer.lr * factor
        parsed = parse_config(tree, source=name)
        return Job(folder, name, task, system, parsed, self.evaluations if task == "text" else {}, seed, factor)

    def measurements(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of which a job in `jobs` has need and which are not there."""
        wanted = dict.fromkeys((job.task, job.system) for job in jobs)
        found = [self._measurement(*key) for key in wanted]
        left = [job for job in found if not job.done()]
        for job in left:
            (job.folder / "result.json").unlink(missing_ok=True)
        return left

    def measured(self, task: str, system: str) -> dict[str, Any]:
        return read_result(self._measurement(task, system).folder)

    def _measurement(self, task: str, system: str) -> Job:
        folder = self.out / "measured" / task / system
        return Job(folder, f"{task}/{system}", task, system, self.matched[task, system].config, {}, measure=True)

    def seconds(self, job: Job) -> float:
        """Of the whole run, from its measurement."""
        speed, training, asked = self.measured(job.task, job.system), job.config.training, job.config.evaluation
        seconds = _PROCESS + 2 * speed["start_seconds"] + training.steps * speed["seconds_per_step"]
        rounds = training.steps // (training.eval_every or training.steps)
        if job.task != "text":
            scored = (rounds * 128 + 3 * 512) * training.seq_len
        else:
            saves = training.steps // (training.keep_every or training.steps)
            scored = (rounds * training.eval_windows + (asked.perplexity_windows or 0)) * training.seq_len
            scored += saves * asked.niah_items * asked.niah_context
            if self.evaluations["lambada"]["path"]:
                scored += self.evaluations["lambada"]["items"] * _PASSAGE
            if self.evaluations["blimp"]["path"]:
                scored += self.evaluations["blimp"]["items"] * _PARADIGMS * 2 * _SENTENCE
        return seconds + scored / speed["score_tokens_per_second"]

    def print_plan(self, left: Sequence[Job], at_once: int, console: Console) -> None:
        """Of what is left to do."""
        table = Table(title="The plan", title_justify="left")
        for column in ("task", "system", "parameters", "excess", "d_ff", "ms a step", "left", "minutes"):
            table.add_column(
                column, justify="left" if column in ("task", "system") else "right", no_wrap=column != "task"
            )
        total = 0.0
        for (task, system), matched in self.matched.items():
            mine = [job for job in left if (job.task, job.system) == (task, system)]
            seconds = sum(self.seconds(job) for job in mine)
            total += seconds
            model = matched.config.model
            table.add_row(
                task,
                system,
                f"{matched.parameters:,}",
                f"{100 * matched.excess:+.2f} %",
                str(model.d_ff) if any(mlp != "none" for mlp in model.layer_mlps) else f"none, {model.n_layers} layers",
                f"{1000 * self.measured(task, system)['seconds_per_step']:.0f}" if mine else "",
                str(len(mine)),
                f"{seconds / 60:.1f}" if mine else "done",
            )
        console.print(table)
        runs = len(self.matched) * self.seeds * len(self.lr_factors)
        console.print(
            f"{len(left)} of {runs} runs are left: about {total / 60 / at_once:.0f} minutes, {at_once} at a time"
        )


def load_bases(
    tasks: Sequence[str], overrides: Sequence[str], *, text: Sequence[str] | None, folder: Path, scale: float
) -> dict[str, RunConfig]:
    """The config of each task: configs/compare/TASK.yaml, then `scale`, then `overrides` TASK.KEY=VALUE."""
    for override in overrides:
        if override.partition(".")[0] not in tasks:
            raise UserError(f"--set {override}: begins with a task, one of {', '.join(tasks)}: write TASK.KEY=VALUE")
    bases = {}
    for task in tasks:
        path = CONFIGS / f"{task}.yaml"
        tree = load_config(path).model_dump()
        given = []
        for key in _SCALED:
            section, _, leaf = key.partition(".")
            if tree[section][leaf] is not None and scale != 1:
                given.append(f"{key}={max(1, round(tree[section][leaf] * scale))}")
        if task == "text":
            given.append(f"data.folder={json.dumps(str(folder))}")
            if text is not None:
                given.append(f"data.input={json.dumps([str(file) for file in text])}")
        given += [override.removeprefix(task + ".") for override in overrides if override.startswith(task + ".")]
        bases[task] = load_config(path, given)
        if task != "text":
            _check_task(task, bases[task].training.seq_len)
    return bases


def _check_task(task: str, seq_len: int) -> None:
    """Its last evaluation is on twice the length: what cannot be made is said before anything is trained."""
    try:
        make_task(task, 2 * seq_len, evaluation=True)
    except UserError as error:
        raise UserError(f"{task}.training.seq_len {seq_len}: of twice the length: {error}: set it lower") from None


def _of_result(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what changes nothing of what a run finds."""
    kept = {key: value for key, value in tree.items() if key not in ("output_dir", "name", "logging", "device")}
    data = {key: value for key, value in tree["data"].items() if key not in ("folder", "workers")}
    return json.loads(json.dumps(kept | {"data": data}))


def _difference(old: Any, new: Any, key: str = "") -> str:
    """The first key at which they differ, dotted; empty where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = (
            _difference(old.get(k), new.get(k), f"{key}.{k}" if key else k) for k in sorted(old.keys() | new.keys())
        )
        return next(filter(None, found), "")
    return "" if old == new else f"{key} ({old!r}, now {new!r})"
