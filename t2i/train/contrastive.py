"""The contrastive loss between image embeddings and a frozen language model's text embeddings (paper, Figure 7).

A caption is the mean of its tokens' embeddings, an image the mean of its codes' embeddings. CLIP's loss over N pairs
trains the image embeddings and a temperature. Where the LM head is not tied, it is a second space, aligned in itself.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.model.contrastive_loss import contrastive_loss
from t2i.model.resize import new_rows
from t2i.tokens.vocab import VocabLayout


class AlignedRows(nn.Module):
    """One space: frozen text embeddings, trainable image embeddings and a trainable temperature."""

    def __init__(self, text_rows: Tensor, *, layout: VocabLayout, temperature: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = new_rows(text_rows, count=layout.codebook_size, kind="random", generator=generator)
        # A buffer, so that it moves with the module; not saved, since it is the language model's own.
        self.register_buffer("text_rows", text_rows, persistent=False)  # (V_text, D)
        self.image_rows = nn.Parameter(rows)  # (codebook, D)
        # The logarithm of the inverse temperature is trained, as in CLIP: the temperature then stays positive.
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())
        self.layout = layout

    def bags(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Average the embeddings of sequences (B, S): image and text features, (B, D) each, of length one."""
        is_text = input_ids < self.layout.num_text_rows  # (B, S); markers are in neither average
        codes = input_ids - self.layout.first_image_id
        is_image = (codes >= 0) & (codes < self.layout.codebook_size)
        image = _bag(self.image_rows, codes, is_image)
        text = _bag(self.get_buffer("text_rows"), input_ids, is_text)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    @property
    def temperature(self) -> float:
        """The temperature that similarities are divided by."""
        return float((-self.log_scale.detach()).exp())

    def scaled(self) -> Tensor:
        """Return image embeddings (codebook, D), scaled to the mean length of text embeddings."""
        # CLIP's loss normalises, so it says nothing of length; the language model expects that of its text.
        return _as_long(self.image_rows.detach(), self.get_buffer("text_rows"))

    def around_text(self) -> Tensor:
        """Return image embeddings (codebook, D) around the mean of text embeddings, as far from it as these."""
        rows, text = self.image_rows.detach(), self.get_buffer("text_rows")
        return text.mean(0) + _as_long(rows - rows.mean(0), text - text.mean(0))


def gathered(features: Tensor) -> Tensor:
    """Stack this rank's features (B, D) with all others' (N, D); a gradient flows to this rank's own alone."""
    if dist.get_world_size() == 1:
        return features
    # all_gather has no gradient here, so this rank's own features are put back with theirs.
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features.detach().contiguous())
    parts[dist.get_rank()] = features
    return torch.cat(parts)


def loss_and_gradient(side: AlignedRows, input_ids: Tensor) -> float:
    """Add the gradient of the loss over all ranks' pairs to `side` on every rank; return the loss.

    Each rank knows the whole loss, but differentiates it through its own images. The sum over ranks is the gradient of
    the image embeddings. The temperature's gradient is whole on each rank already.
    """
    image, text = side.bags(input_ids)
    loss = contrastive_loss(gathered(image), gathered(text), log_scale=side.log_scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert side.image_rows.grad is not None
    dist.all_reduce(side.image_rows.grad)
    return float(loss.detach())


@torch.no_grad()
def retrieval_hits(image: Tensor, text: Tensor, *, styles: Tensor) -> dict[str, Tensor]:
    """Tell of each of N whether the nearest of its style is the right one, both ways: (N,) each.

    Args:
        styles: (N,) numbers of what the images are drawn in, which a caption names: found among all, a caption would
            be found for its style.

    Returns:
        Of each 1 or 0, and 1 / k where k are equally near.
    """
    similarities = (image @ text.T).masked_fill(styles[:, None] != styles, -torch.inf)
    return {"image_to_text": _top_one(similarities), "text_to_image": _top_one(similarities.T)}


def retrieval_accuracy(hits: dict[str, Tensor], *, styles: Tensor) -> dict[str, float]:
    """Average hits (N,) of both ways, beside what chance gives among the images of one style (styles: (N,))."""
    shares = {name: float(one.mean()) for name, one in hits.items()}
    return shares | {"chance": len(styles.unique()) / len(styles)}


def _as_long(rows: Tensor, text: Tensor) -> Tensor:
    return rows * (text.norm(dim=-1).mean() / rows.norm(dim=-1).mean())


def _bag(rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Average embeddings (V, D) of the marked ids (B, S): (B, D); zero where none is marked."""
    # embedding_bag sums without making (B, S, D), which would be large at N = 1,024 pairs of 1,024 codes.
    weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return F.embedding_bag(ids.where(mask, 0), rows, per_sample_weights=weights.to(rows.dtype), mode="sum")


def _top_one(similarities: Tensor) -> Tensor:
    best = similarities.amax(-1, keepdim=True)
    is_best = similarities == best
    # Ties share: features that are all alike must score chance, not 1.
    return is_best.diagonal() / is_best.sum(-1)
