"""Cross-entropy separately for text, image and special tokens, as (sum, count), in fp32.

N counted positions, T ids of the vocabulary in a tile, D width, V vocabulary.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from t2i.tokens.sequence import IGNORED

LOG2_E = math.log2(math.e)
CHUNK_LOGITS = 2**28
"""Logits that exist at one time on a GPU, 1 GiB in fp32; each chunk more is one more sum into the head's gradient."""
CPU_CHUNK_ROWS = 512
"""Positions whose logits exist at one time on a CPU, where more are no faster."""
CPU_TILE_ROWS = 2_048
"""Ids whose logits exist at one time on a CPU: with CPU_CHUNK_ROWS, four megabytes, which stay in its cache."""


@torch.no_grad()
def token_losses(
    hidden: Tensor, labels: Tensor, *, head: Tensor, image_rows: range | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each position's cross-entropy and squared log-partition, without gradients.

    Logits exist in fp32, chunk by chunk, so memory does not grow with the batch. Padding costs nothing.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) next-token ids; -100 is not counted.
        head: (V, D) output weights.
        image_rows: ids that the softmax of image labels is over; None for all ids everywhere.

    Returns:
        losses in nats and squared log-partitions, (B, S) fp32 each, exactly 0 where not counted.
    """
    flat, targets = hidden.flatten(0, 1), labels.flatten()  # (B S, D), (B S,)
    found = torch.zeros(2, len(targets), device=hidden.device)  # (2, B S)
    for places, rows in _parts(targets, num_rows=len(head), image_rows=image_rows):
        for chunk in _chunks(places, num_ids=len(rows)):
            softmax = _softmax(flat[chunk], targets[chunk] - rows.start, head=head[rows.start : rows.stop])
            found[:, chunk] = torch.stack([softmax.losses, softmax.partitions.square()])
    losses, squares = found.view(2, *labels.shape)
    return losses, squares


def summed_loss(
    hidden: Tensor, labels: Tensor, *, head: Tensor, z_loss: float = 0.0, image_rows: range | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy, and z_loss times the squared log-partitions, as one number to train on.

    The gradient is computed in the forward pass, while a chunk's logits exist. This takes three products with the LM
    head; computing the logits again in the backward pass would take four.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) next-token ids; -100 is not counted.
        head: (V, D) output weights.
        z_loss: weight of the squared log-partition.
        image_rows: as token_losses takes it.

    Returns:
        the sum, which has the gradient; losses and squared log-partitions (B, S) as token_losses returns them.
    """
    return _SummedLoss.apply(hidden, labels, head, z_loss, image_rows)


class _Context(FunctionCtx):
    """Autograd's context, with the gradients that the forward pass computed."""

    gradients: tuple[Tensor, Tensor] | None


class _SummedLoss(torch.autograd.Function):
    """The sum over counted positions, and its gradient, computed chunk by chunk together with it."""

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, labels: Tensor, head: Tensor, z_loss: float, image_rows: range | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat, targets = hidden.flatten(0, 1), labels.flatten()  # (B S, D), (B S,)
        found = torch.zeros(2, len(targets), device=hidden.device)
        hidden_gradient = torch.zeros_like(flat)  # (B S, D)
        # fp32 even for a bf16 head: every chunk adds to it, and bf16 would drop the later ones.
        head_gradient = torch.zeros_like(head, dtype=torch.float32)  # (V, D)
        for places, rows in _parts(targets, num_rows=len(head), image_rows=image_rows):
            own = slice(rows.start, rows.stop)
            for chunk in _chunks(places, num_ids=len(rows)):
                found[:, chunk], hidden_gradient[chunk] = _chunk_gradient(
                    flat[chunk],
                    targets[chunk] - rows.start,
                    head=head[own],
                    z_loss=z_loss,
                    head_gradient=head_gradient[own],
                )
        # Not by save_for_backward: autograd would keep a reference, and then copy the large gradient of the head.
        ctx.gradients = hidden_gradient.view_as(hidden), head_gradient.to(head.dtype)
        losses, squares = found.view(2, *labels.shape)
        ctx.mark_non_differentiable(losses, squares)
        return found[0].sum() + z_loss * found[1].sum(), losses, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, scale: Tensor, *_: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        assert ctx.gradients is not None, "the backward pass runs once"
        (hidden_gradient, head_gradient), ctx.gradients = ctx.gradients, None
        # In place, because the head's gradient is large. This is why the backward pass can run only once.
        return hidden_gradient.mul_(scale), None, head_gradient.mul_(scale), None, None


