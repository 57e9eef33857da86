"""Cross-entropy separately for text, image and special tokens, as (sum, count), in fp32.

N counted positions, T ids of the vocabulary in a tile, D width, V vocabulary.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from t2i.model.softmax import Head, add_product, softmax_of
from t2i.tokens.sequence import IGNORED

CHUNK_LOGITS = 2**28
"""Logits that exist at one time on a GPU, 1 GiB in fp32; each chunk more is one more sum into the head's gradient."""
CPU_CHUNK_ROWS = 512
"""Positions whose logits exist at one time on a CPU, where more are no faster."""


@torch.no_grad()
def token_losses(
    hidden: Tensor, labels: Tensor, *, head: Head, image_rows: range | None = None
) -> tuple[Tensor, Tensor]:
    """Compute each position's cross-entropy and squared log-partition, without gradients.

    Logits exist in fp32, chunk by chunk, so memory does not grow with the batch. Padding costs nothing.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) next-token ids; -100 is not counted.
        head: the LM head, of V ids.
        image_rows: ids that the softmax of image labels is over; None for all ids everywhere.

    Returns:
        losses in nats and squared log-partitions, (B, S) fp32 each, exactly 0 where not counted.
    """
    flat, targets = hidden.flatten(0, 1), labels.flatten()  # (B S, D), (B S,)
    found = torch.zeros(2, len(targets), device=hidden.device)  # (2, B S)
    for places, rows in _parts(targets, num_rows=len(head), image_rows=image_rows):
        for chunk in _chunks(places, num_ids=len(rows)):
            softmax = softmax_of(flat[chunk], targets[chunk] - rows.start, head=head.of(rows))
            found[:, chunk] = torch.stack([softmax.losses, softmax.partitions.square()])
    losses, squares = found.view(2, *labels.shape)
    return losses, squares


def summed_loss(
    hidden: Tensor, labels: Tensor, *, head: Head, z_loss: float = 0.0, image_rows: range | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy, and z_loss times the squared log-partitions, as one number to train on.

    The gradient is computed in the forward pass, while a chunk's logits exist. This takes three products with the LM
    head; computing the logits again in the backward pass would take four.

    Args:
        hidden: (B, S, D) last hidden states.
        labels: (B, S) next-token ids; -100 is not counted.
        head: the LM head, of V ids.
        z_loss: weight of the squared log-partition.
        image_rows: as token_losses takes it.

    Returns:
        the sum, which has the gradient; losses and squared log-partitions (B, S) as token_losses returns them.
    """
    return _SummedLoss.apply(hidden, labels, head.weight, head.bias, head, z_loss, image_rows)


class _Context(FunctionCtx):
    """Autograd's context, with the gradients that the forward pass computed."""

    gradients: tuple[Tensor, Tensor, Tensor | None] | None
    head_scale: float


class _SummedLoss(torch.autograd.Function):
    """The sum over counted positions, and its gradient, computed chunk by chunk together with it."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        z_loss: float,
        image_rows: range | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat, targets = hidden.flatten(0, 1), labels.flatten()  # (B S, D), (B S,)
        found = torch.zeros(2, len(targets), device=hidden.device)
        hidden_gradient = torch.zeros_like(flat)  # (B S, D)
        # fp32 even for a bf16 head: every chunk adds to it, and bf16 would drop the later ones.
        bias_gradient = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)  # (V,)
        gradient = replace(head, weight=torch.zeros_like(weight, dtype=torch.float32), bias=bias_gradient)
        for places, rows in _parts(targets, num_rows=len(head), image_rows=image_rows):
            for chunk in _chunks(places, num_ids=len(rows)):
                found[:, chunk], hidden_gradient[chunk] = _chunk_gradient(
                    flat[chunk],
                    targets[chunk] - rows.start,
                    head=head.of(rows),
                    z_loss=z_loss,
                    gradient=gradient.of(rows),
                )
        # Not by save_for_backward: autograd would keep a reference, and then copy the large gradient of the head.
        ctx.gradients = (
            hidden_gradient.view_as(hidden),
            gradient.weight.to(weight.dtype),
            None if bias is None or bias_gradient is None else bias_gradient.to(bias.dtype),
        )
        ctx.head_scale = head.scale
        losses, squares = found.view(2, *labels.shape)
        ctx.mark_non_differentiable(losses, squares)
        return found[0].sum() + z_loss * found[1].sum(), losses, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the backward pass runs once"
        (hidden, weight, bias), ctx.gradients = ctx.gradients, None
        scale = scale * ctx.head_scale
        # In place, because the head's gradient is large. This is why the backward pass can run only once.
        bias = bias if bias is None else bias.mul_(scale)
        return hidden.mul_(scale), None, weight.mul_(scale), bias, None, None, None


def _chunk_gradient(
    rows: Tensor, targets: Tensor, *, head: Head, z_loss: float, gradient: Head
) -> tuple[Tensor, Tensor]:
    """Compute a chunk's losses and squared log-partitions (2, N) and its gradient (N, D), before the head's scale.

    Its part of the head's gradient is added to `gradient`. The gradient of a logit is weight * power, minus one at the
    target, all times the slope of the cap. Weights are per position and stay outside the products, so that powers
    (N, T) are not rewritten.
    """
    tiles: list[tuple[Tensor, Tensor]] = []
    found = softmax_of(rows, targets, head=head, tiles=tiles)
    # d(loss + z_loss * partition^2) / d(logit): the softmax is power / sum, and the z-loss scales it.
    weights = (1 + 2 * z_loss * found.partitions[:, None]) / found.sums  # (N, 1)
    weighted = rows.float() * weights  # (N, D)
    for (powers, largest), part in zip(tiles, gradient.tiles(), strict=True):
        # The factor brings a tile's powers to the final maximum. A name would keep its (N, D) beside the next one's.
        factor = (largest - found.largest).exp()  # (N, 1)
        add_product(part.weight, first=powers.T, second=(weighted * factor).to(head.weight.dtype))
        if part.bias is not None:
            part.bias.add_((powers.T.float() @ (weights * factor))[:, 0])
    # The rest of the softmax's gradient: minus one at the target, of which there is one per position.
    slopes = torch.ones_like(weights) if found.slopes is None else found.slopes  # (N, 1)
    gradient.weight.index_add_(0, targets, rows.float() * slopes, alpha=-1)
    if gradient.bias is not None:
        gradient.bias.index_add_(0, targets, slopes[:, 0], alpha=-1)
    own = found.mixed.mul_(weights) - head.weight[targets].float() * slopes
    return torch.stack([found.losses, found.partitions.square()]), own.to(rows.dtype)


def _parts(targets: Tensor, *, num_rows: int, image_rows: range | None) -> list[tuple[Tensor, range]]:
    """Find the places of counted targets (B S,), and the part of the vocabulary that their softmax is over."""
    counted = targets != IGNORED
    if image_rows is None:
        return [(counted.nonzero()[:, 0], range(num_rows))]
    is_image = (targets >= image_rows.start) & (targets < image_rows.stop)
    others = (counted & ~is_image).nonzero()[:, 0]
    return [(is_image.nonzero()[:, 0], image_rows), (others, range(num_rows))]


def _chunks(places: Tensor, *, num_ids: int) -> tuple[Tensor, ...]:
    """Split places (N,) into the fewest chunks of one size, since each reads the head and its gradient once."""
    most = CPU_CHUNK_ROWS if places.device.type == "cpu" else max(1, CHUNK_LOGITS // num_ids)
    return places.tensor_split(max(1, math.ceil(len(places) / most)))


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
