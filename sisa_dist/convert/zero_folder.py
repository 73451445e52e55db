"""DeepSpeed's own ZeRO checkpoints as one of the formats: what `deepspeed_read` and `deepspeed_write` do, and a place
for what DeepSpeed keeps no room for: `sisa/` beside the tag, with the run's state, data order and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from data_pipeline.tokenizer import TOKENIZER_FILES
from sisa_dist.config import ModelConfig, RunConfig, UserError, parse_config
from sisa_dist.convert.deepspeed_read import DeepSpeedSource, is_deepspeed, open_deepspeed
from sisa_dist.convert.deepspeed_write import write_deepspeed
from sisa_dist.convert.families import buffer_names
from sisa_dist.convert.opened import DATA, STATE, Opened, Target, check_beside
from sisa_dist.convert.recipe import TensorSource
from sisa_dist.convert.tensors import weights_of
from sisa_dist.parallel.plan import check_tp

HOLDS_MOMENTS, MASTERS = True, True
_BESIDE = "sisa"


def matches(path: Path) -> bool:
    return is_deepspeed(path)


def open_checkpoint(path: Path) -> Opened:
    return open_with(path, None)


def open_with(path: Path, config: RunConfig | None) -> Opened:
    """`config`: the run's, where the files do not hold it. Raises UserError where it is needed and missing."""
    source = open_deepspeed(path, model=config.model if config else None)
    if config is None:
        if source.config_text is None:
            raise UserError(f"{path}: the files do not say which model it is: give the run's file by --config")
        config = parse_config(yaml.safe_load(source.config_text), source=str(path))
    _refuse_buffers(config.model)
    files = _beside(source)
    files.setdefault(STATE, json.dumps(_beginning(source)).encode())
    return Opened(path, "deepspeed", config.model, _tensors(source, files), config=config, files=files)


def stored(path: Path) -> TensorSource:
    source = open_deepspeed(path, model=None)
    return _tensors(source, _beside(source))


def made(opened: Opened, target: Target) -> TensorSource:
    _refuse_buffers(opened.model)
    check_tp(opened.model, target.tp)
    return opened.source


def write(path: Path, opened: Opened, source: TensorSource, target: Target) -> None:
    state = opened.state()
    write_deepspeed(
        source,
        path,
        config=opened.run_config(),
        step=state["step"] - state.get("skipped", 0) - state.get("forgotten", 0),
        stage=target.zero_stage,
        dp=target.dp,
        tp=target.tp,
        progress=lambda line: None,
    )
    (path / _BESIDE).mkdir()
    for name in (DATA, *TOKENIZER_FILES):
        if name in opened.files:
            (path / _BESIDE / name).write_bytes(opened.files[name])
    (path / _BESIDE / STATE).write_text(json.dumps(state), encoding="utf-8")


def _refuse_buffers(model: ModelConfig) -> None:
    if buffer_names(model):
        raise UserError(
            "model.moe.balance is bias: its biases are no parameters, and a deepspeed checkpoint is read and written "
            "here as far as those go: convert to and from native or safetensors"
        )


def _tensors(source: DeepSpeedSource, files: dict[str, bytes]) -> TensorSource:
    # DeepSpeed has no checkpoint without moments: where there were none, zeros were written for it.
    return weights_of(source) if STATE in files and json.loads(files[STATE]).get("weights_only") else source


def _beside(source: DeepSpeedSource) -> dict[str, bytes]:
    folder = source.path.parent / _BESIDE
    names = (STATE, DATA, *TOKENIZER_FILES)
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    check_beside(files, folder)
    return files


def _beginning(source: DeepSpeedSource) -> dict[str, object]:
    """Of a checkpoint of somebody else's: how many steps it has behind it, and nothing of the data."""
    return {"step": source.step, "cursor": 0, "tokens": 0, "seconds": 0.0, "fingerprint": ""}
