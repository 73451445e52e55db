"""The checkpoints of a run folder: their names, which are whole, and which is the newest. Opens no tensor."""

from __future__ import annotations

import re
from pathlib import Path

from sisa_dist.checkpoint.manifest import NAME as MANIFEST
from sisa_dist.config import UserError

_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it counts no more; nothing of it is deleted."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
    return checkpoint.rename(aside)


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (_NAME.fullmatch(path.name) and path.is_dir()):
        return path
    found = list_checkpoints(path)
    if not found and _is_foreign(path):
        raise UserError(
            f"{path}: a checkpoint of another format: python tools/convert_checkpoint.py {path} NEW --to native makes "
            "one of ours"
        )
    if not found:
        raise UserError(f"{path}: no checkpoint here; give a run folder or one of its checkpoints/step_… folders")
    return found[-1]


def _is_foreign(path: Path) -> bool:
    """By names alone: a safetensors file, a folder of transformers' or one of DeepSpeed's."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any(any(path.glob(name)) for name in ("config.json", "latest", "*_model_states.pt"))


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder a checkpoint lies in; of one that lies in none, as a converted one, its own folder."""
    if checkpoint.parent.name != "checkpoints":  # named from inside: ".", or "step_00000300" alone
        checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
