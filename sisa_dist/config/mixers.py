"""The mixers by name, and the blocks of the YAML under `model:` that some of them have to themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from sisa_dist.config.section import Section

MixerName = Literal["sisa", "attention", "fox", "sigmoid_sisa"]

# Each mixer, and the keys of `model:` that only some mixers read.
MIXER_NAMES: dict[str, tuple[str, ...]] = {
    "sisa": ("d_s", "log_alpha_min", "sisa", "ssmax"),
    "attention": ("ssmax",),
    "fox": ("fox",),
    "sigmoid_sisa": ("d_s", "log_alpha_min", "sisa"),
}
SECTIONS = ("ssm", "fox", "sisa", "ssmax")


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


class FoxConfig(Section):
    """The forgetting transformer's layer."""

    pro: bool = False  # norms of each head's q, k and output, shift of k and v, output gate
