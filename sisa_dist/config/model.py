"""The `model:` block: the architecture and nothing else.

Beside `schema.py` because checkpoints of other models are read into it and written from it without a run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic import model_validator as _model_validator

from sisa_dist.config.experts import ExpertsConfig
from sisa_dist.config.learned import LearnedDsConfig
from sisa_dist.config.mixers import (
    MIXER_NAMES,
    SECTIONS,
    WITH_CONV,
    WITH_SSM_HEADS,
    WITHOUT_HEADS,
    FalconH1Config,
    FoxConfig,
    HymbaConfig,
    Mamba3Config,
    MambaConfig,
    MixerName,
    MultipliersConfig,
    SisaConfig,
    SSMConfig,
)
from sisa_dist.config.rope import RopeScalingConfig
from sisa_dist.config.section import Section

MLPName = Literal["swiglu", "gelu", "moe", "none"]
FFNName = Literal["sequential", "parallel", "ssm_gated"]


def _form_of_d_s(value: Any) -> str:
    """So that an error is told of the form that was written, and not of each there is."""
    return "learned_d_s" if isinstance(value, dict | LearnedDsConfig) else "list" if isinstance(value, list) else "int"


DsConfig = Annotated[
    Annotated[NonNegativeInt, Tag("int")]
    | Annotated[list[NonNegativeInt], Tag("list")]
    | Annotated[LearnedDsConfig, Tag("learned_d_s")],
    Discriminator(_form_of_d_s),
]


class ModelConfig(Section):
    """The architecture. Two checkpoints with the same ModelConfig have the same parameter names and shapes."""

    vocab_size: PositiveInt
    vocab_multiple: PositiveInt = 128  # the embedding is padded to a multiple of it once, whatever the layout
    d_model: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt  # of attention; without effect where every mixer has only the heads of ssm
    n_kv_heads: PositiveInt | None = None  # None: n_heads
    head_dim: PositiveInt | None = None  # None: d_model / n_heads
    d_ff: NonNegativeInt = 0  # without effect where no layer has an MLP
    mixer: MixerName | list[MixerName] = "sisa"  # one, or one per layer
    d_s: DsConfig | None = None  # SSM channels per head: one, one per layer (0: no SSM), or learned
    log_alpha_min: float | None = None  # declared bound: log α is clamped to it, in nats/token
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScalingConfig | None = None  # None: every frequency as rope_theta has it
    rotary_fraction: float = Field(default=1.0, ge=0.0, le=1.0)  # of a head's channels, from the first: these turn
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # of the residual stream
    norm_eps: PositiveFloat = 1e-6
    qk_norm: bool = False  # RMSNorm over the channels of each head's q and k, before RoPE
    attention_bias: Literal["none", "qkv", "all"] = "none"  # of the projections to q, k and v; all: and of W_O
    # One, or one per layer. gelu is the exact one, by erf; moe: see `moe`; none: a block is its mixer alone
    mlp: MLPName | list[MLPName] = "swiglu"
    mlp_bias: bool = False
    # One, or one per layer: how the MLP stands to the mixer. sequential: behind it, with a norm of its own; parallel:
    # beside it, one norm for both; ssm_gated: beside it, and the mixer's C_t is added to the gate (model/ssm_gated.py)
    ffn: FFNName | list[FFNName] = "sequential"
    parallel_residual: bool = False  # mixer and MLP read one input, each through its norm, and are added to it together
    tie_embeddings: bool = True
    init_std: PositiveFloat = 0.02
    moe: ExpertsConfig | None = None  # of the layers whose mlp is moe
    ssm: SSMConfig | None = None  # of the mixers that hold a state-space model; None: its defaults
    sisa: SisaConfig | None = None  # of the mixers with sisa's score; None: its defaults
    # Tokens of a training sequence: with it scores are scaled by s · log n (SSMax, Nakanishi 2025), n the number of
    # tokens a query sees, s learned per head, at first 1 / mean log n over the sequence
    ssmax: int | None = Field(default=None, ge=2)
    mamba: MambaConfig | None = None  # None: its defaults
    mamba3: Mamba3Config | None = None  # None: its defaults
    fox: FoxConfig | None = None  # of the mixer fox; None: its defaults
    falcon_h1: FalconH1Config | None = None  # None: its defaults
    hymba: HymbaConfig | None = None  # None: its defaults
    multipliers: MultipliersConfig | None = None  # None: all 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: behind the vocabulary lie the meta tokens', then padding."""
        return -(-(self.vocab_size + self.meta_tokens) // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def width_per_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that RoPE turns, rounded down as transformers does."""
        return int(self.width_per_head * self.rotary_fraction)

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias != "none"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias == "all"

    @property
    def layer_mixers(self) -> list[str]:
        return [self.mixer] * self.n_layers if isinstance(self.mixer, str) else list(self.mixer)

    @property
    def layer_mlps(self) -> list[str]:
        return [self.mlp] * self.n_layers if isinstance(self.mlp, str) else list(self.mlp)

    @property
    def experts(self) -> int:
        """Of every layer with a mixture of them; 0 where there is none."""
        return self.moe.experts if self.moe else 0

    @property
    def expert_d_ff(self) -> int:
        """Channels inside one expert; 0 where there is none."""
        return (self.moe.d_ff or self.d_ff) if self.moe else 0

    @property
    def shared_d_ff(self) -> int:
        """Channels inside the shared experts together; 0 where there are none."""
        return self.moe.shared * self.expert_d_ff if self.moe else 0

    @property
    def dense_d_ff(self) -> int:
        """Channels inside the MLP of the layers that have one for all tokens; 0 where no layer has."""
        return 0 if set(self.layer_mlps) <= {"moe", "none"} else self.d_ff

    @property
    def layer_ffns(self) -> list[str]:
        return [self.ffn] * self.n_layers if isinstance(self.ffn, str) else list(self.ffn)

    @property
    def ssm_heads(self) -> int:
        """Of every layer with a state-space model; 0 where there is none."""
        return self.ssm_width // self.ssm_head_dim

    @property
    def ssm_head_dim(self) -> int:
        """Channels of a head of the state-space model: 1 where no layer's mixer has such heads."""
        return self.state_space.head_dim if _any_in(self, WITH_SSM_HEADS) else 1

    @property
    def ssm_width(self) -> int:
        """Channels of the state-space model, all heads together; 0 where no layer has one."""
        if not uses(self, "ssm"):
            return 0
        return self.state_space.width or round(self.state_space.expand * self.d_model)

    @property
    def ssm_groups(self) -> int:
        """Of heads that share B and C; 0 where no layer has a state-space model."""
        return self.state_space.n_groups if uses(self, "ssm") else 0

    @property
    def state_space(self) -> SSMConfig:
        return self.ssm or SSMConfig()

    @property
    def score_terms(self) -> SisaConfig:
        """What sisa's importance term is made of."""
        return self.sisa or SisaConfig()

    @property
    def dealt(self) -> dict[str, int]:
        """What tensor parallelism deals out, and what this model has of it."""
        heads = any(mixer not in WITHOUT_HEADS for mixer in self.layer_mixers)
        found = {"n_heads": self.n_heads, "kv_heads": self.kv_heads} if heads else {}
        found |= {"d_ff": self.dense_d_ff, "experts": self.experts, "shared_d_ff": self.shared_d_ff}
        found |= {"padded_vocab_size": self.padded_vocab_size}
        found |= {"meta_tokens": self.meta_tokens, "ssm_heads": self.ssm_heads, "ssm_groups": self.ssm_groups}
        return {over: size for over, size in found.items() if size}

    @property
    def mamba_options(self) -> MambaConfig:
        return self.mamba or MambaConfig()

    @property
    def dt_rank(self) -> int:
        """Of the first Mamba's time steps."""
        return self.mamba_options.dt_rank or -(-self.d_model // 16)

    @property
    def falcon_h1_options(self) -> FalconH1Config:
        return self.falcon_h1 or FalconH1Config()

    @property
    def hymba_options(self) -> HymbaConfig:
        return self.hymba or HymbaConfig()

    @property
    def meta_tokens(self) -> int:
        """Learned tokens in front of every document; 0 where no layer's mixer is hymba."""
        return self.hymba_options.meta_tokens if uses(self, "hymba") else 0

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of a hymba layer sees; None: all before it."""
        said = self.hymba_options.global_layers
        everywhere = [0, self.n_layers // 2, self.n_layers - 1] if said is None else said
        return None if layer in everywhere else self.hymba_options.window

    @property
    def multiplier_options(self) -> MultipliersConfig:
        return self.multipliers or MultipliersConfig()

    @property
    def mamba3_options(self) -> Mamba3Config:
        return self.mamba3 or Mamba3Config()

    @property
    def learned_d_s(self) -> LearnedDsConfig | None:
        return self.d_s if isinstance(self.d_s, LearnedDsConfig) else None

    @property
    def layer_d_s(self) -> list[int]:
        """SSM channels per head of every layer; 0 where the mixer has none. Learned ones: those that are there."""
        if isinstance(self.d_s, list):
            return list(self.d_s)
        d_s = self.d_s.max if isinstance(self.d_s, LearnedDsConfig) else self.d_s
        return [(d_s or 0) if "d_s" in MIXER_NAMES[mixer] else 0 for mixer in self.layer_mixers]

    @_model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            near = " or ".join(str(n) for n in (below, below + self.n_heads) if n)
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}: set d_model to {near}, or set "
                "head_dim"
            )
        if self.width_per_head % 2:
            raise ValueError(f"head_dim {self.width_per_head} is odd and RoPE turns pairs: set an even head_dim")
        if self.rotary_channels % 2 or (self.rotary_fraction and not self.rotary_channels):
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of head_dim {self.width_per_head} is {self.rotary_channels} "
                f"channels and RoPE turns pairs: set it for example to {2 / self.width_per_head:g} or 1.0"
            )
        if self.rope_scaling is not None and uses(self, "rope_scaling"):
            self.rope_scaling.check_channels(self.rotary_channels, self.rope_theta)
        if self.n_heads % self.kv_heads:
            good = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ValueError(f"n_kv_heads {self.kv_heads} does not divide n_heads {self.n_heads}: set one of {good}")
        if len(self.layer_mixers) != self.n_layers:
            raise ValueError(
                f"mixer lists {len(self.layer_mixers)} layers, n_layers is {self.n_layers}: make them equal"
            )
        if isinstance(self.d_s, list) and len(self.d_s) != self.n_layers:
            raise ValueError(f"d_s lists {len(self.d_s)} layers, n_layers is {self.n_layers}: make them equal")
        if len(self.layer_mlps) != self.n_layers:
            raise ValueError(f"mlp lists {len(self.layer_mlps)} layers, n_layers is {self.n_layers}: make them equal")
        if ("moe" in self.layer_mlps) != (self.moe is not None):
            raise ValueError("mlp moe and the section moe belong together: set both, or remove one")
        if self.moe is not None and self.mlp_bias:
            raise ValueError("mlp_bias is set and experts have no biases: set it to false")
        if self.moe is not None and self.moe.d_ff is not None and not self.dense_d_ff:
            raise ValueError("no layer has a dense mlp, so d_ff is the experts': set it, and remove moe.d_ff")
        for key in SECTIONS:
            if getattr(self, key) is not None and not uses(self, key):
                raise ValueError(f"{key} is set but no layer's mixer reads it: remove {key}")
        if not self.d_ff and any(mlp != "none" for mlp in self.layer_mlps):
            raise ValueError(f"d_ff is missing and layers have an MLP: set d_ff, for example {4 * self.d_model}")
        if "hymba" in self.layer_mixers and self.attention_bias == "all":
            raise ValueError("attention_bias all is of W_O too, and hymba's has none: set it to qkv or none")
        if set(self.layer_mixers) <= set(WITHOUT_HEADS):
            for key in ("qk_norm", "attention_bias", "rope_theta"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is of attention, and no layer has any: remove {key}")
        if self.meta_tokens and self.moe is not None:
            # Those that fill up a row depend on the other rows of its batch, and a router would count them.
            raise ValueError(
                "moe beside hymba's meta tokens would be balanced by what layout a run has: set "
                "hymba.meta_tokens to 0, or mlp to swiglu"
            )
        if uses(self, "ssm") and not self.ssm_width:
            raise ValueError(
                f"ssm.expand {self.state_space.expand} of d_model {self.d_model} gives no channel: set for example 2.0"
            )
        if self.ssm_width % self.ssm_head_dim:
            raise ValueError(
                f"ssm: {self.ssm_width} channels are not a multiple of its head_dim {self.state_space.head_dim}: set "
                "ssm.width or ssm.head_dim so that they are"
            )
        if self.ssm_groups and self.ssm_heads % self.ssm_groups:
            good = [n for n in range(1, self.ssm_heads + 1) if self.ssm_heads % n == 0]
            raise ValueError(
                f"ssm.n_groups {self.ssm_groups} does not divide {self.ssm_heads} heads: set one of {good}"
            )
        by = self.multiplier_options
        if (by.mlp_gate, by.mlp_down) != (1.0, 1.0) and "swiglu" not in self.layer_mlps:
            raise ValueError("multipliers.mlp_gate and mlp_down are of swiglu, and no layer has one: remove them")
        if "hymba" in self.layer_mixers and self.ssm_width % self.n_heads:
            raise ValueError(
                f"hymba: {self.ssm_width} channels of ssm are no multiple of n_heads {self.n_heads}, whose values they "
                "are: set ssm.width or ssm.expand so that they are"
            )
        beyond = [layer for layer in self.hymba_options.global_layers or [] if layer >= self.n_layers]
        if beyond:
            raise ValueError(f"hymba.global_layers has layer {beyond[0]}, n_layers is {self.n_layers}: remove it")
        for mixer in WITH_CONV:
            if mixer in self.layer_mixers and not self.state_space.conv:
                raise ValueError(f"ssm.conv is 0 and {mixer} has a convolution: set its taps, for example 4")
        if self.state_space.conv != SSMConfig().conv and not _any_in(self, WITH_CONV):
            raise ValueError(f"ssm.conv {self.state_space.conv} is set and mamba3 has no convolution: remove it")
        for key in ("head_dim", "n_groups"):
            if getattr(self.state_space, key) != getattr(SSMConfig(), key) and not _any_in(self, WITH_SSM_HEADS):
                raise ValueError(f"ssm.{key} is set and mamba has neither heads nor groups: remove it")
        if "mamba3" in self.layer_mixers and self.state_space.d_state % 4:
            even = -(-self.state_space.d_state // 4) * 4
            raise ValueError(f"mamba3 turns half of ssm.d_state {self.state_space.d_state} in pairs: set {even}")
        for key in ("d_s", "log_alpha_min"):
            if getattr(self, key) is not None and not uses(self, key):
                raise ValueError(f"{key} is set but no layer's mixer is sisa: remove {key}")
        if self.log_alpha_min is not None and not self.score_terms.decay:
            raise ValueError("log_alpha_min bounds a decay that sisa.decay false takes out: remove one of them")
        if self.d_s is None and uses(self, "d_s"):
            raise ValueError("d_s is missing and a layer's mixer is sisa: set d_s, for example 32")
        for layer, (mixer, d_s) in enumerate(zip(self.layer_mixers, self.layer_d_s, strict=True)):
            has_d_s = "d_s" in MIXER_NAMES[mixer]
            if has_d_s and (d_s < 2 or d_s % 2):
                raise ValueError(f"d_s of layer {layer} is {d_s}: channels turn in pairs, set an even number from 2")
            if not has_d_s and d_s:
                raise ValueError(f"d_s of layer {layer} is {d_s} but its mixer is {mixer}: set 0 there")
        if self.log_alpha_min is not None and not self.log_alpha_min < 0:
            raise ValueError(f"log_alpha_min {self.log_alpha_min} is not negative: set for example -1.0, or null")
        return self

    @_model_validator(mode="after")
    def _ffn_fits(self) -> ModelConfig:
        if len(self.layer_ffns) != self.n_layers:
            raise ValueError(f"ffn lists {len(self.layer_ffns)} layers, n_layers is {self.n_layers}: make them equal")
        if self.parallel_residual and set(self.layer_ffns) != {"sequential"}:
            raise ValueError("parallel_residual gives mixer and MLP a norm each, ffn one for both: remove one of them")
        for layer, (ffn, mlp, mixer) in enumerate(
            zip(self.layer_ffns, self.layer_mlps, self.layer_mixers, strict=True)
        ):
            if ffn != "sequential" and mlp == "none":
                raise ValueError(f"ffn of layer {layer} is {ffn} but its mlp is none: set ffn to sequential there")
            if ffn != "ssm_gated":
                continue
            if mlp != "swiglu":
                raise ValueError(f"ffn of layer {layer} is ssm_gated but its mlp {mlp} has no gate: set mlp to swiglu")
            if self.learned_d_s:
                raise ValueError(
                    f"ffn of layer {layer} is ssm_gated, which reads C of every channel, and d_s is learned: set ffn "
                    "to parallel there, or d_s to a number"
                )
            if "d_s" not in MIXER_NAMES[mixer]:
                givers = " or ".join(name for name, keys in MIXER_NAMES.items() if "d_s" in keys)
                raise ValueError(
                    f"ffn of layer {layer} is ssm_gated but its mixer {mixer} has no C: set ffn to parallel there, or "
                    f"mixer to {givers}"
                )
            if self.d_ff % self.n_heads:
                below = self.d_ff // self.n_heads * self.n_heads
                near = " or ".join(str(n) for n in (below, below + self.n_heads) if n)
                raise ValueError(
                    f"d_ff {self.d_ff} is not a multiple of n_heads {self.n_heads} and ffn ssm_gated gives each head "
                    f"its slice: set d_ff to {near}"
                )
        return self


def _any_in(model: ModelConfig, mixers: tuple[str, ...]) -> bool:
    return any(mixer in mixers for mixer in model.layer_mixers)


def uses(model: ModelConfig, key: str) -> bool:
    """Whether some layer's mixer reads `key`, one of those that not all do."""
    return any(key in MIXER_NAMES[mixer] for mixer in model.layer_mixers)
