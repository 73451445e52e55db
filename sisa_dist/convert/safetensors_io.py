"""Safetensors files, read and written one tensor at a time.

The library's own writer takes all tensors at once, and its reader maps the file, so that a file cut short kills the
process. The format is 8 bytes of header length, a JSON header and the data: small enough to keep both in view here.
It knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.convert.recipe import TensorSource
from sisa_dist.convert.tensors import num_bytes, raw_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own
_METADATA = "__metadata__"
_SUMS, _SUM = "sha256", "sha256_header"  # of each tensor's bytes, as JSON; of the header with 64 zeros in its place
_ZERO = "0" * 64


def is_safetensors(path: Path) -> bool:
    """By its first nine bytes, whatever its name: a header's length and the header's beginning."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _HEADER_LIMIT


class SafetensorsFile:
    """A TensorSource of one file. `metadata`: the header's free text. Opens the file anew for each read.

    Where the file has checksums, the header is compared with its own here and a tensor with its own at every read.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises UserError where the file is none, is damaged, cut short or contradicts itself."""
        self.path = path
        try:
            with path.open("rb") as file:
                text = _read_header(path, file)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): name another file") from None
        header, self._start = _parse_header(path, text), 8 + len(text)
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict):
            raise _broken(path, "its metadata is no mapping")
        self.metadata: dict[str, str] = {str(key): str(value) for key, value in metadata.items()}
        self._sums = _checked_sums(path, self.metadata, text)
        self._spans: dict[str, tuple[int, int]] = {}
        self.specs: dict[str, Tensor] = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: _extent(item[1])):
            self.specs[name], self._spans[name] = _spec(path, name, entry)
            if self._spans[name][0] != end:
                raise _broken(path, f"{name} starts at {self._spans[name][0]}, the tensor before it ends at {end}")
            end = self._spans[name][1]
        if size != self._start + end:
            raise _broken(path, f"it is {size} bytes, its header tells of {self._start + end}: it was cut short")

    def read(self, name: str) -> Tensor:
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if not tensor.numel():
            return tensor
        memory = raw_bytes(tensor)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + self._spans[name][0])
                done = 0
                while done < len(memory):  # a read gives at most 2 GiB at once
                    got = file.readinto(memory[done:])
                    if not got:
                        raise _broken(self.path, f"it ends inside {name}: it was cut short")
                    done += got
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): use another copy") from None
        if name in self._sums and hashlib.sha256(memory).hexdigest() != self._sums[name]:
            raise UserError(f"{self.path}: {name} is damaged, its bytes are not those written: use another copy")
        return tensor


