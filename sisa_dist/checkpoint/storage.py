"""PyTorch's checkpoint files, written one tensor at a time with their hashes, and read without running a pickle.

The format is DCP's own: its FileSystemReader reads what HashingWriter writes. Each rank writes weights_RANK.distcp and
moments_RANK.distcp, so that whoever wants the weights alone reads, hashes and copies a third.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sisa_dist.checkpoint.manifest import Damaged, FileEntry, read_manifest

METADATA = ".metadata"  # DCP's: which part of which tensor lies where
_WEIGHTS, _MOMENTS = "weights", "moments"


def holds_weights(file_name: str) -> bool:
    """Is it a file that weights alone need?"""
    return not file_name.startswith(_MOMENTS)


@dataclass(frozen=True)
class _Written(WriteResult):
    file: str = ""
    entry: FileEntry | None = None  # of the whole file; results travel to the coordinator, and the hashes with them


class HashingWriter(FileSystemWriter):
    """Writes into `folder`, which it makes. On the coordinator, when every rank is done, it calls `finish(files)`.

    One tensor is in memory beside the state itself: PyTorch's own writer keeps each file's until the file is done.
    An error on any rank, or in `begin` or `finish`, is raised by `dcp.save` on all.
    """

    def __init__(
        self, folder: Path, *, begin: Callable[[], None], finish: Callable[[Mapping[str, FileEntry]], None]
    ) -> None:
        super().__init__(folder)
        self._folder, self._begin, self._finish = folder, begin, finish

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the coordinator makes the folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin()
        self._folder.mkdir()
        return super().prepare_global_plan(plans)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # PyTorch's would hold this machine's path and a random id

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert plan.storage_data is not None
        rank = plan.storage_data.prefix.strip("_")
        kinds: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            kinds.setdefault(_WEIGHTS if item.index.fqn.startswith("model.") else _MOMENTS, []).append(item)
        results: list[WriteResult] = []
        for kind, items in kinds.items():
            results += _write_file(self._folder, f"{kind}_{rank}.distcp", items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        files = {r.file: r.entry for rank in results for r in rank if isinstance(r, _Written) and r.entry is not None}
        self._finish(files)


def _write_file(folder: Path, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    spans: list[tuple[WriteItem, int, int]] = []
    with (folder / name).open("wb") as raw:
        stream = _Hashing(raw)
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), f"{item.index.fqn}: a checkpoint holds tensors"
            tensor = tensor.detach().cpu()
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                tensor = tensor.clone()  # torch.save would write the whole storage a view lies in
            start = stream.size
            try:
                torch.save(tensor, stream)  # type: ignore[arg-type]
            except RuntimeError:  # its writer, closed half-way, hides why the write failed
                if stream.error is not None:
                    raise stream.error from None
                raise
            spans.append((item, start, stream.size - start))
        raw.flush()
        os.fsync(raw.fileno())
    entry = FileEntry(stream.size, stream.digest.hexdigest())
    return [
        _Written(index=item.index, size_in_bytes=n, storage_data=_StorageInfo(name, at, n), file=name, entry=entry)
        for item, at, n in spans
    ]


class _Hashing:
    """A file as torch.save wants it, hashed on its way."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.raw.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self.raw.flush()


class SafeReader(FileSystemReader):
    """Reads tensors only. DCP keeps its table of contents as a pickle: here it may name DCP's own classes alone.

    One stored part is in memory at a time, and it is read once, however many pieces of it are wanted: PyTorch's own
    loop reads it for each, and holds the one before as well.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                found = _TableOfContents(file).load()
        except OSError as error:
            raise Damaged(f"{path}: {error.strerror}: use another checkpoint") from None
        except Exception as error:  # a damaged pickle raises anything
            raise Damaged(f"{path}: not a table of tensors ({error}): use another checkpoint") from None
        entries = getattr(found, "state_dict_metadata", None)
        if not isinstance(found, Metadata) or not isinstance(entries, dict):
            raise Damaged(f"{path}: not a table of tensors: use another checkpoint")
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):  # DCP would unpickle it
                raise Damaged(f"{path}: {name} is not a tensor: use another checkpoint")
        listed = read_manifest(Path(self.path))
        for info in found.storage_data.values():
            if info.relative_path not in listed:
                raise Damaged(f"{path}: {info.relative_path!r} is not in the manifest: use another checkpoint")
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, dict[int, list[ReadItem]]] = {}  # by name, then by where in the file a part begins
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            files.setdefault(stored.relative_path, {}).setdefault(stored.offset, []).append(item)
        for name, parts in files.items():
            with (Path(self.path) / name).open("rb") as file:
                for offset in sorted(parts):
                    self._read_part(file, parts[offset], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_part(self, file: IO[bytes], items: list[ReadItem], planner: LoadPlanner) -> None:
        view = self._slice_file(file, self.storage_data[items[0].storage_index])
        try:
            part = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except pickle.UnpicklingError:  # its own words are how to switch the protection off
            part = None
        if not isinstance(part, Tensor):
            name = Path(file.name).name
            raise Damaged(f"{name} holds something else than tensors, which is not unpickled: that could run code")
        for item in items:
            target = planner.resolve_tensor(item).detach()
            cut = (slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
            target.copy_(part[tuple(cut)])
            planner.commit_tensor(item, target)


class _TableOfContents(pickle.Unpickler):
    _ALLOWED = frozenset(
        (metadata.__name__, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ) | {
        (_StorageInfo.__module__, _StorageInfo.__name__),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
