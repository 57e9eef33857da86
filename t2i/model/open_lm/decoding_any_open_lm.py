"""Decoding with transformers' own classes: their forward, over a KV cache whose memory is allocated once.

The model is not touched. Steps go through a mirror of its modules, which shares its parameters and packs the weights of
its linear layers.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B captions, R = 2 B rows with guidance (conditional, then unconditional), P positions of the longest prompt, K codes per
image, T positions so far, W new ids per row, H heads of keys, D width.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fixed_shape_open_lm import windows
from .products_open_lm import mirrored, packed

ATTENTION = "t2i_shared_keys"
"""Name of `attend` among transformers' attention functions."""
Memory = list[tuple[Tensor, Tensor]]
"""Keys and values (R, H, P + K, head_dim) of each layer."""


class RowCache(Cache):
    """A cache whose rows each have a position of their own."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.end = 0
        """Positions that are attended to, with those of this pass."""
        self.at: Tensor | None = None
        """(R, W) where new keys are written; None if every row's are the last before `end`."""

    def __len__(self) -> int:
        # Some classes ask a cache whether it is empty.
        return len(self.memory)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, H, W, head_dim) of a layer; return all up to `end`."""
        keys, values = self.memory[layer_idx]
        if self.at is None:
            start = self.end - key_states.shape[2]
            keys[:, :, start : self.end] = key_states
            values[:, :, start : self.end] = value_states
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            keys[rows, :, self.at] = key_states.transpose(1, 2)
            values[rows, :, self.at] = value_states.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions before this pass."""
        return self.end - (1 if self.at is None else self.at.shape[1])


class RowDecoder:
    """The forward for new ids of every row, without the work that only whole sequences need.

    Called with ids (R,), it appends one to every row. `read` takes several per row, each row's at its own position.
    Both attend to the true length, and leave out the mask where nothing is to be hidden.
    """

    def __init__(self, body: nn.Module, memory: Memory, *, length: int, padding: Tensor) -> None:
        """Prepare to continue after the prompts, given their keys and values.

        Args:
            body: the part of the model that computes hidden states; a mirror is made of it.
            memory: of each layer, (R, H, P + K, head_dim) each.
            length: P, the number of positions that it holds.
            padding: (R,) number of positions on the left of each row that attention must not see.
        """
        self.body = decoding_body(body, num_rows=len(padding))
        self.cache_name = cache_name(self.body)
        self.cache, self.length, self.padding = RowCache(memory), length, padding
        keys = memory[0][0]
        self.dtype = keys.dtype
        places = torch.arange(keys.shape[2], device=padding.device)
        self.positions = (places - padding[:, None]).clamp(min=0)  # (R, P + K), as in training
        self.mask = None
        if padding.any():  # without a mask, SDPA may choose a faster kernel
            self.mask = hiding(places < padding[:, None], self.dtype)[:, None, None]  # (R, 1, 1, P + K)

    def __call__(self, ids: Tensor) -> Tensor:
        """Append one id per row (R,); compute its normalised hidden state (R, D)."""
        at, self.length = self.length, self.length + 1
        self.cache.end, self.cache.at = self.length, None
        mask = None if self.mask is None else self.mask[..., : self.length]
        return self._forward(ids[:, None], mask=mask, positions=self.positions[:, at : self.length])[:, 0]

    def read(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Read W ids per row (R, W), each row's from a position of its own (R,): normalised hidden states (R, W, D).

        What a row held from its position on is forgotten. So whoever tries several ids, and keeps some, calls next with
        the position behind those that were kept: nothing has to be taken back. Positions count the padding: the first
        after the prompts is P for every row. `length` does not change; one who mixes this with calls sets it.
        """
        at = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)  # (R, W)
        self.cache.end, self.cache.at = int(at.max()) + 1, at
        places = torch.arange(self.cache.end, device=ids.device)
        is_hidden = (places > at[..., None]) | (places < self.padding[:, None, None])  # (R, W, T)
        mask = hiding(is_hidden, self.dtype)[:, None]
        return self._forward(ids, mask=mask, positions=self.positions.gather(1, at))

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        self.cache.memory = [(keys[rows], values[rows]) for keys, values in self.cache.memory]
        self.positions, self.padding = self.positions[rows], self.padding[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def _forward(self, ids: Tensor, *, mask: Tensor | None, positions: Tensor) -> Tensor:
        cache = {self.cache_name: self.cache}
        outputs = self.body(ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        hidden: Tensor = outputs.last_hidden_state
        return hidden


class WindowCache(RowCache):
    """A cache of fixed shape: all rows write at one position, and all positions of a window are attended to."""

    def __init__(self, memory: Memory, *, at: Tensor, window: int) -> None:
        super().__init__(memory)
        self.place, self.end = at, window

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, H, 1, head_dim) of a layer; return the window."""
        keys, values = self.memory[layer_idx]
        # By a tensor, not by an int: a Python number would be a constant, and each position be compiled again.
        keys.index_copy_(2, self.place, key_states)
        values.index_copy_(2, self.place, value_states)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions and mask are given, and a number that grows would be compiled again."""
        return 0


class FixedRowDecoder(nn.Module):
    """RowDecoder's forward in few shapes for all steps and batches, for torch.compile and CUDA graphs."""

    body: Any
    length: int
    at: Tensor
    padding: Tensor

    def __init__(self, body: nn.Module, like: Memory, *, num_rows: int, num_positions: int) -> None:
        """Allocate.

        Args:
            like: keys and values of each layer, which say how many heads there are, their width and their dtype.
        """
        super().__init__()
        # Weights are not packed here: the compiler packs them.
        self.body = decoding_body(body, num_rows=None)
        self.num_layers = len(like)
        for layer, pair in enumerate(like):
            for name, read in zip(("keys", "values"), pair, strict=True):
                self.register_buffer(f"{name}_{layer}", allocated(read, num_rows, num_positions))
        device = like[0][0].device
        self.register_buffer("at", torch.zeros(1, dtype=torch.long, device=device))
        self.register_buffer("padding", torch.zeros(num_rows, dtype=torch.long, device=device))
        self.cache_name = cache_name(self.body)
        self.steps: dict[Any, Callable[..., Tensor]] = {}
        """Compiled steps, by their sampling settings."""

    @property
    def memory(self) -> Memory:
        """Keys and values of each layer."""
        return [
            (self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}"))
            for layer in range(self.num_layers)
        ]

    def fits(self, like: Memory, *, num_rows: int, least_positions: int) -> bool:
        """Tell whether these rows and positions fit."""
        kept, new = self.memory[0][0], like[0][0]
        is_same = kept.device == new.device and kept.dtype == new.dtype
        return is_same and len(kept) == num_rows and kept.shape[2] >= least_positions

    def begin(self, *, length: int, padding: Tensor) -> Self:
        """Continue after the prompts, whose keys and values are in `memory`; the arguments are RowDecoder's."""
        self.length = length
        # In place: compiled steps and CUDA graphs know these tensors by their memory.
        self.at.fill_(length)
        self.padding.copy_(padding)
        return self

    def windows(self) -> Iterator[int]:
        """Yield the window of each step from here."""
        return windows(self.length, num_positions=self.memory[0][0].shape[2])

    def forward(self, ids: Tensor, window: int) -> Tensor:
        """Append one id per row (R,); compute its normalised hidden state (R, D)."""
        memory = self.memory
        # Not the later positions, which hold what an earlier batch left, and not the padding on the left.
        places = torch.arange(window, device=ids.device)
        is_hidden = (places > self.at) | (places < self.padding[:, None])  # (R, window)
        outputs = self.body(
            ids[:, None],
            attention_mask=hiding(is_hidden, memory[0][0].dtype)[:, None, None],
            position_ids=(self.at - self.padding)[:, None],
            use_cache=True,
            **{self.cache_name: WindowCache(memory, at=self.at, window=window)},
        )
        hidden: Tensor = outputs.last_hidden_state[:, 0]
        self.at.add_(1)
        return hidden


def allocated(like: Tensor, num_rows: int, num_positions: int) -> Tensor:
    """Allocate zeroed keys or values (R, H, num_positions, head_dim) for a layer from some that were read."""
    return like.new_zeros(num_rows, like.shape[1], num_positions, like.shape[3])


def cache_name(body: Any) -> str:
    """Return what a body's forward calls its KV cache: transformers 5 has renamed it."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def hiding(is_hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn booleans into numbers to add to attention scores: the least number where a key is hidden, else 0."""
    # Not -inf: some classes add a mask of their own to this one, and the sum must stay a number.
    return torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device).masked_fill(
        is_hidden, torch.finfo(dtype).min
    )


