"""Are image rows near text rows? Nearest text tokens by cosine, beside text-to-text and random rows; linear CKA."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.errors import UserError
from t2i.files import write_whole
from t2i.runs.loading import OpenedModel

CHUNK_ROWS = 1_024
RESULTS = "nearest.json"
KINDS = ("image", "text", "random")
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
    noise = torch.randn(image_rows.shape, generator=torch.Generator().manual_seed(seed))
    random_rows = image_rows.mean(0) + noise * image_rows.std(0)
    image, tokens = nearest(image_rows, text_rows, count=num_nearest)
    text, _ = nearest(text_rows, text_rows, count=2)
    random, _ = nearest(random_rows, text_rows, count=1)
    return Nearness(image=image[:, 0], text=text[:, 1], random=random[:, 0], tokens=tokens)


def nearest(rows: Tensor, others: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` most similar of others (M, D) for rows (N, D): cosines and places, (N, count) each."""
    others = F.normalize(others, dim=-1)
    found = [
        (F.normalize(chunk, dim=-1) @ others.T).topk(min(count, len(others)), dim=-1)
        for chunk in rows.split(CHUNK_ROWS)
    ]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Compare two sets of rows (N, D1) and (N, D2) of the same things: 1 for rotated copies, near 0 if unrelated.

    Source: Kornblith et al. 2019, linear centred kernel alignment.
    """
    first, second = (rows.double() - rows.double().mean(0) for rows in (first, second))
    cross = (first.T @ second).norm() ** 2
    return float(cross / ((first.T @ first).norm() * (second.T @ second).norm()))


def rows_of(model: OpenedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for embedding and head, image rows (codebook, D) and the text rows that a text can use (T, D)."""
    layout = model.layout
    first, last = layout.first_image_id, layout.first_image_id + layout.codebook_size
    sides: dict[str, Any] = {
        "input": model.model.get_input_embeddings(),
        "output": model.model.get_output_embeddings(),
    }
    return {
        name: (module.weight.detach()[first:last], module.weight.detach()[: layout.num_text_tokens])
        for name, module in sides.items()
    }


def compare_rows(model: OpenedModel, *, before: OpenedModel | None) -> dict[str, Any]:
    """Compare both spaces of rows; `before` (None: nothing to compare with) adds linear CKA of image rows.

    Raises:
        UserError: a model without image codes, or two models with other numbers of them.
    """
    if not model.layout.codebook_size:
        raise UserError(f"{model.folder} is a language model without image codes.")
    if before is not None and before.layout.codebook_size != model.layout.codebook_size:
        found, wanted = before.layout.codebook_size, model.layout.codebook_size
        raise UserError(f"{before.folder} has {found} image codes; {model.folder} has {wanted}.")
    earlier = rows_of(before) if before is not None else {}
    results: dict[str, Any] = {}
    for side, (image, text) in rows_of(model).items():
        near = nearness(image, text)
        tokens = [[model.text_tokenizer.decode(one[None]) for one in row] for row in near.tokens]
        results[side] = summary(near) | {"nearest_tokens": tokens}
        results[side]["cosines"] = {kind: getattr(near, kind).tolist() for kind in KINDS}
        if side in earlier:
            results[side]["cka"] = linear_cka(earlier[side][0], image)
    return results


def write_results(results: dict[str, Any], *, model: OpenedModel, out: Path | None) -> Path:
    """Write nearest.json, by default (None) into the model's run or folder; return its path."""
    path = out or model.home / RESULTS
    write_whole(path, json.dumps({"checkpoint": str(model.folder), **results}, ensure_ascii=False))
    return path


def summary(found: Nearness) -> dict[str, dict[str, float]]:
    """Quantiles of the three distributions, and how often a random row is nearer to text than an image row is.

    0.5 means that image rows are as near to text as noise is.
    """
    table = {
        kind: {f"{q:.2f}": float(np.quantile(getattr(found, kind).numpy(), q)) for q in QUANTILES}
        for kind in KINDS
    }
    return {**table, "compared": {"random_nearer": random_nearer(found.image, found.random)}}


def random_nearer(image: Tensor, random: Tensor) -> float:
    """Estimate the chance that a random row's cosine is above an image row's; ties count half."""
    order = image.sort().values
    below = torch.searchsorted(order, random, right=False)
    upto = torch.searchsorted(order, random, right=True)
    return float(((below + upto).double() / 2).mean() / len(image))
