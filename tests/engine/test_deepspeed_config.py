"""DeepSpeed's JSON comes from the run's config; a user's own keys come in beside it and never against it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.engine.deepspeed_config import deepspeed_config


def config(engine: dict[str, Any], **sections: Any) -> RunConfig:
    model = dict(vocab_size=250, d_model=64, n_layers=2, n_heads=4, d_ff=96, d_s=8)
    tree = {
        "model": model,
        "engine": {"kind": "deepspeed"} | engine,
        "schedule": {"warmup_steps": 0},
        "training": {"steps": 1, "seq_len": 64, "micro_batch_size": 2, "global_batch_tokens": 64 * 32},
    }
    return parse_config(tree | sections, source="test")


def test_batch_clipping_and_stage_are_the_runs() -> None:
    settings = deepspeed_config(config({"zero_stage": 2}), dp_size=4, cuda=False)
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 32 // (2 * 4)
    assert settings["gradient_clipping"] == 1.0
    assert settings["zero_optimization"]["stage"] == 2
    assert "bf16" not in settings and "fp16" not in settings  # masters are fp32, matrices are cast where they are used
    off = deepspeed_config(config({}, optimizer={"grad_clip": None}), dp_size=1, cuda=False)
    assert off["gradient_clipping"] == 0.0


def test_offload_goes_where_the_stage_has_something_to_offload() -> None:
    for stage, keys in (
        (1, {"offload_optimizer"}),
        (2, {"offload_optimizer"}),
        (3, {"offload_optimizer", "offload_param"}),
    ):
        zero = deepspeed_config(config({"zero_stage": stage, "cpu_offload": True}), dp_size=1, cuda=True)[
            "zero_optimization"
        ]
        assert {key for key in zero if key.startswith("offload")} == keys
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_zero_plus_plus_and_mics_keys_pass_through() -> None:
    own = {
        "zero_optimization": {
            "zero_hpz_partition_size": 8,
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
            "mics_shard_size": 4,
            "reduce_bucket_size": 5_000_000,
        },
        "comms_logger": {"enabled": True},
    }
    settings = deepspeed_config(config({"deepspeed_config": own}), dp_size=8, cuda=True)
    assert settings["zero_optimization"].items() >= own["zero_optimization"].items()
    assert settings["zero_optimization"]["stage"] == 3 and settings["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"gradient_clipping": 2.0}, r"deepspeed_config\.gradient_clipping is generated.*set optimizer\.grad_clip"),
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage is generated.*set engine\.zero_stage"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            r"offload_param is generated.*engine\.cpu_offload",
        ),
        ({"bf16": {"enabled": True}}, r"bf16 is generated from this config: remove it and set engine\.precision"),
        ({"train_batch_size": 8}, r"set training\.global_batch_tokens"),
    ],
)
def test_what_would_contradict_the_run_is_refused_by_name(own: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        deepspeed_config(config({"deepspeed_config": own}), dp_size=1, cuda=False)


@pytest.mark.parametrize("key", ["reduce_scatter", "contiguous_gradients"])
def test_what_deepspeeds_expert_groups_need_may_not_be_switched_off(key: str) -> None:
    model = dict(vocab_size=250, d_model=64, n_layers=2, n_heads=4, d_ff=96, d_s=8, mlp="moe", moe={"experts": 4})
    own = {"zero_optimization": {key: False}}
    for ep in (1, 2):
        run = config({"zero_stage": 1, "deepspeed_config": own}, model=model, parallel={"dp": 4, "ep": ep})
        refused = pytest.raises(UserError, match=f"{key} must be true with parallel.ep 2: remove it")
        with refused if ep == 2 else contextlib.nullcontext():
            deepspeed_config(run, dp_size=4, cuda=False)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "fsdp2", "zero_stage": 2}, "need engine.kind deepspeed"),
        ({"kind": "fsdp2", "deepspeed_config": {"a": 1}}, "need engine.kind deepspeed"),
        ({"prefetch": 2}, "engine.prefetch is for engine.kind fsdp2"),
        ({"reshard_after_forward": False}, "engine.reshard_after_forward is for engine.kind fsdp2"),
        ({"compile": True}, "engine.compile is for engine.kind fsdp2"),
        ({"zero_stage": 0, "cpu_offload": True}, "zero_stage 0 has nothing to offload: set it to 1, 2 or 3"),
    ],
)
def test_keys_without_effect_are_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(engine)
