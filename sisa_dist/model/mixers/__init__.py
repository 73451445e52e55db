"""The mixers by the name the config gives them. A mixer takes (config, layer, attention config)."""

from torch import nn

from sisa_dist.model.mixers.attention import Attention
from sisa_dist.model.mixers.sisa import SISA

MIXERS: dict[str, type[nn.Module]] = {"sisa": SISA, "attention": Attention}

__all__ = ["MIXERS", "SISA", "Attention"]
