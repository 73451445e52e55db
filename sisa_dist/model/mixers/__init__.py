"""The mixers by the name the config gives them."""

from sisa_dist.model.mixers.attention import Attention
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.fox import FoX
from sisa_dist.model.mixers.sigmoid_sisa import SigmoidSISA
from sisa_dist.model.mixers.sisa import SISA

MIXERS: dict[str, type[Mixer]] = {"sisa": SISA, "attention": Attention, "fox": FoX, "sigmoid_sisa": SigmoidSISA}

__all__ = ["MIXERS", "SISA", "Attention", "Cache", "FoX", "Mixer", "SigmoidSISA"]
