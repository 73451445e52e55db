"""Under bf16 both engines compute in the same dtypes: at block boundaries, in matmuls and norms, and in the score."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.grid import TOKENS, Case, constants_with_noise, micro_batches
from distributed.pool import run_job
from sisa_dist.engine import build_engine, shard
from sisa_dist.model.rope import rope_tables
from sisa_dist.parallel.mesh import init_mesh

BASE = Case("dp2", "sisa", 2, "heterogeneous", "bf16", qk_norm=True)
# Where numbers are made; casts, copies and collectives are the engines' own.
OPS = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.softplus",
    "aten.silu",
    "aten.gelu",
    "aten.rsqrt",
    "aten.native_layer_norm",
    "sisa_dist.bisected",
)


class _Dtypes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name in OPS:
            dtypes = [str(a.dtype) for a in args if isinstance(a, torch.Tensor)]
            # ZeRO-3 has a linear function of its own, which adds a bias after the product.
            self.seen.add(("aten.mm", *dtypes[1:]) if name == "aten.addmm" else (name, *dtypes))
        return func(*args, **(kwargs or {}))


def _dtypes(case: Case) -> dict[str, Any]:
    """Of one forward: ops with the dtypes of their inputs, and of each small module the dtypes it sees."""
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    with constants_with_noise():
        engine: Any = build_engine(config, mesh)
    borders: dict[str, tuple[str, str]] = {}
    parameters: dict[str, tuple[str, bool]] = {}

    def hook(name: str) -> Any:
        def see(module: Any, arguments: Any, output: Any) -> None:
            first = next((a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()), None)
            borders[name] = (str(getattr(first, "dtype", None)), str(getattr(output, "dtype", None)))
            if getattr(module, "fp32_in_forward", False):
                for leaf, value in module._parameters.items():
                    exact = bool((value.bfloat16().float() != value.float()).any())
                    parameters[f"{name}.{leaf}"] = (str(value.dtype), exact)

        return see

    for name, module in engine.model.named_modules():
        if name and (name.count(".") == 1 or getattr(module, "fp32_in_forward", False)):
            module.register_forward_hook(hook(name))
    with _Dtypes() as dtypes:
        engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)
    return {"ops": dtypes.seen, "borders": borders, "parameters": parameters}


@pytest.fixture(scope="module")
def under_fsdp2() -> dict[str, Any]:
    return run_job(2, _dtypes, BASE)[0]


def test_fsdp2_computes_in_bf16_and_keeps_the_small_things_exact(under_fsdp2: dict[str, Any]) -> None:
    assert under_fsdp2["borders"]["blocks.0"] == ("torch.bfloat16", "torch.bfloat16")
    assert {dtype for dtype, _ in under_fsdp2["parameters"].values()} == {"torch.float32"}
    # Values that bf16 would have rounded arrived unrounded, so they were never cast on the way.
    assert all(exact for name, (_, exact) in under_fsdp2["parameters"].items() if not name.endswith("decay.bias"))
    kinds = {key[0]: set(key[1:]) for key in under_fsdp2["ops"] if key[0] == "aten.silu"}
    assert kinds == {"aten.silu": {"torch.bfloat16"}}
    assert {key for key in under_fsdp2["ops"] if key[0] == "aten.rsqrt"} == {("aten.rsqrt", "torch.float32")}
    assert sum("bisected" in key[0] for key in under_fsdp2["ops"]) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_computes_in_the_same_dtypes(under_fsdp2: dict[str, Any], stage: int) -> None:
    case = dataclasses.replace(BASE, engine=(("kind", "deepspeed"), ("zero_stage", stage)))
    _same(run_job(2, _dtypes, case)[0], under_fsdp2)


@pytest.mark.parametrize("stage", [2, 3])
def test_layer_norms_and_biases_too(stage: int) -> None:
    case = dataclasses.replace(BASE, style="neox")
    want = run_job(2, _dtypes, case)[0]
    assert want["parameters"]["blocks.0.norm1.bias"] == ("torch.float32", True)
    zero = dataclasses.replace(case, engine=(("kind", "deepspeed"), ("zero_stage", stage)))
    _same(run_job(2, _dtypes, zero)[0], want)


def _tables(case: Case, *, cast: bool = False) -> set[tuple[str, bool]]:
    """RoPE's tables as every mixer gets them in one step: their dtype, and whether they are exact. `cast`: by
    FSDP2's default, a block of bf16 weights has all it is given cast."""
    config, real = case.config(), shard.MixedPrecisionPolicy
    mesh = init_mesh(config.parallel, device="cpu")

    def policy(**options: Any) -> Any:
        return real(**{**options, "cast_forward_inputs": cast and options["param_dtype"] == torch.bfloat16})

    with constants_with_noise(), mock.patch.object(shard, "MixedPrecisionPolicy", policy):
        engine: Any = build_engine(config, mesh)
    seen: set[tuple[str, bool]] = set()
    wanted = rope_tables(
        *(0, TOKENS),
        channels=config.model.rotary_channels,
        theta=config.model.rope_theta,
        scaling=config.model.rope_scaling,
        device=torch.device("cpu"),
    )
    assert all((table.bfloat16().float() != table).any() for table in wanted)

    def see(module: Any, arguments: Any) -> None:
        for table, exact in zip(arguments[1], wanted, strict=True):
            seen.add((str(table.dtype), torch.equal(table.float(), exact)))

    for block in engine.model.blocks:
        block.mixer.register_forward_pre_hook(see)
    engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)
    return seen


@pytest.mark.parametrize("style", ["yarn", "dynamic"])
def test_ropes_tables_stay_fp32_under_every_engine(style: str) -> None:
    case = dataclasses.replace(BASE, style=style)
    assert run_job(2, _tables, case)[0] == {("torch.float32", True)}
    assert run_job(2, _tables, case, cast=True)[0] == {("torch.bfloat16", False)}  # what would be seen
    for stage in (1, 3):
        zero = dataclasses.replace(case, engine=(("kind", "deepspeed"), ("zero_stage", stage)))
        assert run_job(2, _tables, zero)[0] == {("torch.float32", True)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_c_meets_the_gate_in_bf16(stage: int) -> None:
    case = dataclasses.replace(BASE, style="ssm_gated")
    want = run_job(2, _dtypes, case)[0]
    assert ("aten.bmm", "torch.bfloat16", "torch.bfloat16") in want["ops"]
    zero = dataclasses.replace(case, engine=(("kind", "deepspeed"), ("zero_stage", stage)))
    _same(run_job(2, _dtypes, zero)[0], want)


def _same(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found["borders"] == want["borders"]
    assert found["parameters"] == want["parameters"]
    assert found["ops"] == want["ops"]
