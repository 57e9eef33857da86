"""open_lm's forward for one new token per row, over a KV cache whose memory is allocated once.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, L layers, H heads, D width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .products_open_lm import product
from .reading_open_lm import left_padded

FIXED_STEP = 32
"""Fixed shapes have a multiple of so many positions, so that a slightly longer prompt needs no new compilation."""
MOST_WINDOWS, LEAST_WINDOW = 4, 128
"""Attention in fixed shapes is over a growing window of positions; each size of window is compiled separately."""


class StaticCache:
    """Keys and values (R, H, T, head_dim) of every layer; a cache that grows would be copied at each of K steps."""

    def __init__(self, memory: Sequence[Tensor]) -> None:
        self.memory = memory  # L of (2, R, H, P + K, head_dim)
        self.length = 0

    @classmethod
    def empty(cls, config: PretrainedConfig, *, num_rows: int, num_positions: int, like: Tensor) -> Self:
        """Allocate zeroed memory for so many rows and positions, with the device and dtype of `like`."""
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, num_rows, config.num_attention_heads, num_positions, head_dim)
        return cls([like.new_zeros(shape) for _ in range(config.num_hidden_layers)])

    def get_seq_length(self) -> int:
        """Return the number of positions held."""
        return self.length

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, S, head_dim) of a layer; return all so far."""
        end = self.length + key.shape[2]
        keys, values = self.memory[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        # Every layer writes at the same positions, so the last one counts them.
        if layer == len(self.memory) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]


