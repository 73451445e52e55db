"""The mixers by name, and the blocks of the YAML under `model:` that some of them have to themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from sisa_dist.config.section import Section

MixerName = Literal["sisa", "attention", "falcon_h1", "fox", "hymba", "mamba", "mamba2", "mamba3", "sigmoid_sisa"]

# Each mixer, and the keys of `model:` that only some mixers read.
MIXER_NAMES: dict[str, tuple[str, ...]] = {
    "sisa": ("d_s", "log_alpha_min", "rope_scaling", "sisa", "ssmax"),
    "attention": ("rope_scaling", "ssmax"),
    "fox": ("fox",),
    "sigmoid_sisa": ("d_s", "log_alpha_min", "rope_scaling", "sisa"),
    "falcon_h1": ("rope_scaling", "ssm", "falcon_h1"),
    "hymba": ("rope_scaling", "ssm", "mamba", "hymba"),
    "mamba": ("ssm", "mamba"),
    "mamba2": ("ssm",),
    "mamba3": ("ssm", "mamba3"),
}
SECTIONS = ("ssm", "mamba", "mamba3", "fox", "falcon_h1", "hymba", "rope_scaling", "sisa", "ssmax")
WITH_CONV = ("mamba", "mamba2", "falcon_h1", "hymba")  # of the mixers with a state-space model
# Those whose decay is one a head of ssm.head_dim channels; without any, a channel is a head by itself.
WITH_SSM_HEADS = ("mamba2", "mamba3", "falcon_h1")
WITHOUT_HEADS = ("mamba", "mamba2", "mamba3")  # those that read neither n_heads nor n_kv_heads, only the heads of ssm


class SSMConfig(Section):
    """The state-space model of a mixer: heads of head_dim channels, each with a state [d_state, head_dim]."""

    d_state: PositiveInt = 128
    expand: PositiveFloat = 2.0  # channels = expand · d_model
    width: PositiveInt | None = None  # channels outright; None: by expand
    head_dim: PositiveInt = 64
    n_groups: PositiveInt = 1  # of heads that share B and C
    conv: NonNegativeInt = 4  # taps of the causal convolution, where the mixer has one
    chunk: PositiveInt = 64  # tokens of the training form's chunks: speed and memory, never the result


class SisaConfig(Section):
    """The controls of SISA: what of its importance term is left out, parameters and all. Without both it is λ C·B."""

    decay: bool = True  # false: log α = 0
    rotation: bool = True  # false: θ = 0


class MambaConfig(Section):
    """What is particular to the first Mamba."""

    dt_rank: PositiveInt | None = None  # of the time steps' projection; None: d_model / 16, rounded up
    norms: bool = False  # Jamba's RMSNorms on dt, B and C


class Mamba3Config(Section):
    """What is particular to Mamba-3."""

    rank: PositiveInt = 1  # inputs into and outputs of each head's state at a token; above 1: MIMO
    decay: Literal["softplus", "rational"] = "softplus"  # −A of dd_A: that of the first release, or of June 2026


class FoxConfig(Section):
    """The forgetting transformer's layer."""

    pro: bool = False  # norms of each head's q, k and output, shift of k and v, output gate


class FalconH1Config(Section):
    """Falcon-H1's layer: constants by which activations are multiplied, and where the Mamba-2's RMSNorm stands."""

    attention_in: float = 1.0  # on the input of the attention
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0  # on the input of the Mamba-2
    ssm_out: float = 1.0
    ssm_z: float = 1.0  # on what that input is projected to
    ssm_x: float = 1.0
    ssm_B: float = 1.0
    ssm_C: float = 1.0
    ssm_dt: float = 1.0
    norm: Literal["none", "before_gate", "after_gate"] = "none"


class HymbaConfig(Section):
    """Hymba's attention and the learned tokens in front of every document."""

    window: PositiveInt = 1024  # tokens a query sees, itself among them
    global_layers: list[NonNegativeInt] | None = None  # that see everything; None: the first, the middle and the last
    meta_tokens: NonNegativeInt = 128  # always visible; packed rows grow by as many a document


class MultipliersConfig(Section):
    """Constants by which activations outside the mixers are multiplied, of models that have such."""

    embedding: float = 1.0  # on what the embedding gives
    head: float = 1.0  # on the logits
    mlp_gate: float = 1.0  # of swiglu: before its silu
    mlp_down: float = 1.0  # of swiglu: on its output


# Of a section that is left out.
SECTION_DEFAULTS: dict[str, type[Section]] = {
    "ssm": SSMConfig,
    "mamba": MambaConfig,
    "mamba3": Mamba3Config,
    "fox": FoxConfig,
    "falcon_h1": FalconH1Config,
    "hymba": HymbaConfig,
    "sisa": SisaConfig,
}
