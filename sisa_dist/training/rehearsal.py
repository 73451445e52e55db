"""One training step on tensors without memory, to learn what a rank would hold and when.

The run's own model, its own plan and FSDP2 itself run on fake tensors over a process group that only pretends, so
there is no second description of the model to keep true: what the blocks save for their backward, what FSDP2 gathers
and what our operators take is what really is saved, gathered and taken. Rank 0 is played, which holds the most.
DeepSpeed does not run so; for it the model is played alone, and zero.py adds the engine's part.

What it does not know: workspaces inside PyTorch's kernels, an allocator's fragments, and other devices' kernels (the
score is played as the CPU computes it).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.testing._internal.distributed.fake_pg import FakeStore

from sisa_dist.config import RunConfig
from sisa_dist.engine.common import spare_memory
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.engine.experts import ExpertWatch
from sisa_dist.engine.guard import Guard
from sisa_dist.engine.norm import clip_gradients, global_norm
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.engine.shard import shard
from sisa_dist.model import LM, build_model, memory
from sisa_dist.model import block as blocks
from sisa_dist.parallel.apply import Slice, apply_plan
from sisa_dist.parallel.mesh import Mesh, init_mesh
from sisa_dist.training.memory_meter import MemoryMeter
from sisa_dist.training.traffic_meter import TrafficMeter
from sisa_dist.training.work_meter import WorkMeter
from sisa_dist.training.zero_gathers import Use

FIRST = "first micro-batch, "
NEXT = "next micro-batch"


@contextmanager
def pretended_mesh(config: RunConfig, world_size: int) -> Iterator[Mesh]:
    """Rank 0's mesh of a launch of `world_size` processes that do not exist; its collectives do nothing.

    Raises UserError where the parallel block does not fit `world_size`. Not inside a real launch.
    """
    assert not dist.is_initialized(), "a pretended process group cannot stand beside a real one"
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            yield init_mesh(config.parallel, device="cpu")
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Rehearsed:
    """What meters saw of a step."""

    memory: MemoryMeter
    traffic: TrafficMeter
    work: WorkMeter
    from_host: list[int]  # bytes of weights that FSDP2's CPU offload copies to the device
    uses: list[Use]  # of weights, in the last forward; where ZeRO-3 will gather them


def rehearse_step(config: RunConfig, mesh: Mesh) -> Rehearsed:
    """One train_step of `config` on rank 0 of a pretended mesh.

    Moments: `embedding`, `forward of layer 3`, `loss`, `backward of layer 3`, `optimizer step`. Of several
    micro-batches the first, with `FIRST` before its moments and `NEXT` after them, and the last are played; traffic and
    work of the first count for those between too, which send the same; that they also add their
    gradients to what is there, estimate.py counts.
    `engine.compile` is played without compiling; an attention backend asked for by name as `auto`. Sanity checks
    (engine.check_every) are not played.
    """
    seen = Rehearsed(MemoryMeter(), TrafficMeter(mesh), WorkMeter(), [], [])
    with FakeTensorMode(), ExitStack() as stack:
        model, optimizer, slices = _build(config, mesh)
        meter, training = seen.memory, config.training
        tokens = torch.zeros(training.micro_batch_size, training.seq_len, dtype=torch.int64)
        doc_ids = torch.zeros_like(tokens) if config.data.document_mask else None
        rounds = training.global_batch_windows // (training.micro_batch_size * mesh.dp_size)
        guard, experts = Guard(mesh, spike_sigma=training.spike_sigma), ExpertWatch(model, mesh)
        stack.enter_context(seen.traffic)
        count = mesh.sum_over_dp(torch.zeros((), dtype=torch.int64))
        stack.enter_context(seen.work)
        stack.enter_context(_second_forwards(seen.work))
        on_host = stack.enter_context(_pretended_host())
        stack.enter_context(_offloaded_gathers(seen))
        with meter:
            meter.mark(model.parameters(), "states")
            meter.mark((tensor for state in optimizer.state.values() for tensor in state.values()), "states")
            prefix = _name_moments(model, meter)
            if config.engine.kind == "deepspeed" and config.engine.zero_stage == 3:
                _note_uses(model, seen.uses)
            model.reset_statistics()
            loss_sum = torch.zeros(())
            for last in [False, True] if rounds > 1 else [True]:  # the last holds most: all that was summed before
                prefix[0] = "" if last else FIRST
                seen.uses.clear()
                seen.traffic.times = seen.work.times = 1 if last else rounds - 1
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                loss, _ = model(tokens, tokens, doc_ids_BT=doc_ids)
                (loss * 1.0).backward()
                loss_sum += loss.detach()
                del loss
                meter.on_host = sum(on_host)
                on_host.clear()
                if not last:
                    meter.begin(NEXT)
            seen.work.optimizer = True
            named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
            meter.mark((p.grad for _, p in named), "gradients")  # type: ignore[misc]
            if config.engine.kind == "fsdp2":
                meter.begin("optimizer step")
                norm = _optimize(config, optimizer, named, slices, mesh)
        if config.engine.kind == "deepspeed":
            norm = torch.zeros(())
            if config.engine.zero_stage == 0:  # ours, of whole gradients; any other stage's is DeepSpeed's own
                norm = global_norm([(p.grad, slices[name]) for name, p in named], mesh, sharded=False)  # type: ignore
        loss_mean = mesh.sum_over_reduced(loss_sum) / count
        experts.after_step(guard.judge(loss_mean, norm).skip)
    return seen


def _optimize(
    config: RunConfig,
    optimizer: torch.optim.Optimizer,
    named: list[tuple[str, nn.Parameter]],
    slices: dict[str, Slice],
    mesh: Mesh,
) -> Tensor:
    norm = global_norm([(p.grad, slices[name]) for name, p in named], mesh)  # type: ignore[misc]
    if config.optimizer.grad_clip is not None:
        clip_gradients([p for _, p in named], config.optimizer.grad_clip, norm)
    optimizer.step()
    return norm


@contextmanager
def _offloaded_gathers(seen: Rehearsed) -> Iterator[None]:
    """FSDP2 asks each parameter for what it puts into a gather; offloaded ones are copied then, as fp32."""
    real = vars(FSDPParam)["all_gather_inputs"].fget

    def all_gather_inputs(parameter: FSDPParam) -> list[Tensor]:
        if parameter.offload_to_cpu:
            seen.from_host.append(seen.work.times * parameter._sharded_param_data.nbytes)
        return real(parameter)

    with mock.patch.object(FSDPParam, "all_gather_inputs", property(all_gather_inputs)):
        yield


def _note_uses(model: LM, uses: list[Use]) -> None:
    """Hooks that note which module's weights are used when. A tied head uses the embedding's, and so does the model,
    which hands it over: DeepSpeed counts what a module reads of another's as its own."""
    tied = not list(model.head.parameters())

    def noting(use: Use) -> Any:
        def hook(*_: Any) -> None:
            if torch._C._current_graph_task_id() == -1:
                uses.append(use)

        return hook

    for prefix, module in model.named_modules():
        names = tuple(f"{prefix}.{name}" for name, p in module._parameters.items() if p is not None)
        names = ("embed.weight",) if tied and module in (model.head, model) else names
        module.register_forward_pre_hook(noting(Use(True, prefix, names)))
        module.register_forward_hook(noting(Use(False, prefix, names)))


