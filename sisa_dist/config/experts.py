"""The `model.moe:` block: mixtures of experts in the layers whose `mlp` is `moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as _model_validator

from sisa_dist.config.section import Section

# Keys that leave the names and shapes of parameters, and the function of the weights, as they are.
TRAINING_KEYS = ("backend", "balance_weight", "bias_rate", "z_loss")


class ExpertsConfig(Section):
    """Each token goes to `top_k` of `experts` SwiGLUs, none is dropped, and to the shared ones besides."""

    experts: PositiveInt
    top_k: PositiveInt = 2
    d_ff: PositiveInt | None = None  # of each expert; None: model.d_ff
    shared: NonNegativeInt = 0  # experts that every token goes to: one SwiGLU of shared · d_ff channels
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits
    normalise_top_k: bool = True  # the weights of a token's experts sum to 1
    balance: Literal["loss", "bias", "none"] = "loss"  # bias: of the choice alone, moved after each step, no gradient
    balance_weight: PositiveFloat | None = None  # of the loss, a layer; None: 0.01
    bias_rate: PositiveFloat | None = None  # by which the bias moves in a step; None: 0.001
    z_loss: float = Field(default=0.0, ge=0.0)  # weight of the squared log-sum-exp of the router's logits, a layer
    backend: Literal["auto", "torch", "megablocks"] = "auto"  # of the experts' products: speed, never the function

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Of the balance loss and of the z-loss."""
        return (self.balance_weight or 0.01) if self.balance == "loss" else 0.0, self.z_loss

    @property
    def rate(self) -> float:
        return self.bias_rate or 0.001

    @_model_validator(mode="after")
    def _consistent(self) -> ExpertsConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}: set it to at most {self.experts}")
        if self.top_k == 1 and self.normalise_top_k and self.experts > 1:
            raise ValueError(
                "a token's only weight would always be 1 and the router not learn: set normalise_top_k: false"
            )
        for key, wanted in (("balance_weight", "loss"), ("bias_rate", "bias")):
            if getattr(self, key) is not None and self.balance != wanted:
                raise ValueError(f"{key} has no effect with balance {self.balance}: remove it or set balance: {wanted}")
        return self
