"""The head: from the last hidden states to logits, to the loss, or to the score of each label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sisa_dist.config import ModelConfig
from sisa_dist.model.init import Init, Normal
from sisa_dist.model.loss import IGNORE, Vocabulary, all_logits, cross_entropy_sum, score_targets


class Head(nn.Module):
    """Logits are h · Wᵀ. W is its own, or the embedding's, which the model then hands in.

    The loss is formed in here, inside the model's forward, because outside it meets sharded parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(config.vocab_size)
        if not config.tie_embeddings:
            self.init_rules: dict[str, Init] = {"weight": Normal(config.init_std)}
            self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))

    def forward(
        self, h_BTD: Tensor, weight_VD: Tensor | None, labels_BT: Tensor | None, *, per_token: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, vocab_size] fp32; with labels (loss sum, count); per token (log-probability, is-argmax)."""
        if weight_VD is None:
            weight_VD = self.weight
        weight_VD = weight_VD.to(h_BTD.dtype)
        if labels_BT is None:
            return all_logits(h_BTD, weight_VD, self.vocabulary)
        flat = (h_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), self.vocabulary)
        if per_token:
            log_prob_N, is_argmax_N = score_targets(*flat)
            return log_prob_N.view_as(labels_BT), is_argmax_N.view_as(labels_BT)
        return cross_entropy_sum(*flat), (labels_BT != IGNORE).sum()