class Decoder:
    """The forward for one new token per row, without the work that only whole sequences need.

    Weights are laid out for few rows, angles and mask are computed once, and attention is over the true length.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Sequence[Tensor], *, length: int, padding: Tensor
    ) -> None:
        """Prepare to continue after the prompts, given their keys and values in `memory`.

        Args:
            memory: of each layer (2, R, H, P + K, head_dim).
            length: P, the number of positions that it holds.
            padding: (R,) number of positions on the left of each row that attention must not see.
        """
        self.body, self.memory, self.length = model.model, memory, length
        num_rows, _, num_positions, head_dim = memory[0].shape[1:]
        self.products = [
            [product(weight, num_rows=num_rows) for weight in weights] for weights in _weights(self.body)
        ]
        places = torch.arange(num_positions, device=padding.device)
        # Rotary angles count from each row's first real id, as in training: (R, 1, P + K, head_dim) each.
        self.angles = _signed(self.body.angles((places - padding[:, None]).clamp(min=0)), head_dim)
        self.mask = None
        if padding.any():  # without a mask, SDPA may choose a faster kernel
            hidden = torch.full((num_rows, num_positions), -torch.inf, device=padding.device)
            hidden = hidden.where(places < padding[:, None], 0)
            self.mask = hidden[:, None, None].to(memory[0].dtype)  # (R, 1, 1, P + K)

    def __call__(self, ids: Tensor) -> Tensor:
        """Append one id per row (R,); compute its normalised hidden state (R, D)."""
        at, end = self.length, self.length + 1

        def remember(layer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            layer[:, :, :, at] = new
            return layer[0, :, :, :end], layer[1, :, :, :end]

        self.length = end
        angles = None if self.angles is None else [part[:, :, at:end] for part in self.angles]
        mask = None if self.mask is None else self.mask[..., :end]
        return _forward(self.body, self.products, ids, self.memory, remember, angles=angles, mask=mask)


class FixedDecoder(nn.Module):
    """Decoder's forward in few shapes for all steps and batches, for torch.compile and CUDA graphs.

    Attention is over a masked window: the first positions, up to a multiple of a quarter of all.
    """

    body: Any
    length: int
    at: Tensor
    padding: Tensor

    def __init__(self, model: PreTrainedModel, *, num_rows: int, num_positions: int) -> None:
        super().__init__()
        self.body = model.model
        like = model.get_output_embeddings().weight
        cache = StaticCache.empty(model.config, num_rows=num_rows, num_positions=num_positions, like=like)
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=like.device)
        for layer, memory in enumerate(cache.memory):
            # A graph reads and writes buffers in place. One buffer per layer: with one for all layers, the compiler
            # copied the whole of it at each layer's write.
            self.register_buffer(f"memory_{layer}", memory)
        self.register_buffer("at", zeros(1))
        self.register_buffer("padding", zeros(num_rows))
        self.steps: dict[Any, Callable[..., Tensor]] = {}
        """Compiled steps, by their sampling settings."""

    @property
    def memory(self) -> list[Tensor]:
        """Keys and values of each layer (2, R, H, P + K, head_dim)."""
        return [self.get_buffer(f"memory_{layer}") for layer in range(len(self.body.layers))]

    def begin(self, *, length: int, padding: Tensor) -> None:
        """Continue after the prompts, given their keys and values in `memory`; the arguments are Decoder's."""
        self.length = length
        # In place: compiled steps and CUDA graphs know these tensors by their memory.
        self.at.fill_(length)
        self.padding.copy_(padding)

    def windows(self) -> Iterator[int]:
        """Yield the window of each step from here: the positions that it must see, rounded up."""
        num_positions = self.memory[0].shape[3]
        size = max(LEAST_WINDOW, -(-num_positions // MOST_WINDOWS))
        for seen in range(self.length + 1, num_positions + 1):
            yield min(num_positions, seen + -seen % size)

    def forward(self, ids: Tensor, window: int) -> Tensor:
        """Append one id per row (R,); compute its normalised hidden state (R, D)."""
        at, memory = self.at, self.memory

        def remember(layer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            # By a tensor, not by an int: a Python number would be a constant, and each position be compiled again.
            layer.index_copy_(3, at, new[:, :, :, None])
            return layer[0, :, :, :window], layer[1, :, :, :window]

        # Not the later positions, which hold what an earlier batch left, and not the padding on the left.
        places = torch.arange(window, device=at.device)
        mask = ((places <= at) & (places >= self.padding[:, None]))[:, None, None]  # (R, 1, 1, window)
        head_dim = memory[0].shape[4]
        angles = _signed(self.body.angles((at - self.padding)[:, None]), head_dim)
        products = [
            [functools.partial(F.linear, weight=weight) for weight in weights]
            for weights in _weights(self.body)
        ]
        hidden = _forward(self.body, products, ids, memory, remember, angles=angles, mask=mask)
        self.at.add_(1)
        return hidden


def begin_decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    empty_prompt: Sequence[int] | None,
    num_codes: int,
    is_fixed: bool = False,
) -> tuple[Tensor, Decoder | FixedDecoder]:
    """Read the prompts; return the last hidden states (R, D) and the decoder that continues from there.

    Args:
        empty_prompt: prompt of the null caption, read once for all rows; None without guidance.
        is_fixed: continue in fixed shapes, with a decoder that the model keeps for the next batch.
    """
    lengths = [len(prompt) for prompt in prompts] + [len(empty_prompt or [])] * len(prompts)
    batch, longest = len(prompts), max(lengths)
    num_rows = 2 * batch if empty_prompt else batch
    if is_fixed:
        fixed = _kept_decoder(model, num_rows=num_rows, least_positions=longest + num_codes)
        longest = fixed.memory[0].shape[3] - num_codes  # prompts are padded up to the decoder's own positions
    like = model.get_output_embeddings().weight
    empty = functools.partial(StaticCache.empty, model.config, like=like)
    memory = fixed.memory if is_fixed else empty(num_rows=num_rows, num_positions=longest + num_codes).memory
    ids, mask = left_padded(prompts, length=longest, device=model.device)  # (B, P)
    own = StaticCache([layer[:, :batch] for layer in memory])  # views: it writes where decoding will read
    mask_or_none = None if mask.all() else mask
    hidden = model.model(ids, attention_mask=mask_or_none, past_key_values=own).last_hidden_state[:, -1]
    if empty_prompt:
        # The null prompt is the same in every row: it is read once, and its keys and values are copied to all.
        single = empty(num_rows=1, num_positions=len(empty_prompt))
        ids = torch.tensor([list(empty_prompt)], device=model.device)
        last = model.model(ids, past_key_values=single).last_hidden_state[:, -1]
        for layer, read in zip(memory, single.memory, strict=True):
            layer[:, batch:, :, longest - len(empty_prompt) : longest] = read
        hidden = torch.cat([hidden, last.expand(batch, -1)])
    padding = longest - torch.tensor(lengths[:num_rows], device=model.device)
    if is_fixed:
        fixed.begin(length=longest, padding=padding)
        return hidden, fixed
    return hidden, Decoder(model, memory, length=longest, padding=padding)


def _kept_decoder(model: PreTrainedModel, *, num_rows: int, least_positions: int) -> FixedDecoder:
    """Return the model's only decoder; a new one if the number of rows differs or it has too few positions."""
    # In __dict__, past nn.Module's __setattr__: the decoder's buffers must not become part of the model's state.
    kept: FixedDecoder | None = model.__dict__.get("_fixed_decoder")
    like = model.get_output_embeddings().weight
    if (
        kept is not None
        and kept.padding.device == like.device
        and kept.memory[0].dtype == like.dtype
        and len(kept.padding) == num_rows
        and kept.memory[0].shape[3] >= least_positions
    ):
        return kept
    del kept
    model.__dict__["_fixed_decoder"] = None  # frees its large memory before the next one's is allocated
    num_positions = least_positions + -least_positions % FIXED_STEP
    decoder = FixedDecoder(model, num_rows=num_rows, num_positions=num_positions)
    model.__dict__["_fixed_decoder"] = decoder
    return decoder


def _weights(body: Any) -> list[tuple[Tensor, ...]]:
    """List the four weight matrices of each layer."""
    return [
        (
            block.attention.in_proj.weight,
            block.attention.out_proj.weight,
            block.feed_forward.w12.weight,
            block.feed_forward.w3.weight,
        )
        for block in body.layers
    ]


def _signed(angles: tuple[Tensor, Tensor] | None, head_dim: int) -> list[Tensor] | None:
    """Negate the sines of the first half, so that a rotation is one addcmul."""
    if angles is None:
        return None
    cos, sin = angles
    first = torch.arange(head_dim, device=sin.device) < head_dim // 2
    return [cos, torch.where(first, -sin, sin)]


def _forward(
    body: Any,
    products: Sequence[Sequence[Callable[[Tensor], Tensor]]],
    ids: Tensor,
    memory: Sequence[Tensor],
    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    angles: list[Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    """Compute the normalised hidden states (R, D) of one new id per row (R,).

    Args:
        products: in_proj, out_proj, w12 and w3 of each layer.
        remember: writes new keys and values (2, R, H, head_dim) into a layer's memory, and returns those to attend to.
        angles: cos and signed sin (R, 1, 1, head_dim).
        mask: attention mask of SDPA, (R, 1, 1, T).
    """
    heads_shape = (len(ids), 3, memory[0].shape[2], memory[0].shape[4])
    hidden = body.post_embed_norm(body.tok_embeddings(ids))  # (R, D)
    for block, (in_proj, out_proj, w12, w3), layer in zip(body.layers, products, memory, strict=True):
        projected = in_proj(block.attention_norm(hidden))  # (R, 3 D)
        heads = _heads(block.attention, projected, heads_shape, angles, has_norms=body.config.qk_norm)
        keys, values = remember(layer, heads[:, 1:].transpose(0, 1))
        query = heads[:, 0, :, None]  # (R, H, 1, head_dim)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)  # (R, H, 1, head_dim)
        hidden = hidden + out_proj(mixed.flatten(1))
        gate, value = w12(block.ffn_norm(hidden)).chunk(2, dim=-1)  # (R, intermediate) each
        hidden = hidden + w3(F.silu(gate) * value)
    return body.norm(hidden)


def _heads(
    attention: Any, projected: Tensor, shape: tuple[int, ...], angles: list[Tensor] | None, *, has_norms: bool
) -> Tensor:
    """Normalise and rotate projections (R, 3 D): queries, keys and values (R, 3, H, head_dim)."""
    heads = projected.view(shape)  # (R, 3, H, head_dim)
    if has_norms:
        flat = projected.view(len(projected), 3, -1)  # (R, 3, D), a view: heads sees what is written here
        # open_lm normalises queries and keys over all heads together, before they are split.
        flat[:, 0] = attention.q_norm(flat[:, 0])
        flat[:, 1] = attention.k_norm(flat[:, 1])
    if angles is not None:
        cos, signed_sin = angles
        pair = heads[:, :2].float()  # (R, 2, H, head_dim): queries and keys, rotated in fp32 as in training
        swapped = pair.roll(pair.shape[-1] // 2, dims=-1)
        heads[:, :2] = torch.addcmul(pair * cos, swapped, signed_sin)
    return heads
