"""Checkpoints in PyTorch DCP: full parameter names → global tensors, whatever the engine and the world size.

A checkpoint is a folder `step_00000300` with the tensors, `config.yaml`, `tokenizer.model` and `state.json` (step,
data cursor and fingerprint). It is written as `.step_00000300.tmp` and renamed last, so a kill at any moment leaves
only whole ones; what a kill left behind is removed by the next save.
"""

from sisa_dist.checkpoint.folder import find_checkpoint, list_checkpoints, run_folder_of
from sisa_dist.checkpoint.load import load_checkpoint, load_model
from sisa_dist.checkpoint.save import save_checkpoint
from sisa_dist.checkpoint.state import TrainState, read_state

__all__ = [
    "TrainState",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "read_state",
    "run_folder_of",
    "save_checkpoint",
]
