"""SISA for Hugging Face transformers: softmax attention whose score carries a state-space model's importance term.

    log α_t = −softplus(w_αᵀ x_t + b_α)          g_t = Σ_{k≤t} log α_k
    θ_t     = W_θ x_t                             Φ_t = Σ_{k≤t} θ_k
    s_ij    = q_i·k_j/√d_h  +  λ · e^{g_i − g_j} · C_iᵀ R(Φ_j − Φ_i) B_j        (i ≥ j)
    y_i     = Σ_j softmax_j(s_ij) v_j             out = W_O y                   (arXiv 2606.02332)

This one file travels with the weights and needs torch and transformers (5.x) only. It is the plain form: the score is
written out over a bounded number of query rows at a time, exact at any length and decay, trainable, and not fast; to
pretrain use sisa-dist, which it was exported from. A padded token (attention_mask 0) neither is seen nor moves g and
Φ. Not here: packed documents, 4-D masks, static or offloaded caches, cutting a cache (so no assisted generation).

Names: B batch, H query heads, G kv heads, t tokens of this call, n tokens of the cache and this call, d channels of a
head, s SSM channels of a head (the pairs (2m, 2m+1) turn together).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

SCORES_AT_ONCE = 1 << 24  # entries of the score written out at a time, 64 MB in fp32: bounds memory, not the result


class SisaConfig(PretrainedConfig):
    """`layer_d_s`: SSM channels per head of each layer, even; 0 is plain attention; empty: 32 throughout.

    `max_position_embeddings` is the length trained at: information for tools, no limit, and rope_type dynamic's origin.
    """

    model_type = "sisa"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32_000
    hidden_size: int = 768
    intermediate_size: int = 2748
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0  # 0: num_attention_heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    layer_d_s: Sequence[int] = ()
    log_alpha_min: float | None = None  # log α is clamped to it, as it was in training
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qk_norm: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __init__(self, **kwargs: Any) -> None:
        self.rope_parameters = kwargs.pop("rope_parameters", None)
        own = {name: kwargs.pop(name, getattr(SisaConfig, name)) for name in SisaConfig.__annotations__}
        self.__dict__.update(own)  # of which its RoPE parameters take their defaults
        super().__init__(**kwargs)
        self.__dict__.update(own, rope_theta=self.rope_parameters["rope_theta"])
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.layer_d_s = list(self.layer_d_s) or [32] * self.num_hidden_layers
        if len(self.layer_d_s) != self.num_hidden_layers or any(d_s < 0 or d_s % 2 for d_s in self.layer_d_s):
            raise ValueError(f"layer_d_s {self.layer_d_s}: give {self.num_hidden_layers} even numbers")


class SisaCacheLayer(DynamicLayer):
    """What one SISA layer keeps of the past: k, v and rotated B [B, G, n, ·], running decay g [B, G, n] fp64.

    g is kept un-exponentiated: with one fixed reference long generation overflows. `phase` [B, G, s/2] fp64 is Φ mod
    2π after the last token; that of earlier ones is not kept, hence no cutting.
    """

    is_croppable = False
    B: Tensor | None = None
    g: Tensor | None = None
    phase: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, B: Tensor, g: Tensor, phase: Tensor) -> tuple[Tensor, ...]:
        """Append t tokens, whose g and phase [B, G, t, s/2] go on from this layer's; all tokens' k, v, B, g."""
        k, v = self.update(k, v)
        self.B = B.to(v.dtype) if self.B is None else torch.cat((self.B, B.to(v.dtype)), dim=2)
        self.g = g if self.g is None else torch.cat((self.g, g), dim=2)
        self.phase = phase[:, :, -1]
        return k, v, self.B, self.g

    def _each(self, change: Callable[[Tensor], Tensor | None]) -> None:
        for name in ("keys", "values", "B", "g", "phase"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, change(held))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def reset(self) -> None:
        self._each(lambda x: None)
        self.is_initialized = False

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("a SISA cache cannot be cut: generate without an assistant or prompt lookup")


class SisaCache(Cache):
    """One entry per layer: SisaCacheLayer, or DynamicLayer for plain attention. The model makes it where it must."""

    def __init__(self, config: SisaConfig) -> None:
        super().__init__(layers=[SisaCacheLayer() if d_s else DynamicLayer() for d_s in config.layer_d_s])


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def split_heads(x: Tensor, width: int) -> Tensor:
    """[B, t, H·width] → [B, H, t, width]."""
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, t, d] turned by its position over the pairs (i, i + d/2)."""
    a, b = at_least_fp32(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(φ) on each adjacent pair of x [B, ·, t, s]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def visible_keys(seen: Tensor | None, r: int, n: int, device: torch.device) -> Tensor:
    """[B or 1, 1, r, n] bool: which of keys 0 … n−1 the last r of them see as queries. `seen` [B, ≥ n] or None.

    A padded query sees itself, lest its softmax be of nothing; nobody sees what comes of it.
    """
    i, j = torch.arange(n - r, n, device=device)[:, None], torch.arange(n, device=device)
    visible = (j <= i)[None]
    if seen is not None:
        visible = visible & (seen[:, None, :n] | (i == j))
    return visible[:, None]


class SisaRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(at_least_fp32(x), self.normalized_shape, at_least_fp32(self.weight), self.eps).to(x.dtype)


class SisaAttention(nn.Module):
    """The mixer of one layer: SISA, or plain attention where its d_s is 0."""

    def __init__(self, config: SisaConfig, layer: int) -> None:
        super().__init__()
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim, self.d_s = layer, config.head_dim, config.layer_d_s[layer]
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = SisaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = SisaRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        if self.d_s:
            self.ssm_c_proj = nn.Linear(width, heads * self.d_s, bias=False)
            self.ssm_b_proj = nn.Linear(width, kv_heads * self.d_s, bias=False)
            self.ssm_theta_proj = nn.Linear(width, kv_heads * self.d_s // 2, bias=False)
            self.decay_proj = nn.Linear(width, kv_heads)
            self.lambda_raw = nn.Parameter(torch.empty(heads))
            self.log_alpha_min = config.log_alpha_min

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], seen: Tensor | None, cache: SisaCache | None) -> Tensor:
        """x [B, t, width] → the same; `seen` [B, n] bool is the attention mask of cache and x, None: all ones."""
        q = apply_rope(self.q_norm(split_heads(self.q_proj(x), self.head_dim)), *rope)
        k = apply_rope(self.k_norm(split_heads(self.k_proj(x), self.head_dim)), *rope)
        v = split_heads(self.v_proj(x), self.head_dim)
        held = None if cache is None else cache.layers[self.layer]
        y = self._sisa(x, q, k, v, seen, held) if self.d_s else self._plain(q, k, v, seen, held)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, held: Any) -> Tensor:
        k, v = (k, v) if held is None else held.update(k, v)
        t, n = q.shape[2], k.shape[2]
        mask = None if seen is None and t in (1, n) else visible_keys(seen, t, n, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and t > 1, enable_gqa=True)

    def _sisa(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, held: Any) -> Tensor:
        C, B = split_heads(self.ssm_c_proj(x), self.d_s), split_heads(self.ssm_b_proj(x), self.d_s)
        theta = split_heads(self.ssm_theta_proj(x), self.d_s // 2)
        work = at_least_fp32(q).dtype
        with torch.autocast(x.device.type, enabled=False):
            decay = (at_least_fp32(z) for z in (x, self.decay_proj.weight, self.decay_proj.bias))
            log_alpha = -F.softplus(F.linear(*decay)).transpose(1, 2)
            if self.log_alpha_min is not None:
                log_alpha = log_alpha.clamp(min=self.log_alpha_min)
            if seen is not None:  # a padded token neither decays nor turns
                now = seen[:, None, -x.shape[1] :]
                log_alpha, theta = log_alpha.where(now, 0.0), theta.where(now[..., None], 0.0)
            # Only differences of g and Φ count, and those of long fp32 sums are wrong: fp64.
            g, phase = log_alpha.cumsum(-1, dtype=torch.float64), theta.cumsum(-2, dtype=torch.float64)
            if held is not None and held.g is not None:
                g, phase = g + held.g[:, :, -1:], phase + held.phase[:, :, None]
            phase = phase.remainder(2 * math.pi)
            cos, sin = phase.to(work).cos(), phase.to(work).sin()
            B = rotate(B.to(work), cos, sin)
            C = rotate(C.to(work), *(z.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for z in (cos, sin)))
            C = C * F.softplus(at_least_fp32(self.lambda_raw)).to(work)[:, None, None]
            keys: tuple[Tensor, ...] = (k, v, B, g)
            if held is not None:
                fresh, kept = held.g is None, held.extend(*keys, phase)
                keys = keys if fresh else kept  # the prompt itself sees B as it was before the cache rounded it
            return attend(q.to(work), C, g, keys, seen).to(q.dtype)


def attend(q: Tensor, C: Tensor, g_q: Tensor, keys: tuple[Tensor, ...], seen: Tensor | None) -> Tensor:
    """Softmax over n keys of the last t of them as queries, some rows at a time; recomputed in backward if many.

    q [B, H, t, d] and C [B, H, t, s] (rotated, times λ) in the working dtype; g_q [B, G, t]; keys: k, v, B (rotated)
    [B, G, n, ·] and g [B, G, n]; seen [B, n] bool or None. Returns [B, H, t, d] in the working dtype.
    """
    (batch, heads, t, _), n = q.shape, keys[0].shape[2]
    rows = max(1, SCORES_AT_ONCE // (batch * heads * n))
    outs = []
    for i in range(0, t, rows):
        last = n - t + min(i + rows, t)
        part = (*(z[:, :, i : i + rows] for z in (q, C, g_q)), *(z[:, :, :last] for z in keys), seen)
        again = rows < t and torch.is_grad_enabled()
        outs.append(checkpoint(_attend_rows, *part, use_reentrant=False) if again else _attend_rows(*part))
    return torch.cat(outs, dim=2)


def _attend_rows(*inputs: Any) -> Tensor:
    q, C, g_q, k, v, B, g, seen = inputs
    (batch, heads, r, _), kv_heads, n, work = q.shape, k.shape[1], k.shape[2], q.dtype
    group = heads // kv_heads
    # The heads of a group are rows over the same keys: no copy of k, v, B.
    q, C = (z.reshape(batch, kv_heads, group * r, -1) for z in (q, C))
    decay = (g_q[..., :, None] - g[..., None, :]).clamp(max=0.0).to(work).exp()  # ≤ 1: nothing overflows
    score = (C @ B.to(work).mT).unflatten(2, (group, r)) * decay[:, :, None]
    score = score + ((q @ k.to(work).mT) * q.shape[-1] ** -0.5).unflatten(2, (group, r))
    score = score.masked_fill(~visible_keys(seen, r, n, q.device)[:, None], float("-inf"))
    return (score.flatten(2, 3).softmax(-1) @ v.to(work)).reshape(batch, heads, r, -1)


class SisaMLP(nn.Module):
    def __init__(self, config: SisaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SisaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SisaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = SisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SisaAttention(config, layer)
        self.post_attention_layernorm = SisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SisaMLP(config)

    def forward(self, h: Tensor, rope: Any, seen: Tensor | None, past_key_values: SisaCache | None = None) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), rope, seen, past_key_values)
        return h + self.mlp(self.post_attention_layernorm(h))


class SisaPreTrainedModel(PreTrainedModel):
    config_class = SisaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("SisaDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    # bf16 rounds a gain of 1.001 to 1, and what is summed over the whole sequence must not be rounded at all.
    _keep_in_fp32_modules_strict = ("norm", "layernorm", "decay_proj", "lambda_raw")

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, SisaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, SisaAttention) and module.d_s:  # after its Linears
            nn.init.normal_(module.ssm_theta_proj.weight, std=0.01)
            nn.init.constant_(module.decay_proj.bias, -5.0)
            nn.init.constant_(module.lambda_raw, -1.0)


class SisaModel(SisaPreTrainedModel):
    def __init__(self, config: SisaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SisaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = SisaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SisaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """attention_mask [B, n] of the cached tokens and these, 0 where padded (on either side); None: all ones."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("SISA never holds whole attention maps: remove output_attentions")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        past_key_values = SisaCache(self.config) if past_key_values is None and use_cache else past_key_values
        if not isinstance(past_key_values, SisaCache | None):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}: SISA needs a SisaCache(config)")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (h.shape[0], past + h.shape[1]):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}: give [batch, cached and new tokens]")
        seen = None if attention_mask is None or attention_mask.all() else attention_mask.to(h.device).bool()
        rope = _rope(position_ids, seen, h, past, self.config)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            states = (*states, h) if keep else ()
            h = layer(h, rope, seen, past_key_values=past_key_values)
        h = self.norm(h)
        return BaseModelOutputWithPast(h, past_key_values if use_cache else None, (*states, h) if keep else None)


def _rope(ids: Tensor | None, seen: Tensor | None, h: Tensor, past: int, config: SisaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, t, d/2] fp32; unless given, positions `ids` count the tokens that are no padding."""
    t, width = h.shape[1], config.head_dim
    if ids is None:
        counted = torch.ones(1, past + t, device=h.device) if seen is None else seen
        ids = (counted.long().cumsum(-1) - 1).clamp(min=0)[:, -t:]
    channels, size = torch.arange(0, width, 2, dtype=torch.float64, device=h.device), 1.0
    frequency = config.rope_theta ** (-channels / width)
    if (kind := config.rope_parameters["rope_type"]) != "default":
        frequency, size = ROPE_INIT_FUNCTIONS[kind](config, h.device, seq_len=int(ids.max()) + 1)
    # Angles in fp64: at position 1e5 an fp32 angle is off by up to 4e-3.
    angle = ids.to(torch.float64)[:, None, :, None] * frequency.double()
    return (angle.cos() * size).float(), (angle.sin() * size).float()


class SisaForCausalLM(SisaPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # read by Trainer: num_items_in_batch

    def __init__(self, config: SisaConfig) -> None:
        super().__init__(config)
        self.model = SisaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # so that `generate` leaves it to forward, which makes a SisaCache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SisaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **flags: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, t, vocab_size]. labels [B, t] are the input_ids, shifted inside; −100 does not count."""
        flags |= {"return_dict": True}
        flags.pop("cache_position", None)  # of transformers 5.0; the cache knows
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **flags)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(out.last_hidden_state[:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)
