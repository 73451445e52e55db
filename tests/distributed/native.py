"""Jobs for ranks that save, load and compare DeepSpeed's native checkpoints with real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed.grid import LR, Case, constants_with_noise, micro_batches
from sisa_dist.engine import Engine, build_engine
from sisa_dist.parallel.mesh import Mesh, init_mesh

SAVED = 3  # steps before the save
MORE = 3  # and after a load


def save(case: Case, folder: Path) -> None:
    """Train, then write folder/own (our tensors in DCP) and folder/native."""
    engine, mesh = _engine(case)
    _train(case, engine, mesh, range(SAVED))
    dcp.save(engine.state_tensors(), checkpoint_id=folder / "own")
    assert engine.zero.save_checkpoint(str(folder / "native"))  # type: ignore[attr-defined]


def go_on(case: Case, own: Path, native: Path) -> tuple[list[Any], list[Any], list[str]]:
    """(loss, norm) of the next steps from `own` and from `native`, and the tensors that then differ on this rank."""
    ours, mesh = _engine(case)
    dcp.load(ours.state_tensors(), checkpoint_id=own)
    ours.set_step(SAVED)
    theirs, _ = _engine(case)
    loaded, client_state = theirs.zero.load_checkpoint(str(native))  # type: ignore[attr-defined]
    assert loaded is not None and "config" in client_state["sisa_dist"]
    steps = range(SAVED, SAVED + MORE)
    results = [_train(case, engine, mesh, steps) for engine in (ours, theirs)]
    a, b = ours.state_tensors(), theirs.state_tensors()
    assert a.keys() == b.keys() and len(a) >= 60
    return results[0], results[1], [name for name in a if not torch.equal(_local(a[name]), _local(b[name]))]


def _engine(case: Case) -> tuple[Engine, Mesh]:
    with constants_with_noise():
        config = case.config()
        mesh = init_mesh(config.parallel, device="cpu")
        return build_engine(config, mesh), mesh


def _train(case: Case, engine: Engine, mesh: Mesh, steps: range) -> list[Any]:
    results = [engine.train_step(micro_batches(case, step, mesh.dp_rank, mesh.dp_size), LR) for step in steps]
    return [(result.loss, result.grad_norm) for result in results]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.as_subclass(Tensor)


class Foreign(nn.Module):
    """Not our model: a tied weight, a buffer, a frozen weight, sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(7, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) * self.scale.to(self.embed.weight.dtype)
        return self.out(self.frozen(self.norm(hidden))).float().logsumexp(-1).mean()


def save_foreign(stage: int, folder: Path, dtype: str | None) -> dict[str, Tensor]:
    """Train and save a Foreign under DeepSpeed alone; its masters and moments, from DeepSpeed's own mouth."""
    mesh = init_mesh(Case("dp2", "sisa", 4, "uniform", "fp32").config().parallel, device="cpu")
    from sisa_dist.engine.deepspeed import _MPU, _import

    deepspeed = _import(mesh)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype:
        settings[dtype] = {"enabled": True} | ({"initial_scale_power": 4} if dtype == "fp16" else {})
    if (stage, dtype) == (1, "bf16"):
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # another optimizer of DeepSpeed's, with other keys
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        model = Foreign()
    decayed = [p for p in model.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) > 1]
    plain = [p for p in model.parameters() if p.requires_grad and len(getattr(p, "ds_shape", p.shape)) < 2]
    adam = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-2)
    # mpu, because these processes had others' before, and DeepSpeed remembers groups for good.
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adam, config=settings, mpu=_MPU(mesh), dist_init_required=False
    )
    for step in range(2):
        engine.backward(engine(torch.tensor([[mesh.dp_rank, step, 5]])))
        engine.step()
    if stage == 0:
        engine.save_checkpoint(str(folder))
        return {f"model.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if stage < 3:  # it links moments to names after its first group's step, and forgets the other groups'
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    truth = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            truth[f"model.{name}"] = safe_get_full_fp32_param(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                truth[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
    engine.save_checkpoint(str(folder))
    return {name: tensor.clone() for name, tensor in truth.items()}
