"""Score a model's images beside controls: one reference, one set of features, everything named.

Every process draws its share (draw_rows), and one of them measures (score).
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.files import read_json, write_json, write_whole
from t2i.generate.sample import caption_lines, captions_sha256, draw_folder
from t2i.measure.clip import RULE as CLIP_RULE
from t2i.measure.clip import Clip, clip_score, embed_captions, embed_images
from t2i.measure.distances import frechet_distance, kernel_distance, sample_size_note
from t2i.measure.feature_cache import FEATURE_BATCH, Measured, Reference, measure_reference, with_statistics
from t2i.measure.features import FeatureExtractor, extract, kernel_key, metric_key
from t2i.measure.images import Pictures, Reconstructions
from t2i.measure.protocol import (
    ROWS,
    SCORES,
    ClipScores,
    DrawingFacts,
    Protocol,
    RowScore,
    Scores,
    Subject,
)
from t2i.measure.shuffled import unrelated
from t2i.model.backbone import made_of
from t2i.runs.loading import OpenedModel

CAPTIONS_DRAWN = "captions.jsonl"
KERNEL_SEED = 0
"""Seed of the subsets that a kernel distance is averaged over; part of the protocol."""
SCORED_WITH = ("t2i", "torch", "transformers", "diffusers", "clean-fid", "pillow", "numpy")

Control = Literal["shuffled", "untrained"]

Images = Iterable[np.ndarray | Path]
"""Files, or uint8 images (H, W, 3)."""


@dataclass(frozen=True)
class Task:
    """What to draw, and what to compare it with."""

    data: str
    """The data set, in words."""
    captions: dict[str, str]
    """Image name -> caption, in the order of the seeds."""
    captions_rule: str
    """How the list was chosen."""
    own: Pictures
    """Real images of the captions, each once, in the order of their first captions, which come before all others."""
    reference: Reference
    own_places: list[int] | None = None
    """Indices of these images in the reference; None where the reference has none of them."""
    image_ids: list[int] | None = None
    """The real image of each caption; None where each caption has its own."""


@dataclass(frozen=True)
class Drawing:
    """How rows are drawn, and where to."""

    out: Path
    config: SampleConfig
    controls: tuple[Control, ...]
    """Rows drawn beside the model's."""
    batch_size: int
    """Images drawn at a time; the last bits of an image depend on it."""


@dataclass(frozen=True)
class Rulers:
    """Networks that images are measured with."""

    extractor: FeatureExtractor
    clip: Clip | None
    """None for no CLIP score."""


def draw_rows(
    checkpoint: OpenedModel, task: Task, *, drawing: Drawing, rank: int = 0, world_size: int = 1
) -> dict[str, list[Path]]:
    """Draw this rank's share of every row; return all paths, in the order of the captions.

    Raises:
        UserError: drawing.out holds images, or a list of captions, of another drawing.
    """
    # Checked before anything is drawn; the images' own settings.json would only say that the hash is another.
    listed = drawing.out / CAPTIONS_DRAWN
    if listed.is_file() and listed.read_text() != caption_lines(task.captions):
        raise UserError(f"{listed} holds another list of captions. Choose another --out.")
    names = list(task.captions)
    # Shifted by one, so that each caption has the seed of another. A distance sees the set alone: what it differs by
    # is the chance of one drawing.
    moved = [task.captions[name] for name in names[1:] + names[:1]]
    rows = {"model": (checkpoint, task.captions)}
    if "shuffled" in drawing.controls:
        rows["shuffled"] = (checkpoint, dict(zip(names, moved, strict=True)))
    if "untrained" in drawing.controls:
        rows["untrained"] = (untrained(checkpoint), task.captions)
    return {
        row: draw_folder(
            drawer,
            captions,
            out=drawing.out / row,
            config=drawing.config,
            batch_size=drawing.batch_size,
            rank=rank,
            world_size=world_size,
            description=f"draw {row}",
        )
        for row, (drawer, captions) in rows.items()
    }


def untrained(checkpoint: OpenedModel) -> OpenedModel:
    """Swap the model for one of the same architecture randomly initialised (seed 0)."""
    torch.manual_seed(0)  # the same on every rank, as ranks draw shares of one folder
    # In the model's own precision too, or two rows of one score would differ in it.
    model = made_of(checkpoint.model.config).eval().to(checkpoint.model.device, checkpoint.model.dtype)
    return replace(checkpoint, model=model, weights="random, seed 0")


def score(
    checkpoint: OpenedModel,
    task: Task,
    *,
    drawing: Drawing,
    drawn: dict[str, list[Path]],
    rulers: Rulers,
    facts: DrawingFacts,
) -> Scores:
    """Measure every row, write scores.json and captions.jsonl into drawing.out, and return the scores.

    Args:
        drawn: what draw_rows returned, with every rank's images there.
    """
    started = time.perf_counter()
    extractor, clip = rulers.extractor, rulers.clip
    # One process measures everything: drawing is nearly all of the time, and ranks then need not agree on order.
    rows = _distances(checkpoint, task, drawn=drawn, extractor=extractor)
    clip_scores = None
    if clip is not None:
        clip_scores = _clip_scores(rows, checkpoint, task, drawn=drawn, clip=clip)
        rows = {row: _with_clip(each, clip_scores.rows.get(row)) for row, each in rows.items()}
    protocol = _protocol(task, extractor)
    file = _scores_file(drawing.out, protocol)
    scores = Scores(
        rows=rows,
        protocol=protocol,
        subject=_subject(checkpoint, drawing),
        clip=clip_scores,
        note=sample_size_note(metric_key(extractor.name), n=len(task.captions), dims=extractor.dims),
        facts=facts,
        seconds_to_measure=time.perf_counter() - started,
        file=file.name,
    )
    drawing.out.mkdir(parents=True, exist_ok=True)
    write_whole(drawing.out / CAPTIONS_DRAWN, caption_lines(task.captions))
    write_json(file, scores.to_json())
    return scores


