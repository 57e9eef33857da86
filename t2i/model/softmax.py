"""The LM head of any class, and the softmax over its logits, tile by tile.

N positions, T ids of the vocabulary in a tile, D width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
CPU_TILE_ROWS = 2_048
"""Ids whose logits exist at one time on a CPU: with CPU_CHUNK_ROWS, four megabytes, which stay in its cache."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: cap * tanh((weight hidden + bias) * scale / cap)."""

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None = None
    """(V,); None for none, as in most classes."""
    scale: float = 1.0
    """1 in most classes; Granite and Cohere have another."""
    cap: float | None = None
    """No logit is larger, as in Gemma 2; None for no cap."""

    def __len__(self) -> int:
        return len(self.weight)

    def equals(self, other: "Head") -> bool:
        """Tell whether another head computes the same logits, bit for bit."""
        if (self.scale, self.cap, self.bias is None) != (other.scale, other.cap, other.bias is None):
            return False
        has_same_bias = self.bias is None or torch.equal(self.bias, cast(Tensor, other.bias))
        return has_same_bias and torch.equal(self.weight, other.weight)

    def of(self, ids: range) -> "Head":
        """Return the part of these ids."""
        rows = slice(ids.start, ids.stop)
        return replace(self, weight=self.weight[rows], bias=None if self.bias is None else self.bias[rows])

    def tiles(self) -> list["Head"]:
        """Split the vocabulary: into few ids for a CPU's cache, not at all for a GPU."""
        size = CPU_TILE_ROWS if self.weight.device.type == "cpu" else len(self)
        starts = range(0, len(self), max(1, size))
        return [self.of(range(start, min(start + size, len(self)))) for start in starts]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (..., V), in fp32, of hidden states (..., D)."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return self.shaped(F.linear(hidden, self.weight.to(hidden.dtype), bias).float())

    def shaped(self, products: Tensor) -> Tensor:
        """Turn products of weight and hidden states, bias included, into logits."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor:
        """Return the derivative of capped logits after those before the cap, of a head that has one."""
        assert self.cap is not None
        return 1 - (logits / self.cap).square()


@dataclass(frozen=True)
class Softmax:
    """The softmax of N positions, in fp32; powers are exp(logit - largest)."""

    losses: Tensor
    """(N,) nats of the targets."""
    partitions: Tensor
    """(N,) logarithms of the sums of exp(logit)."""
    largest: Tensor
    """(N, 1) largest logits."""
    sums: Tensor
    """(N, 1) sums of powers."""
    mixed: Tensor
    """(N, D) products of powers, each times its slope, and head; zeros if no tiles are kept."""
    slopes: Tensor | None
    """(N, 1) slopes of the targets' logits; None for a head without a cap, where they are 1."""


def softmax_of(
    rows: Tensor, targets: Tensor, *, head: Head, tiles: list[tuple[Tensor, Tensor]] | None = None
) -> Softmax:
    """Read the head once, in tiles of T ids, so that a tile's logits stay in the processor's cache.

    Args:
        tiles: receives the powers (N, T) of each tile, times their slopes, and the logits (N, 1) that the powers are
            relative to; None keeps none.

    Source: the running maximum of online softmax (arXiv:1805.02867).
    """
    largest = torch.full((len(rows), 1), -torch.inf, device=rows.device)
    sums, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
    mixed = torch.zeros(rows.shape, device=rows.device)
    places = targets[:, None]
    with torch.autocast(rows.device.type, enabled=False):  # autocast would round fp32 products to bf16
        for part in head.tiles():
            logits = part.logits(rows)  # (N, T)
            # A target is in one tile only; in the others its place is outside, and the logit found is kept.
            is_inside = (places >= 0) & (places < len(part))
            found = logits.gather(1, places.clamp(0, len(part) - 1))
            wanted = torch.where(is_inside, found, wanted)
            places = places - len(part)
            slopes = None if tiles is None or head.cap is None else head.slope(logits)
            before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
            shrink = (before - largest).exp()  # brings the sums so far to the new maximum; 0 at first
            # exp(logit - largest), in place: logits are most of a step's memory. Powers of two take half the time.
            powers = torch.add(largest * -LOG2_E, logits, alpha=LOG2_E, out=logits).exp2_()
            sums = sums * shrink + powers.sum(-1, keepdim=True)
            if tiles is not None:
                powers = powers if slopes is None else powers.mul_(slopes)
                tiles.append((powers.to(head.weight.dtype), largest))
                add_product(mixed.mul_(shrink), first=tiles[-1][0], second=part.weight)
    partitions = largest + sums.log()
    slopes = None if head.cap is None else head.slope(wanted)
    return Softmax((partitions - wanted)[:, 0], partitions[:, 0], largest, sums, mixed, slopes)


def add_product(total: Tensor, *, first: Tensor, second: Tensor) -> None:
    """Add first @ second to a total in fp32."""
    if first.dtype == torch.float32:
        total.addmm_(first, second)
    else:
        total += first @ second
