"""The language model: embedding, blocks, final norm, head. It knows nothing of how it is split or stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.block import Block
from sisa_dist.model.gates import Gates
from sisa_dist.model.head import Head
from sisa_dist.model.init import init_parameters
from sisa_dist.model.loss import IGNORE
from sisa_dist.model.meta import at_tokens, refuse_new_documents, spread_labels, with_meta_tokens
from sisa_dist.model.mixers import Cache
from sisa_dist.model.norm import residual_norm
from sisa_dist.model.placement import Placement
from sisa_dist.model.rope import RopeTables, rope_tables
from sisa_dist.model.scale import scaled


@dataclass
class RoutingSums:
    """What mixtures of experts did with the batches since it was reset: one row for each layer that has one."""

    counts_LE: Tensor  # int64, tokens that chose each expert
    losses_L2: Tensor  # balance loss and z-loss, unweighted, each window's as often as it has labels that count
    labels: Tensor  # labels that counted


class LM(nn.Module):
    """Decoder-only language model over token ids.

    forward(tokens, labels) → (loss sum, count); what routers and the gates of a learned d_s cost is in the gradient of
    the sum, not in its value;
    forward(tokens, labels, per_token=True) → (log-probability, is-argmax) of each label;
    forward(tokens) → logits [B, T, vocab_size] fp32 (padding columns cut off), or of the last position only.
    """

    def __init__(self, config: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer, attention) for layer in range(config.n_layers))
        self.gates = Gates(config) if config.learned_d_s else None
        self.norm = residual_norm(config)
        self.head = Head(config)
        self.placement = Placement()
        self.routed: RoutingSums | None = None  # of forwards with labels that have gradients

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        doc_ids_BT: Tensor | None = None,
        per_token: bool = False,
        cache: list[Cache] | None = None,
        last_only: bool = False,
        total_length: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens, labels [B, T] int64 (label −100 does not count); doc_ids [B, T] non-decreasing or None.

        Documents do not see each other, and positions count from the first token of each. With a cache the ids go on
        from those of the tokens it holds, and are given at every call or at none. `total_length`: tokens the cache will
        hold in the end, where that is known. RoPE scaling that goes by length then has one set of frequencies from the
        first token on; else each chunk has those of the tokens so far, while cached keys keep theirs, as transformers.
        """
        config, by = self.config, self.config.multiplier_options
        start = cache[0].length if cache else 0
        if config.meta_tokens and cache and start:
            refuse_new_documents(cache[0].documents(doc_ids_BT), start)
        if config.meta_tokens and not start:
            prefixed = with_meta_tokens(tokens_BT, doc_ids_BT, count=config.meta_tokens, first_id=config.vocab_size)
            tokens_BT, doc_ids_BT = prefixed.tokens, prefixed.doc_ids
            labels_BT = labels_BT if labels_BT is None else spread_labels(labels_BT, prefixed, ignore=IGNORE)
        else:
            prefixed = None
        own = self.placement
        h_BTD = scaled(self.embed(own.own(tokens_BT)), by.embedding)
        labels_BT = labels_BT if labels_BT is None else own.own(labels_BT)
        rope = rope_tables(
            start,
            tokens_BT.shape[1],
            channels=config.rotary_channels,
            theta=config.rope_theta,
            device=tokens_BT.device,
            doc_ids_BT=cache[0].documents(doc_ids_BT) if cache else doc_ids_BT,
            scaling=config.rope_scaling,
            total_length=None if total_length is None else total_length + config.meta_tokens,
        )
        rope = RopeTables(*(own.own(table, dim=table.ndim - 2) for table in rope))
        gate_of: dict[int, Tensor] = {}
        gate_cost = None
        if self.gates is not None:
            z_LP, gate_cost = self.gates()
            gate_of = dict(zip(self.gates.layers, z_LP, strict=True))
        routings: list[tuple[Tensor, Tensor]] = []
        for layer, block in enumerate(self.blocks):
            h_BTD = block(h_BTD, rope, doc_ids_BT, cache[layer] if cache else None, gate_of.get(layer))
            if isinstance(h_BTD, tuple):
                h_BTD, *routing = h_BTD
                routings.append(tuple(routing))
        if last_only:
            assert type(own) is Placement, "the window's last position is on one rank of those that cut it"
            h_BTD = h_BTD[:, -1:]
        weight_VD = self.embed.weight if config.tie_embeddings else None
        found = self.head(scaled(self.norm(h_BTD), by.head), weight_VD, labels_BT, per_token=per_token)
        if labels_BT is not None and not per_token:
            return self._with_costs(found, routings, gate_cost, labels_BT)
        found = own.whole(found) if isinstance(found, Tensor) else (own.whole(found[0]), own.whole(found[1]))
        if prefixed is None or last_only:
            return found
        if isinstance(found, Tensor):
            return at_tokens(found, prefixed)
        return at_tokens(found[0], prefixed), at_tokens(found[1], prefixed)

    def _with_costs(
        self,
        found: tuple[Tensor, Tensor],
        routings: list[tuple[Tensor, Tensor]],
        gate_cost: Tensor | None,
        labels_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss keeps its value and gets the gradient of what routing and gates cost besides. What gates cost counts
        as often as labels do, so that a step's mean over labels has it once, on any ranks and micro-batches."""
        extras = [] if gate_cost is None else [gate_cost * (labels_BT != IGNORE).sum()]
        if routings:
            extras.append(self._routing_loss(routings, labels_BT))
        for extra in extras:
            found = found[0] + (extra - extra.detach()), found[1]
        return found

    def _routing_loss(self, routings: list[tuple[Tensor, Tensor]], labels_BT: Tensor) -> Tensor:
        """Over layers and windows, each window as often as it has labels that count: a sum as the loss is one."""
        assert self.config.moe is not None
        losses_LB2 = torch.stack([losses_B2 for losses_B2, _ in routings])
        num_B = (labels_BT != IGNORE).sum(1)
        losses_L2 = (losses_LB2 * num_B[:, None]).sum(1)
        if torch.is_grad_enabled():
            found = RoutingSums(torch.stack([n for _, n in routings]), losses_L2.detach(), num_B.sum())
            if self.routed is not None:
                found.counts_LE += self.routed.counts_LE
                found.losses_L2 += self.routed.losses_L2
                found.labels += self.routed.labels
            self.routed = found
        weights = self.config.moe.loss_weights
        return weights[0] * losses_L2[:, 0].sum() + weights[1] * losses_L2[:, 1].sum()

    @property
    def routed_layers(self) -> list[int]:
        """The layers with a mixture of experts, in the order of the rows of `routed`."""
        return [layer for layer, kind in enumerate(self.config.layer_mlps) if kind == "moe"]

    def statistics(self) -> list[dict[str, Tensor]]:
        """What the metrics log of each layer, of this rank's heads and tokens; empty where there is nothing."""
        return [getattr(block.mixer, "statistics", dict)() for block in self.blocks]

    def reset_statistics(self) -> None:
        self.routed = None
        for block in self.blocks:
            getattr(block.mixer, "reset_statistics", lambda: None)()

    def new_cache(self) -> list[Cache]:
        """An empty decode cache, one entry per layer."""
        return [block.mixer.new_cache() for block in self.blocks]  # type: ignore[union-attr, operator]


def build_model(config: ModelConfig, *, attention: AttentionConfig | None = None, seed: int = 0) -> LM:
    """The model of `config` with its initial weights (fp32) on the current default device.

    Under `torch.device("meta")` it has shapes only. Initial values depend on (seed, name, index) alone.
    """
    model = LM(config, attention or AttentionConfig())
    if not model.embed.weight.is_meta:
        init_parameters(model, seed=seed, std=config.init_std)
    return model


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; a tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