def _scores_file(out: Path, protocol: Protocol) -> Path:
    """Name the file: scores.json, unless it holds scores on other features or another resize."""
    file = out / SCORES
    if not file.is_file():
        return file
    # Aside and not over it: the scores on one network's features are no worse for being measured on another's.
    found = read_json(file)
    same = (found.get("features"), found.get("resize")) == (protocol.features, protocol.resize)
    return file if same else out / f"scores_{protocol.features}_{protocol.resize}.json"


def _protocol(task: Task, extractor: FeatureExtractor) -> Protocol:
    return Protocol(
        data=task.data,
        n=len(task.captions),
        features=extractor.name,
        features_sha256=extractor.weights_sha256,
        resize=extractor.resize,
        reference=task.reference.name,
        reference_sha256=task.reference.sha256(),
        crop=task.reference.crop,
        image_size=task.reference.image_size,
        captions=task.captions_rule,
        captions_sha256=captions_sha256(task.captions),
        kernel_seed=KERNEL_SEED,
    )


def _subject(checkpoint: OpenedModel, drawing: Drawing) -> Subject:
    return Subject(
        checkpoint=str(checkpoint.folder),
        weights_sha256=checkpoint.weights,
        image_tokenizer_sha256=checkpoint.needed_image_tokenizer().fingerprint(),
        sampler=asdict(drawing.config),
        batch_size=drawing.batch_size,
        dtype=checkpoint.dtype,
        device=str(checkpoint.model.device.type),
        versions={name: version(name) for name in SCORED_WITH},
    )


def _distances(
    checkpoint: OpenedModel, task: Task, *, drawn: dict[str, list[Path]], extractor: FeatureExtractor
) -> dict[str, RowScore]:
    """Measure the distances of every row to its reference."""
    reference = measure_reference(task.reference, extractor, progress=True)
    made: dict[str, Images] = {
        **drawn,
        "reconstructions": Reconstructions(task.own, checkpoint.needed_image_tokenizer()),
    }
    features = {
        row: with_statistics(extract(images, extractor, batch_size=FEATURE_BATCH, progress=True))
        for row, images in made.items()
    }
    rows = {row: _row(row, each, reference, extractor) for row, each in features.items()}
    if task.own_places is None:
        real = with_statistics(extract(task.own, extractor, batch_size=FEATURE_BATCH))
        rows["real"] = _row("real", real, reference, extractor)
    else:
        # The reference holds the captions' real images, and papers differ on whether it should: so both are measured.
        own = with_statistics(reference.features[task.own_places])
        rows["matched"] = _row("matched", features["model"], own, extractor)
        rows["real"] = _row("real", *_apart(reference.features, task.own_places), extractor)
    return rows


def _apart(features: np.ndarray, places: Sequence[int]) -> tuple[Measured, Measured]:
    """Take the images at `places`, at most half of all, out of the reference that they are compared with.

    Compared with themselves, real images would have a distance near zero for that reason alone.
    """
    taken = list(places[: len(features) // 2])
    return with_statistics(features[taken]), with_statistics(np.delete(features, taken, axis=0))


def _row(row: str, made: Measured, reference: Measured, extractor: FeatureExtractor) -> RowScore:
    return RowScore(
        what=ROWS[row],
        n=len(made.features),
        n_reference=len(reference.features),
        measures={
            metric_key(extractor.name): frechet_distance(made.statistics, reference.statistics),
            kernel_key(extractor.name): kernel_distance(made.features, reference.features, seed=KERNEL_SEED),
        },
    )


def _clip_scores(
    rows: dict[str, RowScore],
    checkpoint: OpenedModel,
    task: Task,
    *,
    drawn: dict[str, list[Path]],
    clip: Clip,
) -> ClipScores:
    texts = list(task.captions.values())
    captions = embed_captions(texts, clip)  # (N, D)
    others = unrelated(texts, task.image_ids or list(task.captions), shift=1)
    made: dict[str, Images] = {
        **drawn,
        # As many as its distance is of. Real images come in the order of their captions, so the two line up.
        "real": islice(task.own, rows["real"].n),
        "reconstructions": Reconstructions(task.own, checkpoint.needed_image_tokenizer()),
    }
    embedded = {row: embed_images(images, clip) for row, images in made.items()}  # (M, D), M <= N
    return ClipScores(
        clip.name,
        clip.weights_sha256,
        rule=CLIP_RULE,
        rows={row: clip_score(images, captions[: len(images)]) for row, images in embedded.items()},
        # The control of a CLIP score: unrelated images and captions score well above 0 too.
        other_captions=clip_score(embedded["model"], captions[others]) if others else None,
    )


def _with_clip(row: RowScore, clip_score: float | None) -> RowScore:
    """Add a CLIP score to a row that has one; the matched row has no images of its own."""
    if clip_score is None:
        return row
    return replace(row, measures={**row.measures, "clip_score": clip_score})
