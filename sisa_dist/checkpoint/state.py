"""Where a run stands, beside its tensors: the `state.json` of a checkpoint."""

from __future__ import annotations

import json
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
    weights_only: bool = False  # the checkpoint holds no moments: a run can begin from it, none can resume

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
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}/state.json: cannot be read ({error}): use another checkpoint") from None
