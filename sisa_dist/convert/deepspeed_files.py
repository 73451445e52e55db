"""The files of DeepSpeed's native checkpoints: their names, and opening them without running what they say.

They are pickles that name DeepSpeed's classes. Those names are an explicit list and stand for inert ones here, so
reading needs no DeepSpeed and nothing of a file runs. What the tensors in them mean is said elsewhere.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sisa_dist.config import UserError


class _Inert:
    """Stands for an object of another library: takes any state, does nothing."""

    def __init__(self, *_: Any) -> None: ...


_INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "argparse.Namespace",  # arguments of a training script, often in client_state
)
_SAFE: list[Any] = [(_Inert, name) for name in _INERT]
_SAFE.append((int, "deepspeed.runtime.zero.config.ZeroStageEnum"))

# Bytes of mapped files touched before the mappings are let go: they count as this process's memory.
_MAPPED = 1 << 30


def model_file(stage: int, *, dp_rank: int, tp_rank: int) -> str:
    prefix = f"zero_pp_rank_{dp_rank}_" if stage == 3 else ""
    return f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt"


def optimizer_file(*, dp_rank: int, tp_rank: int) -> str:
    return f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"


def find_tag_folder(path: Path) -> Path | None:
    """The folder with the files: `path`, or the one that `path`/latest names. None where there is neither."""
    if path.is_dir() and any(path.glob("*mp_rank_*_model_states.pt")):
        return path
    if not (path / "latest").is_file():
        return None
    try:
        folder = path / (path / "latest").read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}/latest: does not name a folder: give the folder of one step") from None
    return folder if folder.is_dir() and any(folder.glob("*mp_rank_*_model_states.pt")) else None


class Files:
    """Opens files of one folder as headers with mapped tensors, and lets the mappings go from time to time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()
        self._touched = 0

    def header(self, name: str) -> dict[str, Any]:
        """The file's content; tensors are mapped, not read. Raises UserError where that is not possible."""
        if name not in self._open:
            self._open[name] = self._load(self.folder / name)
        return self._open[name]

    def verify(self, name: str) -> None:
        """Compare every byte with the checksums that `torch.save` left, once a file. It reads the whole file."""
        if name not in self._verified:
            with _one_line(self.folder / name), zipfile.ZipFile(self.folder / name) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise UserError(f"{self.folder / name}: damaged, the checksum of {bad} differs: use another checkpoint")
            self._verified.add(name)

    def touched(self, numbytes: int) -> None:
        """Say what was read. Tensors of headers taken before are good only until then."""
        self._touched += numbytes
        if self._touched > _MAPPED:
            self._open.clear()
            self._touched = 0

    def _load(self, path: Path) -> dict[str, Any]:
        with _one_line(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith("/data.pkl"):
                        archive.read(entry)  # compares its checksum
            with torch.serialization.safe_globals(_SAFE):
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a {type(content).__name__}, not what DeepSpeed writes")
        return content


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns what torch, zipfile and the file system raise on `path` into a UserError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing: copy every rank's files, or use another checkpoint") from None
    except Exception as error:
        unsafe = _unsafe(path)
        if unsafe:
            raise UserError(
                f"{path}: holds objects of {', '.join(unsafe)}, which are not unpickled because that could run code: "
                "save again without them in client_state"
            ) from None
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read ({first}): use another checkpoint") from error


def _unsafe(path: Path) -> list[str]:
    """Names in the pickle that are not on the list; none where not even that can be told."""
    with torch.serialization.safe_globals(_SAFE):
        try:
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            return []


@contextlib.contextmanager
def as_deepspeed_writes(files: Files, name: str) -> Iterator[None]:
    """Turns a key or an entry that `name` lacks into a UserError."""
    try:
        yield
    except (KeyError, IndexError) as error:
        raise UserError(f"{files.folder / name}: has no {error.args[0]}: not of a kind that is read here") from error
