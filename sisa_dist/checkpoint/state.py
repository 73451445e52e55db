"""Where a run stands, beside its tensors: the `state.json` of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sisa_dist.config import UserError
from sisa_dist.engine import StepResult


@dataclass(frozen=True)
class TrainState:
    step: int  # steps done, skipped ones too
    cursor: int  # next window of the data order, in its stage
    tokens: int  # labels seen, those of skipped steps too
    seconds: float  # of training, over all sittings
    fingerprint: str  # of the data order the cursor counts in
    skipped: int = 0  # steps that changed no weight
    skipped_in_row: int = 0  # of them, the last ones
    evaluation_due: bool = False  # the evaluation after this step was cut short by a request to stop
    guard: list[float] = field(default_factory=list)  # Guard.state(), as of a save
    stage: dict[str, Any] | None = None  # where the stage of the data began, small JSON (Stage.carry); None: the first
    forgotten: int = 0  # updates before the moments were last made anew: Adam counts from there
    weights_only: bool = False  # the checkpoint holds no moments: a run can begin from it, none can resume

    @property
    def updates(self) -> int:
        """Adam's step: how often the moments that there are were changed."""
        return self.step - self.skipped - self.forgotten

    def without_moments(self) -> TrainState:
        """Where a stage begins that resets them."""
        return replace(self, forgotten=self.step - self.skipped)

    def after(self, result: StepResult, *, cursor: int, seconds: float) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            cursor=cursor,
            tokens=self.tokens + result.tokens,
            seconds=self.seconds + seconds,
            skipped=self.skipped + result.skipped,
            skipped_in_row=self.skipped_in_row + 1 if result.skipped else 0,
            evaluation_due=False,
        )


def read_state(checkpoint: Path) -> TrainState:
    path = checkpoint / "state.json"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): use another checkpoint") from None
    return parse_state(content, source=str(path))


def parse_state(content: bytes, *, source: str) -> TrainState:
    """The state.json `content`. Raises UserError, which begins with `source`, for anything that is none."""
    try:
        state = TrainState(**json.loads(content))
        for name, value in vars(state).items():
            if not _KINDS[type(getattr(_EMPTY, name))](value):
                raise ValueError(f"{name} is {value!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read ({error}): use another checkpoint") from None
    return state


def _is_stage(value: Any) -> bool:
    """What Stage.carry returns, or None; what a source's `rest` holds only data_pipeline knows."""
    if value is None:
        return True
    if not (isinstance(value, dict) and value.keys() == {"number", "sources"} and type(value["number"]) is int):
        return False
    sources = value["sources"]
    return isinstance(sources, dict) and all(
        isinstance(source, dict)
        and source.keys() == {"epoch", "rest"}
        and type(source["epoch"]) is int
        and isinstance(source["rest"], dict | None)
        for source in sources.values()
    )


_EMPTY = TrainState(0, 0, 0, 0.0, "")
_KINDS: dict[type, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    int: lambda value: type(value) is int and value >= 0,
    float: lambda value: type(value) in (int, float),
    list: lambda value: isinstance(value, list) and all(type(entry) in (int, float) for entry in value),
    type(None): _is_stage,
}
