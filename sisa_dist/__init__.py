"""Pretraining of SISA language models (SSM-informed softmax attention, arXiv 2606.02332)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sisa_dist.checkpoint import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Late, so that `import sisa_dist` costs nothing and `sisa --help` does not wait for torch.
    if name == "load_model":
        from sisa_dist.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'sisa_dist' has no attribute {name!r}")
