"""The frequencies of RoPE stretched to longer contexts, and the temperature of attention that goes with some kinds.

The kinds, keys and results are those of transformers' modeling_rope_utils, in fp64 where theirs are fp32, because an
angle is position times frequency. `ntk` is what transformers writes as another base. dynamic and longrope go by the
length of a sequence: with packed documents by that of each document, so that what it gives is what it gives alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sisa_dist.config.rope import RopeScalingConfig


def frequencies(
    channels: int, theta: float, scaling: RopeScalingConfig | None, *, length: Tensor | int, device: torch.device
) -> Tensor:
    """Radians a token of each pair, `[channels/2]` fp64; of kinds that go by length `[*length.shape, channels/2]`.

    Without scaling theta^(−2i/channels) (Su et al. 2021). `length`: tokens of the sequence that a token is in.
    """
    exponent_P = -torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    plain_P = theta**exponent_P
    if scaling is None:
        return plain_P
    kind, factor = scaling.rope_type, scaling.factor or 1.0
    if kind == "linear":
        return plain_P / factor
    if kind == "ntk":
        return ntk_theta(theta, factor, channels) ** exponent_P
    if kind == "yarn":
        return plain_P * _kept(_yarn_kept(scaling, channels, theta, device=device), factor)
    if kind == "llama3":
        return plain_P * _kept(_llama3_kept(scaling, plain_P), factor)
    if isinstance(length, int):
        length = torch.full((), length, device=device)
    if kind == "dynamic":
        return _dynamic_theta(scaling, theta, channels, length)[..., None] ** exponent_P
    short_P, long_P = (torch.tensor(x, dtype=torch.float64, device=device) for x in _pair_factors(scaling))
    return plain_P / torch.where(length[..., None] > scaling.original_length, long_P, short_P)


def attention_factor(scaling: RopeScalingConfig | None) -> float:
    """By which the turned channels of q and of k are multiplied: the temperature of their score is 1 / its square.

    YaRN (Peng et al. 2023, arXiv 2309.00071, eq. 22): 0.1 ln factor + 1, or DeepSeek's ratio of two such. LongRoPE
    (Ding et al. 2024, arXiv 2402.13753): √(1 + ln factor / ln original length).
    """
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    stretch = math.log(scaling.factor or 1.0)
    if scaling.rope_type == "longrope":
        return math.sqrt(1 + stretch / math.log(scaling.original_length))
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (0.1 * scaling.mscale * stretch + 1) / (0.1 * scaling.mscale_all_dim * stretch + 1)
    return 0.1 * stretch + 1


def ntk_theta(theta: float, factor: float, channels: int) -> float:
    """The base at which the slowest pair is `factor` times slower and the fastest as it was (bloc97 2023)."""
    return theta * factor ** (channels / (channels - 2))


def _kept(share_P: Tensor, factor: float) -> Tensor:
    """What a frequency is multiplied by that keeps `share` of itself and has the rest divided by factor."""
    return share_P + (1 - share_P) / factor


def _dynamic_theta(scaling: RopeScalingConfig, theta: float, channels: int, length: Tensor) -> Tensor:
    """NTK's base for the length at hand: within the original length the plain one (emozilla 2023)."""
    factor, original = scaling.factor or 1.0, scaling.original_length
    stretch = factor * length.double().clamp(min=original) / original - (factor - 1)
    return theta * stretch ** (channels / (channels - 2))


def _yarn_kept(scaling: RopeScalingConfig, channels: int, theta: float, *, device: torch.device) -> Tensor:
    """1 for pairs that turn beta_fast times or more over the original length, 0 from beta_slow down, a ramp between.

    The ramp is linear in the pair's number, up to which `pair` solves theta^(−2i/channels) · original = 2π · turns.
    """

    def pair(turns: float) -> float:
        return channels * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast or 32.0), pair(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001  # as transformers has it
    ramp_P = (torch.arange(channels // 2, dtype=torch.float64, device=device) - low) / (high - low)
    return 1 - ramp_P.clamp(0, 1)


def _llama3_kept(scaling: RopeScalingConfig, plain_P: Tensor) -> Tensor:
    """The same by the turns over the original length themselves (Llama 3.1)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None
    turns_P = plain_P * (scaling.original_length / (2 * math.pi))
    return ((turns_P - low) / (high - low)).clamp(0, 1)


def _pair_factors(scaling: RopeScalingConfig) -> tuple[list[float], list[float]]:
    assert scaling.short_factor is not None and scaling.long_factor is not None
    return scaling.short_factor, scaling.long_factor
