"""Model definitions. They know nothing of parallelism, engines or data."""

from sisa_dist.model.generate import generate
from sisa_dist.model.lm import LM, build_model, num_parameters

__all__ = ["LM", "build_model", "generate", "num_parameters"]