def decoding_body(body: nn.Module, *, num_rows: int | None) -> Any:
    """Mirror a body with attention that reads shared keys once, and for `num_rows` rows with packed weights."""
    made = mirrored(body, lambda module: None if num_rows is None else packed(module, num_rows=num_rows))
    # A class that computes attention by itself goes on doing so: Falcon's knows SDPA by name, and no other.
    if not getattr(made, "_supports_attention_backend", False):
        return made
    configs: dict[int, PretrainedConfig] = {}
    for module in made.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, "_attn_implementation_internal", None) == "sdpa":
            other = configs.setdefault(id(config), copy.copy(config))
            # Past the setter, which would write into configurations inside this one, and these are the model's own.
            other.__dict__["_attn_implementation_internal"] = ATTENTION
            module.__dict__["config"] = other
    return made


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Mix values as transformers' SDPA does, but let all query heads that share a key head read it together.

    transformers repeats keys and values for each query head where there is a mask. That would copy the whole cache in
    every layer of every step.

    Args:
        query: (R, G H, W, head_dim), where G query heads share each key.
        key: (R, H, T, head_dim), as value.
        attention_mask: (R, 1, W, T) or None.
    """
    # Sinks, capped scores and biases: what transformers' own makes of them, this does too.
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "head_mask")):
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return usual(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shape = query.shape  # (R, G H, W, head_dim)
    shared = shape[1] // key.shape[1]  # G
    if shared > 1:
        query = query.reshape(shape[0], key.shape[1], -1, shape[3])  # (R, H, G W, head_dim)
        if attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask.repeat(1, 1, shared, 1)  # (R, 1, G W, T)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    mixed = mixed.reshape(*shape[:3], value.shape[3])
    return mixed.transpose(1, 2).contiguous(), None  # (R, W, G H, head_dim)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
