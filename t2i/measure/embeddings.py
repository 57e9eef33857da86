"""Are image embeddings near text embeddings? Nearest text tokens by cosine, with controls; linear CKA."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.data.shards.manifest import read_manifest_file
from t2i.errors import UserError
from t2i.files import write_json
from t2i.model.backbone import head_of
from t2i.runs.loading import DATA_MANIFEST, OpenedModel

CHUNK_EMBEDDINGS = 1_024
NEAREST = "nearest.json"
RowKind = Literal["image", "text", "random"]
ROW_KINDS: tuple[RowKind, ...] = ("image", "text", "random")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Nearness:
    """Cosine similarity to the nearest text embedding, for three kinds of embeddings."""

    image: Tensor
    """(codebook,) image embeddings to text embeddings."""
    text: Tensor
    """(T,) text embeddings to other text embeddings: how near embeddings with a meaning are."""
    random: Tensor
    """(codebook,) normal draws with the image embeddings' mean and deviation per dimension: the control."""
    tokens: Tensor
    """(codebook, k) ids of the nearest text tokens of each code, nearest first."""


@torch.inference_mode()
def nearness(image_rows: Tensor, text_rows: Tensor, *, num_nearest: int = 5, seed: int = 0) -> Nearness:
    """Compare image embeddings (N, D) with text embeddings (T, D).

    Source: paper, nearest text tokens of image tokens.

    Raises:
        UserError: fewer than two embeddings of a kind.
    """
    # One has no deviation to draw controls with, and no other text embedding to be near to.
    if min(len(image_rows), len(text_rows)) < 2:
        raise UserError(
            f"there are {len(image_rows)} image and {len(text_rows)} text embeddings; expected at least 2 of each."
        )
    image_rows, text_rows = image_rows.float().cpu(), text_rows.float().cpu()
    # Of the same mean and deviation, for cosines depend on both: plain noise would look far from text for that alone.
    noise = torch.randn(image_rows.shape, generator=torch.Generator().manual_seed(seed))
    random_rows = image_rows.mean(0) + noise * image_rows.std(0)
    image, tokens = nearest_of(image_rows, text_rows, count=num_nearest)
    text, _ = nearest_of(text_rows, text_rows, count=2)  # the nearest of all is the embedding itself
    random, _ = nearest_of(random_rows, text_rows, count=1)
    return Nearness(image=image[:, 0], text=text[:, 1], random=random[:, 0], tokens=tokens)


def nearest_of(rows: Tensor, others: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` most similar of others (M, D) for each of rows (N, D): cosines and indices, (N, count) each."""
    others = F.normalize(others, dim=-1)
    # In chunks: cosines of 16,384 codes to 50,000 tokens would be 3 GB at once.
    found = [
        (F.normalize(chunk, dim=-1) @ others.T).topk(min(count, len(others)), dim=-1)
        for chunk in rows.split(CHUNK_EMBEDDINGS)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    """Compare two sets of rows (N, D1) and (N, D2) of the same things: 1 for rotated copies, near 0 if unrelated.

    Returns:
        None where all rows of a set are one, such as embeddings that begin as a mean: they have no directions.

    Source: Kornblith et al. 2019, linear centred kernel alignment.
    """
    first, second = (rows.double() - rows.double().mean(0) for rows in (first, second))
    # By features (D1, D2), not by pairs (N, N): the value is the same, and codes are many more than dimensions.
    cross = (first.T @ second).norm() ** 2
    both = float((first.T @ first).norm() * (second.T @ second).norm())
    return float(cross) / both if both else None


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
    """Linear CKA of image embeddings before and after; None without a model to compare with, or of equal rows."""

    @property
    def random_nearer(self) -> float:
        """How often a random embedding is nearer to text than an image embedding; 0.5 is what noise gives."""
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
        "output": head_of(model.model).weight,
    }
    return {
        # Only ids that a token uses: padding of the vocabulary was never trained, so being near it means nothing.
        name: SideRows(weight.detach()[first:last], weight.detach()[: layout.num_text_tokens])
        for name, weight in sides.items()
    }


def is_tied(model: OpenedModel) -> bool:
    """Tell whether the LM head is the input embeddings."""
    embeddings = cast(nn.Embedding, model.model.get_input_embeddings()).weight
    return embeddings.data_ptr() == head_of(model.model).weight.data_ptr()


def compare_rows(model: OpenedModel, *, before: OpenedModel | None) -> dict[str, SideNearness]:
    """Compare input and output embeddings; `before` (None: not given) adds linear CKA of image embeddings.

    Raises:
        UserError: a model without image codes, or two models with different numbers of codes.
    """
    if not model.layout.codebook_size:
        raise UserError(f"{model.folder} is a language model without image codes.")
    if before is not None and before.layout.codebook_size != model.layout.codebook_size:
        found, expected = before.layout.codebook_size, model.layout.codebook_size
        raise UserError(f"{before.folder} has {found} image codes; {model.folder} has {expected}.")
    if before is not None and len(_image_tokenizers(before, model)) > 1:
        raise UserError(
            f"{before.folder} and {model.folder} were trained on codes of different image tokenizers."
        )
    earlier = rows_of(before) if before is not None else {}
    results: dict[str, SideNearness] = {}
    for side, rows in rows_of(model).items():
        if side == "output" and is_tied(model):
            results[side] = results["input"]  # one matrix, of which the cosines take minutes
            continue
        near = nearness(rows.image, rows.text)
        results[side] = SideNearness(
            near,
            nearest_tokens=[
                [model.text_tokenizer.decode(one[None]) for one in tokens] for tokens in near.tokens
            ],
            cka=linear_cka(earlier[side].image, rows.image) if earlier else None,
        )
    return results


def _image_tokenizers(*models: OpenedModel) -> set[str]:
    """Read the fingerprints of the image tokenizers that models were trained with, where they are known."""
    files = [model.home / DATA_MANIFEST for model in models]
    makers = [read_manifest_file(file).image_tokenizer for file in files if file.is_file()]
    return {maker.fingerprint for maker in makers if maker is not None}


def write_nearest(results: dict[str, SideNearness], *, model: OpenedModel, path: Path) -> None:
    """Write what nearest.json holds."""
    sides = {side: found.to_json() for side, found in results.items()}
    write_json(path, {"checkpoint": str(model.folder), **sides})


def random_nearer(image: Tensor, random: Tensor) -> float:
    """Estimate the chance that a random cosine is above an image's; ties count half."""
    # All pairs are compared by ranks (the Mann-Whitney statistic), in N log N instead of N squared.
    order = image.sort().values
    below = torch.searchsorted(order, random, right=False)
    upto = torch.searchsorted(order, random, right=True)
    return float(((below + upto).double() / 2).mean() / len(image))
