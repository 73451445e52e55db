"""Checkpoints in PyTorch DCP: full parameter names → global tensors, whatever the engine and the world size.

A checkpoint is a folder `step_00000300` with the tensors (fp32 weights, both moments), `config.yaml`, the
tokenizer's files, `state.json` (step, cursor), `data.json` (what the cursor counts in) and `manifest.json` (sizes and
SHA-256). It is written as `.step_00000300.tmp`, synced, hashed and renamed last, so a kill at any moment leaves only
whole ones; what a kill left behind is removed by the next save.
"""

from sisa_dist.checkpoint.folder import find_checkpoint, list_checkpoints, run_folder_of
from sisa_dist.checkpoint.load import load_checkpoint, load_model, load_tokenizer, load_weights, read_tensors, verify
from sisa_dist.checkpoint.manifest import Damaged
from sisa_dist.checkpoint.save import Saved, Saver
from sisa_dist.checkpoint.state import TrainState, parse_state, read_state
from sisa_dist.checkpoint.write import write_checkpoint

__all__ = [
    "Damaged",
    "Saved",
    "Saver",
    "TrainState",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "parse_state",
    "read_state",
    "read_tensors",
    "run_folder_of",
    "verify",
    "write_checkpoint",
]
