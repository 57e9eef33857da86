"""Results of the alignment and of the commands under eval/: their JSON, read once into typed values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from t2i.errors import DataError
from t2i.files import read_optional_json
from t2i.measure.gradients import GradientShares, KindShare
from t2i.measure.perplexity import PERPLEXITY
from t2i.measure.protocol import SCORES
from t2i.runs.checkpoint_manifest import steps_of
from t2i.train.align import HITS, SUMMARY

T = TypeVar("T")
Values = dict[str, Any]
"""An object of JSON."""


@dataclass(frozen=True)
class Retrieval:
    """Alignment of one embedding space: retrieval among held-out pairs."""

    image_to_text: float
    """Share of images whose matched caption is nearest."""
    text_to_image: float
    chance: float
    num_pairs: int
    temperature: float

    @property
    def num_styles(self) -> int:
        """The number of styles; a caption is looked for among the pairs of its image's style."""
        return round(self.chance * self.num_pairs)

    @property
    def times_chance(self) -> float:
        """How many times as often as by chance an image finds its caption."""
        return self.image_to_text / self.chance

    @property
    def times_chance_error(self) -> float:
        """The standard error of times_chance over images, each counted as independent."""
        share = self.image_to_text
        return math.sqrt(share * (1 - share) / self.num_pairs) / self.chance


@dataclass(frozen=True)
class NearestTokens:
    """How near image embeddings are to text embeddings in one space, with random ones as the control."""

    medians: dict[str, float]
    """Median cosine, by image, random and text."""
    cosines: dict[str, np.ndarray]
    """Cosines to the nearest text embedding, by the same kinds."""
    random_nearer: float
    """The chance that a random embedding is nearer to text than an image's."""
    tokens: list[list[str]]
    """Per code, the nearest tokens, best first."""
    cka: float | None
    """Linear CKA of image embeddings before and after training; None where only one model was measured."""


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of one model on one text."""

    num_tokens: int
    perplexity: float
    """Over the whole vocabulary."""
    perplexity_text_rows: float
    """Over the text vocabulary only."""


@dataclass(frozen=True)
class LanguageResults:
    """Text results of one model."""

    costs: dict[str, TextPerplexity]
    """By name of the text: text, and captions where they were measured."""
    completions: list[str]
    """One per prompt, in their order."""


@dataclass(frozen=True)
class ForgettingResults:
    """The content of forgetting.json: several models on the same texts and prompts."""

    prompts: list[str]
    models: dict[str, LanguageResults]
    """`model`, and `reference` where there was one."""


@dataclass(frozen=True)
class SplitPerplexity:
    """One held-out split of perplexity.json."""

    nats: dict[str, float]
    """Nats per token, by text, image, special and total; kinds without a token are left out."""
    bits_per_pixel: float | None
    """None where the shards do not state an image size."""
    image_loss_by_code: np.ndarray | None
    """(K,) nats; None for sequences without images."""


@dataclass(frozen=True)
class CaptionLosses:
    """Image loss of one held-out split under two captions, in nats per code."""

    num_pictures: int
    own: float
    """Under the matched caption."""
    wrong: float
    """Under a shuffled caption."""

    @property
    def worth(self) -> float:
        """What the matched caption saves against a shuffled one."""
        return self.wrong - self.own


@dataclass(frozen=True)
class Score:
    """One measure of scores.json."""

    value: float
    num_images: int
    features: str
    """Features that it was measured on, such as inception."""


def read_alignment(folder: Path) -> dict[str, Retrieval]:
    """Read an alignment's retrieval by space of embeddings; empty before it has ended."""
    file = folder / SUMMARY
    sides = {name: one for name, one in read_optional_json(file).items() if name != "settings"}
    return {name: _picked(Retrieval, one, file=file) for name, one in sides.items()}


def read_hits(folder: Path) -> dict[str, dict[str, float]]:
    """Read by space of embeddings how far each held-out image found its caption: key -> 0 to 1.

    Empty for an alignment of 0.1, which kept no image's own.
    """
    values = read_optional_json(folder / HITS)
    return {
        name: dict(zip(values["keys"], one["image_to_text"], strict=True))
        for name, one in values.get("spaces", {}).items()
    }


