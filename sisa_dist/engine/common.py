"""What both engines do alike round a step: labels, results, padding, layer statistics, and what blocks keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipeline.loader import Batch
from sisa_dist.config import EngineConfig
from sisa_dist.engine.base import StepResult
from sisa_dist.engine.guard import Verdict
from sisa_dist.model import LM
from sisa_dist.model.loss import IGNORE
from sisa_dist.parallel.mesh import Mesh


def spare_memory(model: LM, engine: EngineConfig) -> None:
    """What the blocks keep for their backward, as the config says."""
    for block in model.blocks:
        block.activation_checkpointing = engine.activation_checkpointing  # type: ignore[assignment]
        block.activation_offload = engine.activation_offload  # type: ignore[assignment]
        block.mlp_chunk = engine.mlp_chunk  # type: ignore[assignment]


def count_labels(micro_batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """Labels that count in the whole global batch; int64 scalar on `mesh.device`. Collective.

    Where none does (all its shards are missing) the mean loss is not a number, and the guard skips the step.
    """
    count = torch.tensor(sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches))
    return mesh.sum_over_dp(count.to(mesh.device))


def move(tensor: Tensor | None, mesh: Mesh) -> Tensor | None:
    """To the mesh's device; on a GPU through pinned memory, so that the copy does not wait for the step before."""
    if tensor is None or mesh.device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(mesh.device, non_blocking=True)


def read_result(loss: Tensor, grad_norm: Tensor, count: Tensor, verdict: Verdict) -> StepResult:
    """Scalars of the whole batch as a StepResult: the one copy from the device, and the one wait for it, of a step."""
    scalars = (loss, grad_norm, count, verdict.skip, verdict.stop)
    values = torch.stack([scalar.double() for scalar in scalars]).tolist()
    return StepResult(values[0], values[1], int(values[2]), skipped=bool(values[3]), stop=bool(values[4]))


def pad_sequence(
    tokens_BT: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batch with T a multiple of what context and sequence parallelism cut it by.

    Padding stands behind every real token, so none sees it, and its labels do not count.
    """
    tp = mesh.tp_size if mesh.sequence_parallel else 1
    unit = tp if mesh.cp_size == 1 else mesh.cp_size * math.lcm(2, tp)
    padding = -tokens_BT.shape[1] % unit
    if not padding:
        return tokens_BT, labels_BT, doc_ids_BT
    if doc_ids_BT is not None:
        doc_ids_BT = torch.cat((doc_ids_BT, doc_ids_BT[:, -1:].expand(-1, padding)), 1)
    return F.pad(tokens_BT, (0, padding)), F.pad(labels_BT, (0, padding), value=IGNORE), doc_ids_BT


def score_batch(
    forward: Callable[..., tuple[Tensor, Tensor]],
    tokens_BT: Tensor,
    labels_BT: Tensor,
    doc_ids_BT: Tensor | None,
    mesh: Mesh,
) -> tuple[Tensor, Tensor]:
    """`Engine.score` by `forward`, an engine's call of the model: padded, moved, without gradients, on the CPU."""
    length = tokens_BT.shape[1]
    tokens_BT, labels_BT, doc_ids_BT = pad_sequence(tokens_BT, labels_BT, doc_ids_BT, mesh)
    inputs = move(tokens_BT, mesh), move(labels_BT, mesh)
    with torch.no_grad():
        log_prob_BT, is_argmax_BT = forward(*inputs, doc_ids_BT=move(doc_ids_BT, mesh), per_token=True)
    return log_prob_BT[:, :length].cpu(), is_argmax_BT[:, :length].cpu()


def layer_statistics(model: LM, mesh: Mesh) -> dict[str, list[float | None]]:
    """`Engine.layer_statistics`. Means over heads and tokens: every tp rank has as many heads, every data rank as
    many tokens. Collective."""
    found = model.statistics()
    means = [
        _full(layer[key]).double().mean().to(mesh.device)
        for key in ("lambda", "mean_log_alpha")
        for layer in found
        if key in layer
    ]
    if means:
        total = mesh.sum_over(torch.stack(means), "tp", "dp_shard", "dp_replicate") / mesh.world_size
        means = list(total.unbind())
    values = iter(means)
    lambdas = [next(values).item() if "lambda" in layer else None for layer in found]
    half_lives = [
        math.log(2) / max(-next(values).item(), 1e-30) if "mean_log_alpha" in layer else None for layer in found
    ]
    return {"lambda": lambdas, "half_life": half_lives}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