def _chunk_gradient(
    rows: Tensor, targets: Tensor, *, head: Tensor, z_loss: float, head_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a chunk's losses and squared log-partitions (2, N) and its gradient (N, D).

    Its part of the head's gradient is added to head_gradient (V, D). The gradient of a logit is weight * power, minus
    one at the target. Weights are per position and stay outside the products, so that powers (N, T) are not rewritten.
    """
    tiles: list[tuple[Tensor, Tensor]] = []
    found = _softmax(rows, targets, head=head, tiles=tiles)
    # d(loss + z_loss * partition^2) / d(logit): the softmax is power / sum, and the z-loss scales it.
    weights = (1 + 2 * z_loss * found.partitions[:, None]) / found.sums  # (N, 1)
    weighted = rows.float() * weights  # (N, D)
    for (powers, largest), gradient in zip(tiles, head_gradient.split(_tile_rows(head)), strict=True):
        # The factor brings a tile's powers to the final maximum. A name would keep its (N, D) beside the next one's.
        factor = (largest - found.largest).exp()  # (N, 1)
        _add_product(gradient, first=powers.T, second=(weighted * factor).to(head.dtype))
    # The rest of the softmax's gradient: minus one at the target, of which there is one per position.
    head_gradient.index_add_(0, targets, rows.float(), alpha=-1)
    own = found.mixed.mul_(weights) - head[targets].float()
    return torch.stack([found.losses, found.partitions.square()]), own.to(rows.dtype)


def _parts(targets: Tensor, *, num_rows: int, image_rows: range | None) -> list[tuple[Tensor, range]]:
    """Find the places of counted targets (B S,), and the part of the vocabulary that their softmax is over."""
    counted = targets != IGNORED
    if image_rows is None:
        return [(counted.nonzero()[:, 0], range(num_rows))]
    is_image = (targets >= image_rows.start) & (targets < image_rows.stop)
    others = (counted & ~is_image).nonzero()[:, 0]
    return [(is_image.nonzero()[:, 0], image_rows), (others, range(num_rows))]


@dataclass(frozen=True)
class _Softmax:
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
    """(N, D) products of powers and head; zeros if no tiles are kept."""


def _softmax(
    rows: Tensor, targets: Tensor, *, head: Tensor, tiles: list[tuple[Tensor, Tensor]] | None = None
) -> _Softmax:
    """Read the head once, in tiles of T ids, so that a tile's logits stay in the processor's cache.

    Args:
        tiles: receives the powers (N, T) of each tile and the logits (N, 1) that they are relative to; None keeps none.

    Source: the running maximum of online softmax (arXiv:1805.02867).
    """
    largest = torch.full((len(rows), 1), -torch.inf, device=rows.device)
    sums, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
    mixed = torch.zeros(rows.shape, device=rows.device)
    places = targets[:, None]
    with torch.autocast(rows.device.type, enabled=False):  # autocast would round fp32 products to bf16
        for part in head.split(_tile_rows(head)):
            logits = F.linear(rows, part.to(rows.dtype)).float()  # (N, T)
            # A target is in one tile only; in the others its place is outside, and the logit found is kept.
            is_inside = (places >= 0) & (places < len(part))
            found = logits.gather(1, places.clamp(0, len(part) - 1))
            wanted = torch.where(is_inside, found, wanted)
            places = places - len(part)
            before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
            shrink = (before - largest).exp()  # brings the sums so far to the new maximum; 0 at first
            # exp(logit - largest), in place: logits are most of a step's memory. Powers of two take half the time.
            powers = torch.add(largest * -LOG2_E, logits, alpha=LOG2_E, out=logits).exp2_()
            sums = sums * shrink + powers.sum(-1, keepdim=True)
            if tiles is not None:
                tiles.append((powers.to(head.dtype), largest))
                _add_product(mixed.mul_(shrink), first=tiles[-1][0], second=part)
    partitions = largest + sums.log()
    return _Softmax((partitions - wanted)[:, 0], partitions[:, 0], largest, sums, mixed)


def _add_product(total: Tensor, *, first: Tensor, second: Tensor) -> None:
    """Add first @ second to a total in fp32."""
    if first.dtype == torch.float32:
        total.addmm_(first, second)
    else:
        total += first @ second


def _chunks(places: Tensor, *, num_ids: int) -> tuple[Tensor, ...]:
    """Split places (N,) into the fewest chunks of one size, since each reads the head and its gradient once."""
    most = CPU_CHUNK_ROWS if places.device.type == "cpu" else max(1, CHUNK_LOGITS // num_ids)
    return places.tensor_split(max(1, math.ceil(len(places) / most)))


def _tile_rows(head: Tensor) -> int:
    """Return the number of ids in a tile: few for a CPU's cache, all on a GPU."""
    return CPU_TILE_ROWS if head.device.type == "cpu" else len(head)


@dataclass(frozen=True)
class LossSums:
    """Losses in nats, summed by the class of the label, and token counts to divide by: each a tensor of shape ().

    Added over micro-batches and ranks and divided once, at the end: a mean of means would favour short batches.
    """

    text: Tensor
    image: Tensor
    special: Tensor
    text_tokens: Tensor
    image_tokens: Tensor
    special_tokens: Tensor
    z: Tensor
    """Squared log-partitions of all these tokens, not yet weighted by train.z_loss."""

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            *(mine + theirs for mine, theirs in zip(self._values(), other._values(), strict=True))
        )

    def scaled(self, factor: float) -> "LossSums":
        """Multiply the losses, not the counts."""
        return replace(
            self, text=self.text * factor, image=self.image * factor, special=self.special * factor
        )

    def pack(self) -> Tensor:
        """Put all fields into one tensor (NUM_SUMS,) in fp64, which holds counts exactly, to reduce them at once."""
        return torch.stack([value.double() for value in self._values()])

    @classmethod
    def unpack(cls, values: Tensor) -> "LossSums":
        """Name the fields again of a tensor that pack made and that was summed since."""
        return cls(*values.unbind())

    def tokens(self) -> Tensor:
        """Count the tokens of all classes."""
        return self.text_tokens + self.image_tokens + self.special_tokens

    def by_kind(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Pair nats and tokens of text, image and special."""
        return {
            "text": (self.text, self.text_tokens),
            "image": (self.image, self.image_tokens),
            "special": (self.special, self.special_tokens),
        }

    def mean(self, kind: str) -> float | None:
        """Return nats per token of text, image or special; None if no token was counted."""
        nats, count = self.by_kind()[kind]
        return (nats / count).item() if count else None

    def _values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


NUM_SUMS = len(fields(LossSums))
"""Length of the tensor that LossSums.pack makes."""


def split_sums(
    losses: Tensor, labels: Tensor, *, squares: Tensor, num_text_rows: int, first_image_id: int
) -> LossSums:
    """Sum losses (B, S) separately by the class of the label.

    Args:
        squares: (B, S) squared log-partitions, 0 where no token is counted.

    Source: paper sec. 2.2, Figure 4.
    """
    kinds = kinds_of(labels, num_text_rows=num_text_rows, first_image_id=first_image_id)
    sums = {kind: losses.where(mask, 0).sum() for kind, mask in kinds.items()}
    counts = {f"{kind}_tokens": mask.sum() for kind, mask in kinds.items()}
    return LossSums(**sums, **counts, z=squares.sum())


def kinds_of(labels: Tensor, *, num_text_rows: int, first_image_id: int) -> dict[str, Tensor]:
    """Mark the labels (B, S) of each class; -100 is in none of them."""
    is_text = (labels >= 0) & (labels < num_text_rows)
    is_image = labels >= first_image_id
    is_special = (labels >= num_text_rows) & ~is_image
    return {"text": is_text, "image": is_image, "special": is_special}
