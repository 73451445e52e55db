"""The framework's own checkpoints as a TensorSource, and written from one, a tensor at a time.

Tensors are written in parts of at most 64 MiB, so that a rank of a large cluster later reads only what it needs.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from data_pipeline.tokenizer import TOKENIZER_FILES
from sisa_dist.checkpoint import find_checkpoint, verify, write_checkpoint
from sisa_dist.checkpoint.storage import SafeReader
from sisa_dist.checkpoint.write import reason
from sisa_dist.config import UserError, dump_config, load_config
from sisa_dist.convert.opened import CONFIG, DATA, STATE, Opened, Target
from sisa_dist.convert.recipe import TensorSource

HOLDS_MOMENTS, MASTERS = True, True
_PART_BYTES = 64 << 20


def matches(path: Path) -> bool:
    return (path / STATE).is_file() or (path / "checkpoints").is_dir()


def open_checkpoint(path: Path) -> Opened:
    """A checkpoint folder, or a run folder's newest. Raises UserError where it is damaged or lacks a tensor."""
    folder = find_checkpoint(path)
    config = load_config(folder / CONFIG)
    try:
        beside = [folder / name for name in (STATE, DATA, *TOKENIZER_FILES)]
        files = {path.name: path.read_bytes() for path in beside if path.exists()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: use another checkpoint") from None
    return Opened(
        folder,
        "native",
        config.model,
        NativeSource(folder),
        config=config,
        files=files,
        check=lambda moments: verify(folder, weights_only=not moments),
    )


class NativeSource:
    """A TensorSource of a DCP folder. Holds its table of contents; a stored part is in memory beside the tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = _Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
        self.specs: dict[str, Tensor] = {}
        for name, entry in entries.items():
            assert isinstance(entry, TensorStorageMetadata)  # SafeReader refuses all else
            self.specs[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
                dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise UserError(f"{self.folder}: {name} cannot be read ({reason(error)}): use another checkpoint") from None
        return tensor


class _Reader(SafeReader):
    """Reads the table of contents once: dcp.load asks for it at every tensor."""

    _found: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._found is None:
            self._found = super().read_metadata(*args, **kwargs)
        return self._found


def stored(path: Path) -> TensorSource:
    return NativeSource(path)


def made(opened: Opened, target: Target) -> TensorSource:
    return opened.source


def write(folder: Path, opened: Opened, source: TensorSource, target: Target) -> None:
    """`source` (under our names) and what lies beside the tensors of `opened`, into the new checkpoint `folder`."""
    files = {name: opened.files[name] for name in (DATA, *TOKENIZER_FILES) if name in opened.files}
    files[CONFIG] = dump_config(opened.run_config()).encode()
    files[STATE] = json.dumps(opened.state(), indent=1).encode()
    write_checkpoint(folder, lazy(source), files=files, no_dist=True)


def lazy(source: TensorSource) -> dict[str, Tensor]:
    """The tensors of `source` for a DCP save, each read when its turn comes and dropped when the next one's does."""
    reader = _OneAtATime(source)
    return {name: LazyTensor.of(spec, name, reader) for name, spec in source.specs.items()}


class _OneAtATime:
    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._name: str | None = None
        self._tensor: Tensor | None = None

    def read(self, name: str) -> Tensor:
        if self._name != name or self._tensor is None:
            self._tensor = None  # before the next one is read
            self._tensor, self._name = self._source.read(name), name
        return self._tensor


class LazyTensor(torch.Tensor):
    """What a DCP save takes for a tensor of `spec`; its parts are read when they are written.

    A Tensor, because DCP's planners ask for one; nothing computes with it.
    """

    spec: Tensor
    key: str
    reader: _OneAtATime

    @staticmethod
    def of(spec: Tensor, name: str, reader: _OneAtATime) -> LazyTensor:
        made = torch.Tensor._make_subclass(LazyTensor, torch.empty(0, dtype=spec.dtype))
        made.spec, made.key, made.reader = spec, name, reader
        return made

    def size(self, dim: int | None = None) -> Any:
        return self.spec.shape if dim is None else self.spec.shape[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        shape = self.spec.shape
        if not shape or not self.spec.numel():
            return [ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)]
        rows = max(1, _PART_BYTES // (math.prod(shape[1:]) * self.spec.element_size()))
        rest = [0] * (len(shape) - 1)
        return [
            ChunkStorageMetadata(
                offsets=torch.Size([start, *rest]), sizes=torch.Size([min(rows, shape[0] - start), *shape[1:]])
            )
            for start in range(0, shape[0], rows)
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.spec.dtype), size=self.spec.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        tensor = self.reader.read(self.key)
        if not index.offset:
            return tensor
        (chunk,) = (chunk for chunk in self.__create_chunk_list__() if chunk.offsets == index.offset)
        return tensor[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]