@contextmanager
def _second_forwards(work: WorkMeter) -> Iterator[None]:
    """What checkpoints do again in the backward is told to the meter."""
    told = functools.partial(torch.utils.checkpoint.checkpoint, context_fn=work.checkpoint_contexts)
    with mock.patch.object(blocks, "checkpoint", told), mock.patch.object(memory, "checkpoint", told):
        yield


@contextmanager
def _pretended_host() -> Iterator[list[int]]:
    """Bytes of each copy to host memory (engine.activation_offload); none is made, and new tensors come back."""
    copied: list[int] = []

    def to_host(x: Tensor) -> Any:
        if not x.is_floating_point():
            return x
        copied.append(x.nbytes)
        return x.shape, x.dtype

    def from_host(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    with mock.patch.object(memory, "to_host", to_host), mock.patch.object(memory, "from_host", from_host):
        yield copied


def _build(config: RunConfig, mesh: Mesh) -> tuple[LM, torch.optim.Optimizer, dict[str, Slice]]:
    """As the engine builds, without values; for DeepSpeed the model alone, with whole weights and no moments."""
    engine, attention = config.engine, config.attention.model_copy(update={"backend": "auto"})
    deepspeed = engine.kind == "deepspeed"
    with torch.device("meta"):
        model = build_model(config.model, attention=attention)
    slices = apply_plan(model, mesh, overlap=engine.overlap is not False and not engine.compile and not deepspeed)
    spare_memory(model, engine)
    if deepspeed and engine.precision == "bf16":
        compute_in(model, torch.bfloat16)
    if not deepspeed and (mesh.world_size > 1 or engine.precision == "bf16" or engine.cpu_offload):
        shard(model, mesh, engine)
        model.to_empty(device="cpu")
    else:
        _to_empty(model)
    apart = {name for name, part in slices.items() if part.ep_dim is not None}
    return model, build_optimizer(model, config.optimizer, moments=not deepspeed, apart=apart), slices


def _to_empty(model: nn.Module) -> None:
    """`Module.to_empty` swaps tensors, which plain fake parameters refuse."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _name_moments(model: LM, meter: MemoryMeter) -> list[str]:
    """Hooks that begin the meter's moments; what stands in the list's one place goes before their names."""
    prefix = [""]

    def begin(moment: str) -> None:
        meter.mark((p.grad for p in model.parameters() if p.grad is not None), "gradients")
        meter.begin(prefix[0] + moment)

    def before(name: str) -> Any:
        return lambda module, arguments: begin(f"forward of {name}")

    def after(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output  # experts say how they routed, behind it
            first.register_hook(lambda grad: begin(f"backward of {name}"))

        return hook

    # Ahead of FSDP2's own hooks: what it gathers for a layer belongs to the layer.
    model.register_forward_pre_hook(lambda module, arguments: begin("embedding"), prepend=True)
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(before(f"layer {number}"), prepend=True)
        block.register_forward_hook(after(f"layer {number}"))
    model.head.register_forward_pre_hook(lambda module, arguments: begin("loss"), prepend=True)
    return prefix
