"""A run as a list of stages: each is the run's config with keys of its own laid over it, for a span of steps.

    stages:
    - {name: 4k, steps: 1000, training: {seq_len: 4096}}
    - {name: 32k, steps: 200, moments: reset, training: {seq_len: 32768}, model: {rope_theta: 1.0e6}, parallel: {tp: 4}}

Every stage is resolved by itself, over the run and not over the stage before. A config without stages is a run of one.
It knows nothing of checkpoints: where a run stands, and what begins next, is training's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sisa_dist.config.errors import UserError
from sisa_dist.config.load import dump_config, merge, parse_config, read_tree
from sisa_dist.config.parameters import other_parameters
from sisa_dist.config.schema import RunConfig

# Keys that a process, or a run folder, has once for all stages.
RUN_WIDE = ("name", "output_dir", "seed", "device", "start", "logging", "training.timeout_minutes", "model.init_std")


@dataclass(frozen=True)
class RunStage:
    """Steps [first_step, config.training.steps) of a run, counted from its beginning."""

    config: RunConfig
    number: int = 1  # from 1
    name: str = ""
    first_step: int = 0
    moments: Literal["keep", "reset"] = "keep"  # of the optimizer, where this follows another stage

    @property
    def end_step(self) -> int:
        return self.config.training.steps

    @property
    def processes(self) -> int | None:
        """That its layout wants; None: as many as there are."""
        parallel = self.config.parallel
        return None if parallel.dp is None else parallel.tp * parallel.cp * parallel.dp

    def like(self, other: RunStage) -> bool:
        """Whether one process can train both, one after the other."""
        mine, others = self.config, other.config
        return (mine.parallel, mine.engine) == (others.parallel, others.engine)


@dataclass(frozen=True)
class Run:
    """What one YAML file describes. `text` is YAML that load_run reads back to the same stages."""

    stages: tuple[RunStage, ...]
    text: str

    @staticmethod
    def of(config: RunConfig) -> Run:
        """The run of a config without stages."""
        return Run((RunStage(config),), dump_config(config))

    @property
    def staged(self) -> bool:
        return bool(self.stages[0].name)

    def stage_of(self, step: int) -> RunStage:
        """The one that trains `step`, counted from 0; the last, where the run ends before."""
        return next((stage for stage in self.stages if step < stage.end_step), self.stages[-1])

    def named(self, name: str) -> RunStage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = f"it has {', '.join(stage.name for stage in self.stages)}" if self.staged else "the config has none"
        raise UserError(f"no stage is called {name}: {known}")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run of the YAML file `path`, with or without stages, with `overrides` laid over it (load_config).

    Raises UserError, one line, for a stage that cannot be, and for a setting that would have no effect.
    """
    tree, source = read_tree(path, overrides), str(path)
    if "stages" not in tree:
        return Run.of(parse_config(tree, source=source))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    try:
        return Run(tuple(_resolve(tree)), text)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_run_again(run: Run, overrides: Sequence[str]) -> Run:
    """`run` with `overrides` laid over its text. Raises UserError as load_run does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(run.text, encoding="utf-8")
        return load_run(path, overrides)


def _resolve(tree: dict[str, Any]) -> Iterator[RunStage]:
    run = {key: value for key, value in tree.items() if key != "stages"}
    entries = tree["stages"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("stages: a list of mappings, each with a name and steps")
    _check_run(run, entries)
    first: RunStage | None = None
    begins, total = 0, sum(entry["steps"] for entry in entries if isinstance(entry.get("steps"), int))
    for number, entry in enumerate(entries, start=1):
        name = _name(entry, entries)
        try:
            stage = _stage(run, entry, number=number, name=name, first_step=begins, total=total)
        except UserError as error:
            raise UserError(f"stage {name}: {str(error).removeprefix(': ')}") from None
        first = first or stage
        key = other_parameters(first.config.model, stage.config.model)
        if key is not None:
            raise UserError(
                f"stage {name}: model.{key} gives the model other parameters than stage {first.name} has: set it "
                "outside the stages"
            )
        begins = stage.end_step
        yield stage


def _check_run(run: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """Of what the file says outside its stages."""
    said = dict(_leaves(run))
    if said.get("training.steps") is not None:
        raise UserError("training.steps has no effect beside stages, each of which has steps: remove it")
    if said.get("start.data", "same") != "same" and said.get("start.resume") is None:
        raise UserError("start.data has no effect without start.resume: stages go on with what is unread; remove it")
    overlays = [dict(_leaves(_overlay(entry))) for entry in entries]
    for key in said:
        if all(any(key == over or key.startswith(f"{over}.") for over in overlay) for overlay in overlays):
            raise UserError(f"{key} has no effect: every stage says its own; remove it, or theirs")
    profile = _section(run, "training").get("profile")
    if isinstance(profile, dict) and isinstance(profile.get("start"), int):
        total = sum(entry["steps"] for entry in entries if isinstance(entry.get("steps"), int))
        if profile["start"] > total:
            raise UserError(f"training.profile.start {profile['start']} is behind the last step {total}: lower it")


def _name(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"stages: name {name!r}: every stage has a name, of letters, digits, _ and -")
    if sum(other.get("name") == name for other in entries) > 1:
        raise UserError(f"stages: two are called {name}: rename one")
    return name


def _stage(
    run: dict[str, Any], entry: dict[str, Any], *, number: int, name: str, first_step: int, total: int
) -> RunStage:
    steps, moments, overlay = entry.get("steps"), entry.get("moments", "keep"), _overlay(entry)
    if type(steps) is not int or steps < 1:
        raise UserError(f"steps is {steps!r}: set how many steps it has, 1 or more")
    if moments not in ("keep", "reset"):
        raise UserError(f"moments is {moments!r}: set keep or reset")
    if moments == "reset" and number == 1:
        raise UserError("moments reset has no effect, there are none before it: remove it")
    said = dict(_leaves(run))
    for key, value in _leaves(overlay):
        wide = next((wide for wide in RUN_WIDE if key == wide or key.startswith(f"{wide}.")), None)
        if wide is not None:
            raise UserError(f"{key} is of the whole run: set it outside the stages")
        if key == "training.steps":
            raise UserError("training.steps: set the stage's steps instead")
        if key in said and said[key] == value:
            raise UserError(f"{key} has no effect, the run says {value!r} too: remove one of them")
    tree = merge(run, overlay)
    end = first_step + steps
    _lay(tree, "training", steps=end)
    if first_step and _section(tree, "schedule").get("first_step") is None:
        _lay(tree, "schedule", first_step=first_step)
    learned = _section(tree, "model").get("d_s")
    if isinstance(learned, dict):  # its schedule is one, of the whole run
        _lay(tree, "model", d_s={"steps": total} | learned)
    profile = _section(tree, "training").get("profile")
    traced = profile.get("start") if isinstance(profile, dict) else None
    if isinstance(traced, int) and not first_step < traced <= end:
        if "training.profile.start" in dict(_leaves(overlay)):
            raise UserError(
                f"training.profile.start {traced} is not one of its steps {first_step + 1} to {end}: set one of them"
            )
        _lay(tree, "training", profile=None)  # it is another stage's
    try:
        config = parse_config(tree, source="")
    except UserError as error:
        raise UserError(str(error).replace("training.steps", "its last step")) from None
    begins = config.schedule.first_step or 0
    if begins > first_step:
        raise UserError(f"schedule.first_step {begins} is behind its first step {first_step}: lower it")
    return RunStage(config, number, name, first_step, moments)


def _overlay(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("name", "steps", "moments")}


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Empty where what stands there is none, which parse_config will say."""
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _lay(tree: dict[str, Any], name: str, **values: Any) -> None:
    if isinstance(tree.get(name, {}), dict):
        tree[name] = {**_section(tree, name), **values}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything but mappings; an empty mapping says nothing."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
