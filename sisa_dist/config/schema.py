"""The typed tree of one run: what a YAML file may say.

It checks what can be known from the file alone; what needs the world size or the data (dp, the tokenizer's
vocabulary) is checked where those are known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as _model_validator

from sisa_dist.config.data import DataConfig
from sisa_dist.config.errors import UserError
from sisa_dist.config.evaluation import EvaluationConfig
from sisa_dist.config.model import ModelConfig
from sisa_dist.config.parallel import ParallelConfig, check_context
from sisa_dist.config.section import Section


class AttentionConfig(Section):
    """How the score is computed. Changes speed and memory, never the function."""

    path: Literal["auto", "single", "bisected", "dense"] = "auto"
    leaf: PositiveInt | None = None  # tokens of a diagonal block of the bisected path; None: chosen from T
    backend: Literal[  # kernel of the softmax; auto takes the first that is present and agrees with plain products
        "auto",
        "sdpa_flash",
        "sdpa_cudnn",
        "sdpa_efficient",
        "flash_attn_2",
        "flash_attn_4",
        "cpu_flash",
        "products",
    ] = "auto"


class EngineConfig(Section):
    kind: Literal["fsdp2", "deepspeed"] = "fsdp2"
    zero_stage: Literal[0, 1, 2, 3] = 3  # deepspeed only: what data ranks share out (1 moments, 2 gradients, 3 weights)
    deepspeed_config: dict[str, Any] = Field(default_factory=dict)  # deepspeed only: its own keys, over the generated
    precision: Literal["fp32", "bf16"] = "fp32"  # of compute; master weights and moments are always fp32
    activation_checkpointing: bool = False  # a block keeps its input alone and is computed again in the backward
    activation_offload: bool = False  # with it: these inputs wait in host memory
    # Tokens of what a rank holds of a window that an MLP takes at a time, and again in the backward
    mlp_chunk: PositiveInt | None = None
    compile: bool = False  # torch.compile, one block at a time
    reshard_after_forward: bool = True  # false: gathered weights stay from forward to backward; memory for speed
    cpu_offload: bool = False  # weights, gradients and moments live in host memory, the optimizer runs there
    prefetch: NonNegativeInt = 0  # blocks gathered ahead of the one that runs; 0: FSDP2's own choice
    overlap: bool | None = None  # tp's backward collectives behind weight gradients; None: unless compile
    check_every: PositiveInt | None = None  # steps between sanity checks (engine/checks.py); None: never, at no cost

    @_model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.kind != "deepspeed" and (self.deepspeed_config or self.zero_stage != 3):
            raise ValueError("engine.zero_stage and deepspeed_config need engine.kind deepspeed: set it or remove them")
        if self.kind == "deepspeed":
            for key, neutral in (
                ("prefetch", 0),
                ("reshard_after_forward", True),
                ("overlap", None),
                ("compile", False),
            ):
                if getattr(self, key) != neutral:
                    raise ValueError(f"engine.{key} is for engine.kind fsdp2, not deepspeed: remove it")
            if self.zero_stage == 0 and self.cpu_offload:
                raise ValueError(
                    "engine.zero_stage 0 has nothing to offload: set it to 1, 2 or 3, or remove cpu_offload"
                )
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError(
                "engine.activation_offload moves what activation_checkpointing keeps: set that to true, or remove it"
            )
        if self.activation_offload and self.compile:
            raise ValueError("engine.activation_offload is not possible under engine.compile: remove one of them")
        if self.compile and self.overlap:
            raise ValueError("engine.overlap is not possible under engine.compile: remove one of them")
        return self


class OptimizerConfig(Section):
    """AdamW of sisa.md §2. λ_raw, gates, norm gains and biases are not decayed; λ_raw: lr × lambda_lr_ratio."""

    lr: PositiveFloat = 6e-4
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0.0)
    lambda_lr_ratio: float = Field(default=0.1, ge=0.0)
    # Of the gates of learned d_s, which have to come from open to closed, about 5, within their part of the run
    gate_lr_ratio: PositiveFloat = 20.0
    grad_clip: PositiveFloat | None = 1.0  # global L2 norm


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 500
    decay_steps: PositiveInt | None = None  # wsd only: length of the final linear decay
    first_step: NonNegativeInt | None = None  # steps before its warm-up; None: 0, or those before the stage of a run
    end_step: PositiveInt | None = None  # where its decay ends; None: training.steps, which is then a stage's last step
    final_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)

    @_model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.decay_steps is None:
            raise ValueError("schedule.kind wsd needs decay_steps: set it, for example to a fifth of training.steps")
        if self.kind == "cosine" and self.decay_steps is not None:
            raise ValueError("decay_steps has no effect with schedule.kind cosine: remove it or set kind: wsd")
        return self


class ProfileConfig(Section):
    """A torch.profiler trace of each rank into RUN/profile/; outside these steps it costs nothing."""

    start: PositiveInt  # the first step traced, counted as in metrics.jsonl
    steps: PositiveInt = 1


class TrainingConfig(Section):
    steps: PositiveInt
    seq_len: PositiveInt = 2048
    micro_batch_size: PositiveInt = 1  # windows of one forward on one rank
    global_batch_tokens: PositiveInt
    eval_every: PositiveInt | None = None  # steps; None: only after the last
    eval_windows: PositiveInt = 32  # validation windows of an evaluation during the run
    checkpoint_every: PositiveInt | None = None  # steps; None: only after the last
    keep_last: PositiveInt = 2  # newest checkpoints kept
    keep_every: PositiveInt | None = None  # steps: checkpoints at multiples of it are kept for good
    async_save: bool = True  # training goes on while a copy of the state, in host memory, is written
    save_staging_gb: PositiveFloat | None = None  # most a rank may copy for it; training waits for a larger one
    spike_sigma: PositiveFloat | None = (
        6.0  # skip a step whose loss or gradient norm is this far up; None: only inf, nan
    )
    max_skipped_steps: PositiveInt | None = 10  # skipped in a row before training gives up; None: it never does
    timeout_minutes: PositiveFloat = 10.0  # most a rank waits for others, or stays in one phase (a save is one)
    profile: ProfileConfig | None = None

    @property
    def global_batch_windows(self) -> int:
        return self.global_batch_tokens // self.seq_len

    @_model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        unit = self.seq_len * self.micro_batch_size
        if self.global_batch_tokens % unit:
            below = self.global_batch_tokens // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(
                f"global_batch_tokens {self.global_batch_tokens} is not a multiple of seq_len × micro_batch_size = "
                f"{unit}: set {near}"
            )
        if self.profile is not None and self.profile.start + self.profile.steps - 1 > self.steps:
            raise ValueError(
                f"profile.start {self.profile.start} + steps {self.profile.steps} reach behind training.steps "
                f"{self.steps}: lower them, or set profile to null"
            )
        return self


class StartConfig(Section):
    """What a run begins from, when its own folder holds no checkpoint yet. Neither: from initial weights."""

    resume: str | None = None  # everything: weights, moments, step and place in the data, of another run or checkpoint
    weights: str | None = None  # the weights alone: step 0, the data from its beginning, an optimizer without memory
    data: Literal["same", "continue"] = "same"  # continue: a checkpoint of another data order ends a stage of the run

    @_model_validator(mode="after")
    def _consistent(self) -> StartConfig:
        if self.resume is not None and self.weights is not None:
            raise ValueError("start.resume and start.weights are two ways to begin: remove one")
        return self


class LoggingConfig(Section):
    every: PositiveInt = 1  # steps between lines on the console; metrics.jsonl has every step
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "sisa"


def _place(folder: str) -> Path | str:
    return folder.rstrip("/") if "://" in folder else Path(folder)


class RunConfig(Section):
    """One run. `load_config` makes it from a YAML file."""

    name: str = "run"
    seed: int = Field(default=0, ge=0, lt=2**64)  # the width of a counter-based generator's key
    output_dir: str = "runs/run"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    start: StartConfig = StartConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def data_place(self) -> Path | str:
        """Of the one source, a URL as text; of a mixture the first one's, whose tokenizer is that of all."""
        if self.data.mixture is not None:
            return _place(next(iter(self.data.mixture.values())).folder)
        return _place(self.data.folder) if self.data.folder else Path(self.output_dir) / "data"

    @property
    def data_folder(self) -> Path:
        """`data_place`, for what needs a local folder, as writing does. Raises UserError where it is a URL."""
        place = self.data_place
        if isinstance(place, str):
            raise UserError(f"data.folder: {place} is a URL, which is only read: set a local folder, and copy it up")
        return place

    @_model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_schedule()
        if self.parallel.sequence_parallel and self.training.seq_len % self.parallel.tp:
            tp, seq_len = self.parallel.tp, self.training.seq_len
            raise ValueError(
                f"parallel.sequence_parallel cuts training.seq_len {seq_len} by tp {tp}, which does not divide it: set "
                f"seq_len to {max(1, seq_len // tp) * tp} or {(seq_len // tp + 1) * tp}"
            )
        if self.engine.kind == "deepspeed" and self.parallel.dp_replicate > 1:
            raise ValueError(
                "parallel.dp_replicate needs engine.kind fsdp2: under deepspeed set it to 1 and, for shards within a "
                "host, engine.deepspeed_config.zero_optimization.zero_hpz_partition_size"
            )
        self._check_experts()
        self._check_chunk()
        check_context(self.parallel, self.model, seq_len=self.training.seq_len, path=self.attention.path)
        if self.training.eval_every is not None and self.data.validation_fraction == 0:
            raise ValueError(
                "training.eval_every needs held-out text and data.validation_fraction is 0: set training.eval_every to "
                "null, or data.validation_fraction to for example 0.01"
            )
        self._check_positions()
        if self.data.member_tokens < 2:
            raise ValueError("data.member_tokens must be at least 2: set it to 16384")
        return self

    def _check_schedule(self) -> None:
        schedule, steps = self.schedule, self.training.steps
        first, end = schedule.first_step or 0, schedule.end_step or steps
        spent = schedule.warmup_steps + (schedule.decay_steps or 0)
        if first >= steps:
            raise ValueError(f"schedule.first_step {first} is not before training.steps {steps}: lower it")
        if end < steps:
            raise ValueError(
                f"schedule.end_step {end} is before training.steps {steps}: set it to {steps} or more, or remove it"
            )
        if spent > end - first:
            span = f"training.steps {steps}" if end - first == steps else f"the {end - first} steps of the schedule"
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = {spent} exceed {span}: lower them or set "
                f"training.steps to at least {first + spent}"
            )

    def _check_positions(self) -> None:
        asked = self.evaluation.positions
        if asked is None:
            return
        if asked.every is not None and self.data.mixture is None and self.data.validation_fraction == 0:
            raise ValueError(
                "evaluation.positions.every needs held-out text and data.validation_fraction is 0: set it to for "
                "example 0.01, or remove evaluation.positions"
            )
        seq_len = asked.seq_len or self.training.seq_len
        if asked.buckets > seq_len:
            raise ValueError(f"evaluation.positions.buckets {asked.buckets} exceed the {seq_len} positions: lower it")

    def _check_chunk(self) -> None:
        chunk, seq_len, parallel = self.engine.mlp_chunk, self.training.seq_len, self.parallel
        if chunk is None:
            return
        if not self.model.dense_d_ff:
            raise ValueError("engine.mlp_chunk has no effect where no layer has a dense mlp: remove it")
        held = seq_len // (parallel.cp * (parallel.tp if parallel.sequence_parallel else 1))
        if chunk >= held:
            cut = "" if held == seq_len else f", of which a rank holds {held} tokens"
            raise ValueError(f"engine.mlp_chunk {chunk} has no effect at training.seq_len {seq_len}{cut}: lower it")
        if parallel.sequence_parallel and "ssm_gated" in self.model.layer_ffns:
            raise ValueError("engine.mlp_chunk does not go with ffn ssm_gated under sequence_parallel: remove it")

    def _check_experts(self) -> None:
        ep, experts, engine = self.parallel.ep, self.model.experts, self.engine
        if ep == 1:
            return
        if not experts:
            raise ValueError(f"parallel.ep {ep} deals out experts and the model has none: set parallel.ep to 1")
        if experts % ep:
            good = [n for n in range(1, experts + 1) if experts % n == 0]
            raise ValueError(f"parallel.ep {ep} does not divide model.moe.experts {experts}: set ep to one of {good}")
        if engine.kind == "deepspeed" and engine.zero_stage not in (1, 2):
            why = "would make one average of different experts"
            if engine.zero_stage == 0:
                why = "clips by the mean of the ranks' norms, which is not the global one"
            raise ValueError(
                f"parallel.ep {ep} under deepspeed needs ZeRO-1 or 2: ZeRO-{engine.zero_stage} {why}; set "
                "engine.zero_stage to 1 or 2, engine.kind to fsdp2, or parallel.ep to 1"
            )
