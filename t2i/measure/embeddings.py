"""Are image rows near text rows? Nearest text tokens by cosine, beside text-to-text and random rows; linear CKA."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import UserError
from t2i.files import write_json
from t2i.model.backbone import head_of
from t2i.runs.loading import OpenedModel

CHUNK_EMBEDDINGS = 1_024
NEAREST = "nearest.json"
RowKind = Literal["image", "text", "random"]
ROW_KINDS: tuple[RowKind, ...] = ("image", "text", "random")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Nearness:
    """Cosine similarity of each row to its nearest text row, of three kinds of rows."""

    image: Tensor
    """(codebook,) image rows to text rows."""
    text: Tensor
    """(T,) text rows to other text rows: how near things that mean something are."""
    random: Tensor
    """(codebook,) normal draws with the image rows' mean and deviation of each dimension: how near nothing is."""
    tokens: Tensor
    """(codebook, k) ids of the nearest text tokens of each code, nearest first."""


@torch.inference_mode()
def nearness(image_rows: Tensor, text_rows: Tensor, *, num_nearest: int = 5, seed: int = 0) -> Nearness:
    """Compare image rows (N, D) with text rows (T, D).

    Source: paper, nearest text tokens of image tokens.
    """
    image_rows, text_rows = image_rows.float().cpu(), text_rows.float().cpu()
    # A normal of the same mean and deviation: cosines depend on both, in this many dimensions strongly.
    noise = torch.randn(image_rows.shape, generator=torch.Generator().manual_seed(seed))
    random_rows = image_rows.mean(0) + noise * image_rows.std(0)
    image, tokens = nearest_of(image_rows, text_rows, count=num_nearest)
    text, _ = nearest_of(text_rows, text_rows, count=2)  # the nearest of all is the row itself
    random, _ = nearest_of(random_rows, text_rows, count=1)
    return Nearness(image=image[:, 0], text=text[:, 1], random=random[:, 0], tokens=tokens)


def nearest_of(rows: Tensor, others: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` most similar of others (M, D) for rows (N, D): cosines and places, (N, count) each."""
    others = F.normalize(others, dim=-1)
    found = [
        (F.normalize(chunk, dim=-1) @ others.T).topk(min(count, len(others)), dim=-1)
        for chunk in rows.split(CHUNK_EMBEDDINGS)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Compare two sets of rows (N, D1) and (N, D2) of the same things: 1 for rotated copies, near 0 if unrelated.

    Source: Kornblith et al. 2019, linear centred kernel alignment.
    """
    first, second = (rows.double() - rows.double().mean(0) for rows in (first, second))
    # By features (D1, D2), not by pairs of rows (N, N), which are many more.
    cross = (first.T @ second).norm() ** 2
    return float(cross / ((first.T @ first).norm() * (second.T @ second).norm()))


@dataclass(frozen=True)
class SideRows:
    """One space of embeddings, that of the inputs or that of the LM head."""

    image: Tensor
    """(codebook, D)."""
    text: Tensor
    """(T, D), of tokens that a text can have."""


@dataclass(frozen=True)
class SideNearness:
    """How near one space's image embeddings are to its text embeddings."""

    nearness: Nearness
    nearest_tokens: list[list[str]]
    """Of each code, nearest first."""
    cka: float | None
    """Linear CKA of image embeddings before and after; None where there is no before."""

    @property
    def random_nearer(self) -> float:
        """How often a random row is nearer to text than an image row; at 0.5 image rows are as near as noise."""
        return random_nearer(self.nearness.image, self.nearness.random)

    def quantiles(self, kind: RowKind) -> dict[str, float]:
        """Compute QUANTILES of one kind's cosines, by two-digit name."""
        cosines = getattr(self.nearness, kind).numpy()
        return {f"{q:.2f}": float(np.quantile(cosines, q)) for q in QUANTILES}

    def to_json(self) -> dict[str, object]:
        """Give it the form of a side in nearest.json."""
        found: dict[str, object] = {kind: self.quantiles(kind) for kind in ROW_KINDS}
        found |= {"compared": {"random_nearer": self.random_nearer}, "nearest_tokens": self.nearest_tokens}
        found["cosines"] = {kind: getattr(self.nearness, kind).tolist() for kind in ROW_KINDS}
        return found if self.cka is None else found | {"cka": self.cka}


def rows_of(model: OpenedModel) -> dict[str, SideRows]:
    """Return the embeddings of both sides, "input" and "output"."""
    layout = model.layout
    first, last = layout.first_image_id, layout.first_image_id + layout.codebook_size
    sides: dict[str, Tensor] = {
        "input": cast(nn.Embedding, model.model.get_input_embeddings()).weight,
        "output": head_of(model.model),
    }
    return {
        # Only text rows that a token uses: padding rows were never trained, so being near one means nothing.
        name: SideRows(weight.detach()[first:last], weight.detach()[: layout.num_text_tokens])
        for name, weight in sides.items()
    }


def compare_rows(model: OpenedModel, *, before: OpenedModel | None) -> dict[str, SideNearness]:
    """Compare both spaces of rows; `before` (None: nothing to compare with) adds linear CKA of image rows.

    Raises:
        UserError: a model without image codes, or two models with other numbers of them.
    """
    if not model.layout.codebook_size:
        raise UserError(f"{model.folder} is a language model without image codes.")
    if before is not None and before.layout.codebook_size != model.layout.codebook_size:
        found, expected = before.layout.codebook_size, model.layout.codebook_size
        raise UserError(f"{before.folder} has {found} image codes; {model.folder} has {expected}.")
    earlier = rows_of(before) if before is not None else {}
    results = {}
    for side, rows in rows_of(model).items():
        near = nearness(rows.image, rows.text)
        results[side] = SideNearness(
            near,
            nearest_tokens=[
                [model.text_tokenizer.decode(one[None]) for one in tokens] for tokens in near.tokens
            ],
            cka=linear_cka(earlier[side].image, rows.image) if earlier else None,
        )
    return results


def write_nearest(results: dict[str, SideNearness], *, model: OpenedModel, out: Path | None) -> Path:
    """Write nearest.json, by default (None) into the model's run or folder; return its path."""
    path = out or model.home / NEAREST
    sides = {side: found.to_json() for side, found in results.items()}
    write_json(path, {"checkpoint": str(model.folder), **sides})
    return path


def random_nearer(image: Tensor, random: Tensor) -> float:
    """Estimate the chance that a random row's cosine is above an image row's; ties count half."""
    order = image.sort().values
    below = torch.searchsorted(order, random, right=False)
    upto = torch.searchsorted(order, random, right=True)
    return float(((below + upto).double() / 2).mean() / len(image))
