"""open_lm's forward for one new token per row, over a KV cache whose memory is allocated once.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, L layers, H heads, D width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fixed_shape_open_lm import kept_decoder, windows
from .layers_open_lm import StaticCache, forward, signed, weights_of
from .products_open_lm import product
from .reading_open_lm import left_padded


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
        self.body, self.memory, self.length, self.padding = model.model, memory, length, padding
        num_rows, _, num_positions, head_dim = memory[0].shape[1:]
        self.products = [
            [product(weight, num_rows=num_rows) for weight in weights] for weights in weights_of(self.body)
        ]
        places = torch.arange(num_positions, device=padding.device)
        # Rotary angles count from each row's first real id, as in training: (R, 1, P + K, head_dim) each.
        self.angles = signed(self.body.angles((places - padding[:, None]).clamp(min=0)), head_dim)
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
        return forward(self.body, self.products, ids, self.memory, remember, angles=angles, mask=mask)

    def read(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Read W ids per row (R, W), each row's from a position of its own (R,): normalised hidden states (R, W, D).

        What a row held from that position on is forgotten.
        """
        num_rows, num_new = ids.shape
        at = starts[:, None] + torch.arange(num_new, device=ids.device)  # (R, W)
        end = int(starts.max()) + num_new
        rows = torch.arange(num_rows, device=ids.device)[:, None]

        def remember(layer: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
            layer[:, rows, :, at] = new.unflatten(1, (num_rows, num_new)).permute(1, 2, 0, 3, 4)
            return layer[0, :, :, :end], layer[1, :, :, :end]

        angles = None
        if self.angles is not None:
            # (N, 1, 1, head_dim) each
            angles = [part[rows, 0, at].flatten(0, 1)[:, None, None] for part in self.angles]
        places = torch.arange(end, device=ids.device)
        # Neither later positions, which hold what earlier passes guessed, nor the padding on the left.
        is_hidden = (places > at[..., None]) | (places < self.padding[:, None, None])  # (R, W, T)
        mask = torch.zeros(is_hidden.shape, dtype=self.memory[0].dtype, device=ids.device)
        mask = mask.masked_fill_(is_hidden, -torch.inf)[:, None]  # (R, 1, W, T)
        hidden = forward(
            self.body, self.products, ids.flatten(), self.memory, remember, angles=angles, mask=mask
        )
        return hidden.unflatten(0, ids.shape)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        self.memory = [layer[:, rows] for layer in self.memory]
        self.padding = self.padding[rows]
        if self.angles is not None:
            self.angles = [part[rows] for part in self.angles]


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
        """Yield the window of each step from here."""
        return windows(self.length, num_positions=self.memory[0].shape[3])

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
        angles = signed(self.body.angles((at - self.padding)[:, None]), head_dim)
        products = [
            [functools.partial(F.linear, weight=weight) for weight in weights]
            for weights in weights_of(self.body)
        ]
        hidden = forward(self.body, products, ids, memory, remember, angles=angles, mask=mask)
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
    like = model.get_output_embeddings().weight

    def fits(kept: FixedDecoder) -> bool:
        memory = kept.memory[0]
        is_same = memory.device == like.device and memory.dtype == like.dtype
        return is_same and len(kept.padding) == num_rows and memory.shape[3] >= least_positions

    def make(num_positions: int) -> FixedDecoder:
        return FixedDecoder(model, num_rows=num_rows, num_positions=num_positions)

    return kept_decoder(model, fits, make, least_positions=least_positions)
