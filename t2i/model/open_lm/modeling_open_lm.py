"""open_lm as transformers classes. Parameters have open_lm's own names, so released weights map by prefix.

B batch, S new positions, T all positions so far, H heads, D width, V vocabulary.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .attention_open_lm import Attention, Remember, attention_mask_of, make_norm, positions_of, rotary_angles
from .class_reading_open_lm import reader_of  # noqa: F401
from .configuration_open_lm import OpenLMConfig
from .decoding_any_open_lm import RowDecoder  # noqa: F401 - transformers copies what is imported here alone
from .decoding_open_lm import begin_decoding
from .fixed_shape_open_lm import windows  # noqa: F401
from .forms_open_lm import ClassForm  # noqa: F401
from .layers_open_lm import forward  # noqa: F401
from .products_open_lm import product  # noqa: F401
from .race_open_lm import race  # noqa: F401
from .reading_open_lm import left_padded  # noqa: F401
from .sampling_open_lm import draw
from .window_open_lm import sample_by_window  # noqa: F401

Outputs = TypeVar("Outputs", bound=ModelOutput)


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
        self,
        hidden: Tensor,
        mask: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        remember: Remember | None,
        is_eager: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        normalised = self.attention_norm(hidden)
        mixed, weights = self.attention(
            normalised, mask=mask, angles=angles, remember=remember, is_eager=is_eager
        )
        hidden = hidden + mixed
        return hidden + self.feed_forward(self.ffn_norm(hidden)), weights


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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast | tuple[object, ...]:
        """Compute normalised hidden states (B, S, D).

        Args:
            attention_mask: (B, T), nonzero where a key may be attended to, or None if all may. Or (B, 1, S, T) for any
                order: booleans, or numbers that are added to the scores.
            position_ids: (B, S); by default counted from the mask, else from the cache's length.
            past_key_values: any cache with get_seq_length() and update(key, value, layer).
            output_attentions: return the weights (B, H, S, T) of every layer too, computed without SDPA.
            output_hidden_states: return the input of every layer too, and the normalised output (B, S, D).
        """
        config = self.config
        wants_weights = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        is_eager = wants_weights or config._attn_implementation == "eager"
        hidden = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        hidden = self.post_embed_norm(hidden)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        # transformers' caches of fixed size return more positions than are written, so they always need a mask.
        is_exact = not isinstance(past_key_values, Cache) or isinstance(past_key_values, DynamicCache)
        mask = attention_mask_of(attention_mask, hidden, past=past, is_needed=is_eager or not is_exact)
        angles = self.angles(positions_of(position_ids, attention_mask, hidden, past=past))
        remember = None if past_key_values is None else _into(past_key_values, past=past, like=hidden)
        states: list[Tensor] = []
        all_weights: list[Tensor | None] = []
        for layer in self.layers:
            states.append(hidden)
            # Without a cache: a checkpointed layer runs twice, and would append its keys twice.
            if self.gradient_checkpointing and self.training:
                hidden, weights = torch.utils.checkpoint.checkpoint(
                    layer, hidden, mask, angles, None, is_eager, use_reentrant=False
                )
            else:
                hidden, weights = layer(hidden, mask, angles, remember, is_eager)
            all_weights.append(weights)
        hidden = self.norm(hidden)
        outputs = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if wants_states else None,
            attentions=tuple(all_weights) if wants_weights else None,
        )
        return _as_asked(outputs, self.config, return_dict)


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
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """Compute logits (B, S, V), or of the last logits_to_keep positions only.

        Args:
            labels: (B, S), shifted inside as transformers does; -100 is not counted.
            logits_to_keep: how many of the last positions, 0 for all; or their indices.
            num_items_in_batch: the loss is the sum over this number instead of the mean, as transformers' Trainer asks.
            cache: the name of past_key_values in newer releases of transformers.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = (
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        )  # -0 keeps all
        logits = self.output(outputs.last_hidden_state[:, kept])  # (B, S, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        answer = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return _as_asked(answer, self.config, return_dict)


def _into(cache: Cache, *, past: int, like: Tensor) -> Remember:
    """Make the function that writes new keys and values into a cache, behind the `past` positions that it holds."""
    if not isinstance(cache, Cache):
        return cache.update
    # A static cache of transformers 4 writes at position 0 unless it is told where.
    places = {"cache_position": torch.arange(past, past + like.shape[1], device=like.device)}
    return lambda key, value, layer: cache.update(key, value, layer, places)


def _as_asked(
    outputs: Outputs, config: OpenLMConfig, return_dict: bool | None
) -> Outputs | tuple[object, ...]:
    """Return outputs as they are, or as a tuple if the call or config.json asks for one."""
    is_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return outputs if is_dict else outputs.to_tuple()


OpenLMConfig.register_for_auto_class()
OpenLMModel.register_for_auto_class("AutoModel")
OpenLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
