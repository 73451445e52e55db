"""DeepSpeed's JSON from the run's config. A pure function: nothing here needs DeepSpeed installed.

A user's own keys come in under `engine.deepspeed_config` and are laid over ours; one that would contradict the run's
config is refused by name, because then two places would say one thing.
"""

from __future__ import annotations

from typing import Any

from sisa_dist.config import RunConfig, UserError

# What we set ourselves, and the key of ours that a user should change instead.
_OURS = {
    "train_batch_size": "training.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_tokens",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "pipeline": "parallel",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.cpu_offload",
    "zero_optimization.offload_param": "engine.cpu_offload",
}


def deepspeed_config(config: RunConfig, *, dp_size: int, cuda: bool) -> dict[str, Any]:
    """The dict for `deepspeed.initialize` on `dp_size` data ranks, with GPUs or without.

    Raises UserError where `engine.deepspeed_config` says what the run's own config says.
    """
    training, engine = config.training, config.engine
    stage = engine.zero_stage
    # DeepSpeed's own bucket of 5e8 elements is 2 GB of fp32 whatever the model; this is 200 MB.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000}
    if stage in (1, 2):
        # Tensors are reduced as they come; contiguous copies would double the gradients' memory on a small model.
        zero |= {"contiguous_gradients": True, "overlap_comm": cuda, "round_robin_gradients": False}
    if stage == 3:
        zero |= {"overlap_comm": cuda, "stage3_gather_16bit_weights_on_model_save": False}
    if engine.cpu_offload:
        place = {"device": "cpu", "pin_memory": cuda}
        zero["offload_optimizer"] = place
        if stage == 3:
            zero["offload_param"] = place
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        # At least 1: an evaluation may be on more ranks than the batch has windows; training's loader refuses that.
        "gradient_accumulation_steps": max(1, training.global_batch_windows // (training.micro_batch_size * dp_size)),
        "gradient_clipping": config.optimizer.grad_clip or 0.0,
        "zero_optimization": zero,
        # The optimizer is torch's AdamW, the same under both engines.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    _check(engine.deepspeed_config, "")
    merged = _merge(settings, engine.deepspeed_config)
    for key in ("reduce_scatter", "contiguous_gradients"):
        if config.parallel.ep > 1 and not merged["zero_optimization"].get(key, True):
            raise UserError(
                f"engine.deepspeed_config.zero_optimization.{key} must be true with parallel.ep {config.parallel.ep}: "
                "remove it, or set parallel.ep to 1"
            )
    return merged


def _check(tree: dict[str, Any], prefix: str) -> None:
    for key, value in tree.items():
        dotted = prefix + key
        if dotted in _OURS:
            raise UserError(
                f"engine.deepspeed_config.{dotted} is generated from this config: remove it and set {_OURS[dotted]}"
            )
        if isinstance(value, dict):
            _check(value, dotted + ".")


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        mine = merged.get(key)
        merged[key] = _merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged
