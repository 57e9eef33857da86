"""The codebook of an image tokenizer in training: codes follow their latents, and begin at clusters of them."""

import torch
from torch import Tensor
from tqdm import tqdm

from t2i.errors import DataError

KMEANS_ITERATIONS = 20
AT_ONCE = 2**26
"""Distances held in memory at once: a quarter of a gigabyte."""
MANY_CODES = 4_096
"""From so many on, an iteration takes seconds."""


class Codebook:
    """Codes as exponential averages of the latents that chose them.

    Source: van den Oord et al. 2017, Neural discrete representation learning, appendix A.1.
    """

    def __init__(self, weight: Tensor, *, decay: float, counts: Tensor | None = None) -> None:
        # Updated in place, because it is the model's own parameter.
        self.weight = weight  # (N, C)
        self.decay = decay
        self.counts = weight.new_ones(len(weight)) if counts is None else counts
        self.sums = weight.detach() * self.counts[:, None]

    def count_as(self, count: float) -> None:
        """Weigh codes as if each had been chosen so many times per step until now."""
        self.counts.fill_(count)
        self.sums.copy_(self.weight * count)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the nearest codes (M,) of latents (M, C)."""
        return torch.cdist(latents, self.weight).argmin(1)

    @torch.no_grad()
    def follow(self, latents: Tensor, codes: Tensor) -> None:
        """Move each code towards the mean of the latents that chose it."""
        ones = torch.ones_like(latents[:, 0])
        zeros = torch.zeros_like(self.counts)
        self.counts.lerp_(zeros.index_add(0, codes, ones), 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add(0, codes, latents), 1 - self.decay)
        # A code that no latent chose stays where it is: its sum and its count have both faded to nothing.
        used = (self.counts > 1e-4)[:, None]
        self.weight.copy_(torch.where(used, self.sums / self.counts[:, None], self.weight))

    @torch.no_grad()
    def revive(self, latents: Tensor, *, generator: torch.Generator) -> int:
        """Move codes with less than 3% of the mean count onto random latents; return how many."""
        even_share = float(self.counts.mean())
        dead = (self.counts < 0.03 * even_share).nonzero().flatten()
        picks = torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)
        self.weight[dead] = latents[picks]
        # With the mean count, or the next average would move the code far, or count it as unused again.
        self.counts[dead] = even_share
        self.sums[dead] = latents[picks] * even_share
        return len(dead)


def kmeans(points: Tensor, *, num_centres: int, generator: torch.Generator) -> Tensor:
    """Cluster points (M, C) into centres (N, C) by Lloyd's iterations, starting from random points.

    Raises:
        DataError: there are fewer points than centres.
    """
    if len(points) < num_centres:
        raise DataError(
            f"{len(points)} latents are too few for {num_centres} codes: use more images or fewer codes."
        )
    centres = points[torch.randperm(len(points), generator=generator)[:num_centres].to(points.device)].clone()
    for _ in tqdm(
        range(KMEANS_ITERATIONS), desc="first codes", unit="iteration", disable=num_centres < MANY_CODES
    ):
        distances, nearest = _nearest(points, centres)
        counts = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        empty = counts == 0
        centres = sums / counts.clamp(min=1)[:, None]
        # An empty cluster is moved onto a point that its centre serves worst, or its code would never be
        # used.
        centres[empty] = points[distances.topk(int(empty.sum())).indices]
    return centres


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's distance (M,) to its nearest centre, and that centre's index (M,)."""
    blocks = [torch.cdist(block, centres).min(1) for block in points.split(max(1, AT_ONCE // len(centres)))]
    return torch.cat([found.values for found in blocks]), torch.cat([found.indices for found in blocks])