def read_nearest(file: Path) -> dict[str, NearestTokens]:
    """Read a nearest.json by space of embeddings, input and output."""
    values = read_optional_json(file)
    return {side: _nearest(values[side]) for side in ("input", "output") if side in values}


def read_forgetting(file: Path) -> ForgettingResults | None:
    """Read a forgetting.json; None without the file."""
    values = read_optional_json(file)
    if not values:
        return None
    models = {
        name: LanguageResults(
            {text: _picked(TextPerplexity, cost, file=file) for text, cost in one["costs"].items()},
            completions=one["completions"],
        )
        for name, one in values["models"].items()
    }
    return ForgettingResults(values["prompts"], models)


def read_gradients(file: Path) -> GradientShares | None:
    """Read a gradients.json; None without the file."""
    values = read_optional_json(file)
    if not values:
        return None
    text, image, special = (
        _picked(KindShare, values[kind], file=file) for kind in ("text", "image", "special")
    )
    return GradientShares(text, image, special, values["cosine_text_image"])


def read_perplexity(run_dir: Path) -> SplitPerplexity | None:
    """Read the first split of a run's perplexity.json; None without the file."""
    splits = read_optional_json(run_dir / PERPLEXITY).get("splits", {})
    if not splits:
        return None
    # The first is `heldout`; others are of harder combinations, and not of every data set.
    one: Values = next(iter(splits.values()))
    kinds = [kind for kind in ("text", "image", "special", "total") if one[kind]]
    codes = one.get("image_loss_by_code")
    return SplitPerplexity(
        {kind: one[kind]["nats"] for kind in kinds},
        bits_per_pixel=one.get("bits_per_pixel"),
        image_loss_by_code=None if codes is None else np.array(codes),
    )


def read_caption_losses(
    run_dir: Path, *, kind: Literal["captions", "label_captions"] = "captions"
) -> dict[str, CaptionLosses]:
    """Read the caption losses of each held-out split of a run's perplexity.json; empty without the file.

    Args:
        kind: label_captions for those of a split in other words under the usual captions of its images.
    """
    file = run_dir / PERPLEXITY
    splits = {name: one.get(kind) for name, one in read_optional_json(file).get("splits", {}).items()}
    # Files of 0.1 have none, and a split whose captions are all one has no shuffled one.
    return {
        name: _picked(CaptionLosses, one, file=file)
        for name, one in splits.items()
        if one and one["wrong"] is not None
    }


def read_cut_captions(run_dir: Path) -> dict[str, int]:
    """Read how many captions of held-out splits were truncated, by a run's perplexity.json; none is left out."""
    splits = read_optional_json(run_dir / PERPLEXITY).get("splits", {})
    return {name: cut for name, one in splits.items() if (cut := one.get("cut_captions", 0))}


def read_score(run_dir: Path, *, measure: str) -> Score | None:
    """Read one measure of the newest checkpoint that was scored; None if it was not measured."""
    folders = steps_of((run_dir / "eval").glob("step_*")).values()
    files = [folder / SCORES for folder in folders if (folder / SCORES).is_file()]
    values = read_optional_json(files[-1]) if files else {}
    if measure not in values:
        return None
    return Score(values[measure], num_images=values["n"], features=values["features"])


def read_each(files: dict[str, Path], read: Callable[[Path], T | None]) -> dict[str, T]:
    """Read named files, leaving out those that do not exist."""
    # Left out and not refused: a report is also written while measures are still being made.
    found = {name: read(file) for name, file in files.items()}
    return {name: one for name, one in found.items() if one}


def _nearest(one: Values) -> NearestTokens:
    kinds = ("image", "random", "text")
    return NearestTokens(
        medians={kind: one[kind]["0.50"] for kind in kinds},
        cosines={kind: np.array(one["cosines"][kind]) for kind in kinds},
        random_nearer=one["compared"]["random_nearer"],
        tokens=one["nearest_tokens"],
        cka=one.get("cka"),
    )


def _picked(kind: Callable[..., T], values: Values, *, file: Path) -> T:
    """Take a dataclass's fields from an object of JSON, which may have more keys."""
    assert isinstance(kind, type)
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    # More keys are allowed, fewer are not: a newer file must not break a report, nor an older one shorten it silently.
    if missing := [name for name in names if name not in values]:
        raise DataError(f"{file} has no {missing[0]}; measure it again with this version of t2i.")
    return kind(**{name: values[name] for name in names})
