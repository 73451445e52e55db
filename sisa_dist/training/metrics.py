"""What a run reports while it trains: metrics.jsonl is the truth, wandb and the console are views of it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

from sisa_dist.config import RunConfig, UserError, dump_config
from sisa_dist.training.metrics_file import keep_until


class Metrics:
    """Appends one JSON object a line and mirrors it to wandb. Only the main rank makes one.

    What the file says of steps after `step`, where the run goes on, belongs to a run that is no more: it is dropped,
    but for `dropped_digests`, of the samples of those steps.
    """

    def __init__(self, run_folder: Path, config: RunConfig, *, step: int, stage: int | None = None) -> None:
        """`stage`: what every record says, in a run of stages."""
        self._always = {} if stage is None else {"stage": stage}
        path = run_folder / "metrics.jsonl"
        dropped = keep_until(path, step)
        self.dropped_digests = {r["step"]: r["digest"] for r in dropped if r["kind"] == "train" and "digest" in r}
        self._file = path.open("a", encoding="utf-8")
        self._wandb = None
        if config.logging.wandb != "off":
            try:
                import wandb
            except ImportError:
                raise UserError("logging.wandb is on but wandb is not installed: pip install wandb") from None
            try:
                self._wandb = wandb.init(
                    project=config.logging.wandb_project,
                    name=config.name,
                    dir=str(run_folder),
                    mode=config.logging.wandb,
                    config={"yaml": dump_config(config)},
                    settings=wandb.Settings(silent=True),
                )
            except wandb.Error as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"logging.wandb: {reason}: run `wandb login`, or set logging.wandb to offline"
                ) from None

    def write(self, kind: str, step: int, **values: Any) -> None:
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **self._always, **values}) + "\n")
            self._file.flush()
        except OSError as error:  # without the name of a file: it is open
            raise UserError(
                f"{self._file.name}: cannot be written ({error.strerror}): make room; the same command goes on from "
                "the newest checkpoint"
            ) from None
        if self._wandb is not None:
            flat: dict[str, Any] = dict(self._always)
            for name, value in values.items():
                if isinstance(value, list):
                    numbers = enumerate(min(v) if isinstance(v, list) else v for v in value)  # of experts the least
                    flat |= {f"{kind}/{name}/{layer}": v for layer, v in numbers if v is not None}
                elif isinstance(value, dict):
                    flat |= {f"{kind}/{name}/{source}": v for source, v in value.items()}
                else:
                    flat[f"{kind}/{name}"] = value
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
