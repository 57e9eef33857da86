"""From hidden states to codes: guidance, top-k, top-p, and an exponential race whose noise is a hash.

This file is uploaded with exported models, so it imports only torch.

B captions, R = 2 B rows with guidance (conditional, then unconditional), K codes per image, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """How codes are sampled from hidden states."""

    image_ids: range
    """Ids of the image codes, in order of the codes."""
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    mixes_logits: bool = False
    """Guidance combines logits: they are capped, so mixed hidden states would give others."""

    def __post_init__(self) -> None:
        """Refuse values that would draw noise, or one code again and again, without a word."""
        expected = {
            "guidance_scale": ("a finite number >= 0", 0 <= self.guidance_scale < math.inf),
            "temperature": ("a finite number >= 0", 0 <= self.temperature < math.inf),
            "top_k": ("a whole number >= 0", self.top_k >= 0 and self.top_k == int(self.top_k)),
            "top_p": ("a number > 0 and <= 1", 0 < self.top_p <= 1),
        }
        for name, (what, holds) in expected.items():
            if not holds:  # nan holds nothing
                raise ValueError(f"{name} is {getattr(self, name)}; expected {what}")

    @property
    def is_guided(self) -> bool:
        """Tell whether each caption has a second row, of the null caption."""
        return self.guidance_scale != 1


def next_codes(hidden: Tensor, keys: Tensor, *, to_logits: Callable[[Tensor], Tensor], how: Draws) -> Tensor:
    """Sample one code per caption (B,) from hidden states (R, D), each by its own key (B,)."""
    logits = guided_logits(hidden, to_logits=to_logits, how=how)  # (B, codebook)
    return choose_codes(logits, keys, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)


def guided_logits(hidden: Tensor, *, to_logits: Callable[[Tensor], Tensor], how: Draws) -> Tensor:
    """Compute logits of the image codes (B, codebook), fp32 or wider, from hidden states (R, D)."""
    if how.is_guided and not how.mixes_logits:
        hidden = _guided(hidden, how).to(hidden.dtype)
    logits = widened(to_logits(hidden))
    return _guided(logits, how) if how.is_guided and how.mixes_logits else logits


def _guided(values: Tensor, how: Draws) -> Tensor:
    """Combine what conditional and unconditional rows (R, ...) have: (B, ...)."""
    # In fp32 or wider: their difference is small.
    conditional, unconditional = widened(values).chunk(2)
    return unconditional + how.guidance_scale * (conditional - unconditional)


def widened(numbers: Tensor) -> Tensor:
    """Return numbers of 16 bits in fp32; fp32 and fp64 stay."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def choose_codes(logits: Tensor, keys: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Sample one code per row of logits (B, codebook), each row by its own key (B,): (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    return race(*kept_codes(logits, temperature=temperature, top_k=top_k, top_p=top_p), keys)


def kept_codes(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the codes that may be sampled, N of them, and which they are: (B, N) each."""
    codebook = logits.shape[-1]
    count = min(top_k, codebook) if top_k else codebook
    if temperature == 0:
        order = logits.argmax(-1, keepdim=True)
        return logits.new_ones(order.shape), order
    if count == codebook and top_p == 1:
        # All codes are kept, so nothing has to be sorted.
        order = torch.arange(codebook, device=logits.device).expand_as(logits)
        kept = logits
    elif top_p == 1:
        kept, order = logits.topk(count, sorted=False)  # (B, count) each
    else:
        kept, order = logits.topk(count)  # sorted: top_p cuts at a cumulative sum
    probabilities = (kept / temperature).softmax(-1)
    if top_p < 1:
        # The probability of all likelier codes: the first code always stays, and so does the one that crosses top_p.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return probabilities, order


def race(probabilities: Tensor, codes: Tensor, keys: Tensor) -> Tensor:
    """Sample one code per row (B,) from the probabilities of some codes (B, N), each row by its own key (B,)."""
    # An exponential race: the argmax of p / wait is a sample of p. Waits are by code, so the order of ties is harmless.
    winner = (probabilities / waits(keys, codes)).argmax(-1, keepdim=True)
    return codes.gather(1, winner)[:, 0]


def image_keys(seeds: Tensor, *, num_codes: int) -> Tensor:
    """Derive a key for each code of each image from its seed (B,): (B, K), int64.

    Keys are hashes, not states of a generator, so they are the same on every device and in every batch.
    """
    return _scramble(_scramble(seeds)[:, None] + torch.arange(num_codes, device=seeds.device))


def waits(keys: Tensor, codes: Tensor) -> Tensor:
    """Draw an exponential variable for each code (B, N) by its row's key (B,): a hash, the same on every device."""
    # Hashed for the kept codes only: a generator would draw for the whole codebook, a fifth of a step's time.
    bits = _scramble(keys[:, None] + codes) & 0x7FFFFF  # 23 bits: with the half, as many as fp32 holds
    return -((bits.float() + 0.5) / 0x800000).log()


def _scramble(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, so that neighbouring numbers have unrelated hashes.

    Source: splitmix64 (https://doi.org/10.1145/2660193.2660195), whose gamma and multipliers these are, signed.
    """
    numbers = (numbers + 1) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ (numbers >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return numbers ^ (numbers >> 31 & 0x1FFFFFFFF)
