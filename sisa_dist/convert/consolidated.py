"""A whole checkpoint as one safetensors file: weights, moments if wanted, config, state and tokenizer.

The header's metadata holds `sisa_format` (a version), `config.yaml`, `state.json` and `data.json` as text; the
tokenizer's files are uint8 tensors of their names (`tokenizer.model`, or `tokenizer.json` and
`tokenizer_config.json`). So the file needs nothing beside it. SHA-256 of the header and of each tensor are in the
metadata too, and are compared at every read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor

from data_pipeline.tokenizer import TOKENIZER_FILES
from sisa_dist.config import UserError, dump_config, parse_config
from sisa_dist.convert.opened import CONFIG, DATA, STATE, Opened, Target
from sisa_dist.convert.recipe import TensorSource
from sisa_dist.convert.safetensors_io import SafetensorsFile, is_safetensors, write_safetensors
from sisa_dist.convert.tensors import Selected, With

HOLDS_MOMENTS, MASTERS = True, False
VERSION = "1"  # raise it with any change that an older reader would misread
_KEY = "sisa_format"


def matches(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".safetensors" or is_safetensors(path))


def open_checkpoint(path: Path) -> Opened:
    """Raises UserError where the file is damaged, not one of these, or of a newer version."""
    file = SafetensorsFile(path)
    version = file.metadata.get(_KEY)
    if version is None:
        raise UserError(f"{path}: weights without a config: name the folder it came in")
    if version != VERSION:
        raise UserError(f"{path}: {_KEY} {version}, this version reads {VERSION}: use the version that wrote it")
    try:
        tree = yaml.safe_load(file.metadata[CONFIG])
    except (KeyError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its {CONFIG} cannot be read ({type(error).__name__}): use another copy") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: its {CONFIG} is no mapping: use another copy")
    config = parse_config(tree, source=f"{path}: {CONFIG}")
    files = {name: file.metadata[name].encode() for name in (STATE, DATA) if name in file.metadata}
    for name in TOKENIZER_FILES:
        if name in file.specs:
            spec = file.specs[name]
            if spec.dtype != torch.uint8:
                kind = str(spec.dtype).removeprefix("torch.")
                raise UserError(f"{path}: its {name} is {kind}, not the uint8 of a file's bytes: use another copy")
            files[name] = file.read(name).numpy().tobytes()
    source = _tensors(file)
    return Opened(path, "safetensors", config.model, source, config=config, files=files)


def stored(path: Path) -> TensorSource:
    return _tensors(SafetensorsFile(path))


def _tensors(file: SafetensorsFile) -> TensorSource:
    return Selected(file, (name for name in file.specs if name not in TOKENIZER_FILES))


def made(opened: Opened, target: Target) -> TensorSource:
    return opened.source


def write(path: Path, opened: Opened, source: TensorSource, target: Target) -> None:
    """`source` (under our names) and what lies beside the tensors of `opened`, into the new file `path`."""
    metadata = {
        "format": "pt",
        _KEY: VERSION,
        CONFIG: dump_config(opened.run_config()),
        STATE: json.dumps(opened.state()),
    }
    if DATA in opened.files:
        metadata[DATA] = opened.files[DATA].decode()
    small: dict[str, Tensor] = {
        name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for name, content in opened.tokenizer_files.items()
    }
    write_safetensors(path, With(source, small), metadata=metadata, checksums=True)