class SafetensorsFiles:
    """A TensorSource of several files that share out the tensors of one model: a sharded folder."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.specs: dict[str, Tensor] = {}
        self._file: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            for name, spec in file.specs.items():
                if name in self.specs:
                    raise UserError(f"{path}: {name} is in {self._file[name].path.name} too: remove one of the files")
                self.specs[name], self._file[name] = spec, file

    @classmethod
    def of_folder(cls, folder: Path) -> SafetensorsFiles:
        """By the index, else `model.safetensors`. Raises UserError where index and files differ."""
        index = folder / INDEX
        if not index.is_file():
            return cls([folder / "model.safetensors"])
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(placed.values()))
            # A name that leads out of the folder would have us open files nobody meant.
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files of another folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error}): use another copy") from None
        found = cls(folder / name for name in names)
        for name, file in placed.items():
            if name not in found.specs or found._file[name].path.name != file:
                raise UserError(f"{index}: {name} is not in {file}: the folder is incomplete, use another copy")
        for name in found.specs:
            if name not in placed:
                raise UserError(f"{index}: does not name {name} of {found._file[name].path.name}: use another copy")
        return found

    def read(self, name: str) -> Tensor:
        return self._file[name].read(name)


INDEX = "model.safetensors.index.json"


def write_safetensors(
    path: Path,
    source: TensorSource,
    *,
    names: Sequence[str] | None = None,
    metadata: Mapping[str, str],
    checksums: bool = False,
) -> None:
    """Writes tensors of `source` (all, or `names`) into the new file `path` and syncs it. One is in memory at a time.

    `checksums`: SHA-256 of each tensor and of the header go into the metadata, about 100 bytes a tensor.
    Raises OSError where the disk does; the file is then incomplete, and the caller's to remove.
    """
    chosen = list(source.specs if names is None else names)
    # Wide types first: every tensor then starts at a multiple of its own element, as readers that map the file want.
    chosen.sort(key=lambda name: -source.specs[name].element_size())
    header: dict[str, Any] = {_METADATA: {k: v for k, v in metadata.items() if k not in (_SUMS, _SUM)}}
    sums = dict.fromkeys(chosen, _ZERO)
    if checksums:
        header[_METADATA] |= {_SUMS: json.dumps(sums), _SUM: _ZERO}
    at = 0
    for name in chosen:
        spec = source.specs[name]
        size = num_bytes(spec)
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + size]}
        at += size
    text = _header_text(header)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in chosen:
            tensor = source.read(name)
            assert tensor.is_contiguous() and num_bytes(tensor) == num_bytes(source.specs[name]), name
            memory = raw_bytes(tensor) if tensor.numel() else b""
            file.write(memory)
            if checksums:
                sums[name] = hashlib.sha256(memory).hexdigest()
            del tensor, memory
        if checksums:  # as long as the zeros that keep their place
            header[_METADATA][_SUMS] = json.dumps(sums)
            header[_METADATA][_SUM] = hashlib.sha256(_header_text(header)).hexdigest()
            file.seek(8)
            file.write(_header_text(header))
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder: Path, source: TensorSource, *, most: int) -> None:
    """Writes `source` as transformers does: files of at most `most` bytes (or one tensor) and an index."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in source.specs.items():
        size = num_bytes(spec)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    metadata = {"format": "pt"}  # transformers refuses a file without it
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", source, metadata=metadata)
        return
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, source, names=names, metadata=metadata)
        placed |= dict.fromkeys(names, file)
    total = sum(num_bytes(spec) for spec in source.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _header_text(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _checked_sums(path: Path, metadata: Mapping[str, str], text: bytes) -> dict[str, str]:
    """The checksums by tensor; none of a file that has none. Raises UserError where the header is not as written."""
    if _SUMS not in metadata and _SUM not in metadata:
        return {}
    said = metadata.get(_SUM, "")
    if len(said) != 64 or hashlib.sha256(text.replace(said.encode(), _ZERO.encode())).hexdigest() != said:
        raise UserError(f"{path}: its header is damaged, its bytes are not those written: use another copy")
    return json.loads(metadata[_SUMS])


def _read_header(path: Path, file: BinaryIO) -> bytes:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= _HEADER_LIMIT:
        raise _broken(path, "it does not start with a header")
    text = file.read(length)
    if len(text) < length:
        raise _broken(path, "it ends inside its header: it was cut short")
    return text


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no mapping")
    return header


def _extent(entry: Any) -> tuple[int, int]:
    try:
        start, stop = entry["data_offsets"]
        return int(start), int(stop)
    except (KeyError, TypeError, ValueError):
        return 0, 0  # _spec complains


def _spec(path: Path, name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]], entry["data_offsets"]
        sound = all(n >= 0 for n in shape) and start >= 0 and stop - start == math.prod(shape) * dtype.itemsize
    except KeyError as error:
        raise _broken(path, f"{name} has no {error}, or of a kind not known here") from None
    except (TypeError, ValueError) as error:
        raise _broken(path, f"{name} is not described ({error})") from None
    if not sound:
        raise _broken(path, f"{name} is of shape {shape} and lies at {start}..{stop}, which do not agree")
    return torch.empty(shape, dtype=dtype, device="meta"), (start, stop)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a whole safetensors file ({why}): use another copy")
