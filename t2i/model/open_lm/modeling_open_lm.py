"""open_lm as transformers classes. Parameters have open_lm's own names, so released weights map by prefix.

B batch, S new positions, T all positions so far, H heads, D width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_open_lm import OpenLMConfig
from .decoding_open_lm import begin_decoding
from .sampling_open_lm import draw

ROTARY_BASE = 10_000.0
"""Base of the rotary frequencies, open_lm's constant."""


def make_norm(config: OpenLMConfig) -> nn.Module:
    """Build the norm that config.norm_type names, over the last dimension D."""
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    has_gain = config.norm_type != "no_wb_layer_norm"
    has_bias = has_gain and not config.norm_type.startswith("gain_only")
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=has_gain, bias=has_bias)


def rotary_angles(positions: Tensor, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin (B, 1, S, head_dim) in fp32 for positions (B, S)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * ROTARY_BASE**-exponents  # (B, S, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (B, H, S, head_dim) by halves, in fp32, and return them in their own dtype."""
    first, second = heads.float().chunk(2, dim=-1)
    return (heads.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(heads.dtype)


class Attention(nn.Module):
    """Causal self-attention with one fused projection (rows q, k, v in whole blocks)."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = make_norm(config) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
    ) -> Tensor:
        query, key, value = self.in_proj(hidden).chunk(3, dim=-1)  # (B, S, D) each
        # The norms come before the split into heads: open_lm normalises over all heads together.
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_norm(query), self.k_norm(key), value)
        )  # (B, H, S, head_dim)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        # Without a mask SDPA can use its fastest kernels. One new position sees all, so nothing is to be hidden.
        is_causal = mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU with gate and value fused: the first half of w12 is the gate."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = self.w12(hidden).chunk(2, dim=-1)  # (B, S, intermediate) each
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        for linear in (self.attention.out_proj, self.feed_forward.w3):
            linear.residual_depth = layer + 1  # read by _init_weights
        self.attention_norm = make_norm(config)
        self.ffn_norm = make_norm(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask=mask, angles=angles, cache=cache)
        return hidden + self.feed_forward(self.ffn_norm(hidden))


class OpenLMPreTrainedModel(PreTrainedModel):
    """Base of both classes: open_lm's initialisation and transformers' switches."""

    config_class = OpenLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Draw from normals truncated at three deviations; a residual branch shrinks with its depth.

        Source: open_lm's reset_parameters (open_lm/model.py, open_lm/attention.py).
        """
        if isinstance(module, nn.Embedding | nn.Linear):
            std = module.weight.shape[1] ** -0.5 / math.sqrt(2 * getattr(module, "residual_depth", 0.5))
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class OpenLMModel(OpenLMPreTrainedModel):
    """The transformer without its LM head: ids to normalised hidden states."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_embed_norm = make_norm(config) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that maps ids to (B, S, D)."""
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the module that maps ids to (B, S, D)."""
        self.tok_embeddings = value

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute cos and sin (B, 1, S, head_dim) of positions (B, S); None for a model without rotary positions."""
        if self.config.positional_embedding_type != "rotary":
            return None
        return rotary_angles(positions, head_dim=self.config.hidden_size // self.config.num_attention_heads)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Compute normalised hidden states (B, S, D).

        Args:
            attention_mask: (B, T), nonzero where a key may be attended to; None if all may.
            position_ids: (B, S); by default counted from the mask, else from the cache's length.
            past_key_values: any cache with get_seq_length() and update(key, value, layer).
        """
        hidden = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        hidden = self.post_embed_norm(hidden)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = _mask(attention_mask, hidden, past=past)
        angles = self.angles(_positions(position_ids, attention_mask, hidden, past=past))
        for layer in self.layers:
            # Without a cache: a checkpointed layer runs twice, and would append its keys twice.
            if self.gradient_checkpointing and self.training:
                hidden = torch.utils.checkpoint.checkpoint(
                    layer, hidden, mask, angles, None, use_reentrant=False
                )
            else:
                hidden = layer(hidden, mask, angles, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class OpenLMForCausalLM(OpenLMPreTrainedModel, GenerationMixin):
    """open_lm with its LM head; `draw` samples images once the vocabulary holds image codes."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012

    # Methods, so that an export loaded by remote code has the sampler without this package.
    draw, begin_decoding = draw, begin_decoding

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        self.model = OpenLMModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that maps ids to (B, S, D)."""
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the module that maps ids to (B, S, D)."""
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the bias-free LM head."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the bias-free LM head."""
        self.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S, V), or of the last logits_to_keep positions only.

        Args:
            labels: (B, S), shifted inside as transformers does; -100 is not counted.
            cache: the name of past_key_values in newer releases of transformers.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.output(outputs.last_hidden_state[:, -logits_to_keep:])  # (B, S, V); -0 keeps all
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def _mask(attention_mask: Tensor | None, hidden: Tensor, *, past: int) -> Tensor | None:
    """Build a boolean mask (B, 1, S, T), or None where SDPA's is_causal does the same."""
    num_new = hidden.shape[1]
    if attention_mask is None and (past == 0 or num_new == 1):
        return None
    total = past + num_new
    queries = torch.arange(past, total, device=hidden.device)[:, None]
    keys = torch.arange(total, device=hidden.device)[None]
    mask = (keys <= queries)[None, None]  # (1, 1, S, T)
    if attention_mask is not None:
        # A padded query sees itself, or its softmax would be over nothing and give nan.
        mask = (mask & attention_mask[:, None, None, :total].bool()) | (keys == queries)
    return mask


def _positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, hidden: Tensor, *, past: int
) -> Tensor:
    """Return positions (B, S): as given, else counted from the mask, else from the cache's length."""
    num_new = hidden.shape[1]
    if position_ids is not None:
        return position_ids
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + num_new]
    return torch.arange(past, past + num_new, device=hidden.device)[None]


OpenLMConfig.register_for_auto_class()
OpenLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
