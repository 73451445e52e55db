"""The mixers by the name the config gives them."""

from sisa_dist.model.mixers.attention import Attention
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.falcon_h1 import FalconH1
from sisa_dist.model.mixers.fox import FoX
from sisa_dist.model.mixers.hymba import Hymba
from sisa_dist.model.mixers.mamba import Mamba
from sisa_dist.model.mixers.mamba2 import Mamba2
from sisa_dist.model.mixers.mamba3 import Mamba3
from sisa_dist.model.mixers.sigmoid_sisa import SigmoidSISA
from sisa_dist.model.mixers.sisa import SISA

MIXERS: dict[str, type[Mixer]] = {
    "sisa": SISA,
    "attention": Attention,
    "fox": FoX,
    "falcon_h1": FalconH1,
    "hymba": Hymba,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "sigmoid_sisa": SigmoidSISA,
}

__all__ = [
    "MIXERS",
    "SISA",
    "Attention",
    "Cache",
    "FalconH1",
    "FoX",
    "Hymba",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Mixer",
    "SigmoidSISA",
]
