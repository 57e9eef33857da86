"""Score a model's pictures beside their yardsticks: one reference, one set of features, everything named.

Every process draws its share (draw_rows); one of them measures (score).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.files import write_json, write_whole
from t2i.generate.sample import caption_lines, captions_sha256, draw_folder
from t2i.measure.clip import RULE as CLIP_RULE
from t2i.measure.clip import Clip, clip_score, embed_captions, embed_pictures
from t2i.measure.compare import SCORES
from t2i.measure.distances import frechet_distance, kernel_distance, sample_size_note
from t2i.measure.feature_cache import BATCH_SIZE, Measured, Reference, measure, measure_reference
from t2i.measure.features import FeatureExtractor, extract, kernel_key, metric_key
from t2i.measure.images import Pictures, Reconstructions
from t2i.model.backbone import made_of
from t2i.runs.loading import OpenedModel

CAPTIONS = "captions.jsonl"
KERNEL_SEED = 0
PACKAGES = ("t2i", "torch", "transformers", "diffusers", "clean-fid", "pillow", "numpy")

Control = Literal["shuffled", "untrained"]

ROWS = {
    "real": "real pictures that the reference has not",
    "reconstructions": "the captions' own pictures through the image tokenizer",
    "model": "drawn from the captions",
    "matched": "drawn, against the captions' own pictures alone",
    "shuffled": "drawn from the same captions in another order",
    "untrained": "drawn by the same architecture with random weights",
}


@dataclass(frozen=True)
class Task:
    """What is drawn, and what it is compared with."""

    data: str
    """The data set, in words."""
    captions: dict[str, str]
    """Picture name -> caption, in the order of the seeds."""
    captions_rule: str
    """How the list was chosen."""
    own: Pictures
    """The captions' own pictures, each once, in the order of their first captions, which come before all others."""
    reference: Reference
    own_places: list[int] | None = None
    """Where the own pictures are within the reference; None where the reference has none of them."""


@dataclass(frozen=True)
class Drawing:
    """How rows are drawn, and where to."""

    out: Path
    config: SampleConfig
    controls: tuple[Control, ...]
    """Rows drawn beside the model's."""
    batch_size: int
    """Pictures drawn at a time; part of what makes a picture, to the last bit."""


@dataclass(frozen=True)
class Rulers:
    """What pictures are measured with."""

    extractor: FeatureExtractor
    clip: Clip | None
    """None for no CLIP score."""


def draw_rows(
    checkpoint: OpenedModel, task: Task, *, drawing: Drawing, rank: int = 0, world_size: int = 1
) -> dict[str, list[Path]]:
    """Draw this rank's share of every row; return all paths, in the order of the captions.

    Raises:
        UserError: drawing.out holds pictures, or a list, of others.
    """
    listed = drawing.out / CAPTIONS
    if listed.is_file() and listed.read_text() != caption_lines(task.captions):
        raise UserError(f"{listed} is there and is another list than what is drawn. Choose another --out.")
    names = list(task.captions)
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
    """Swap the model for one of the same architecture with random weights (seed 0)."""
    torch.manual_seed(0)
    model = made_of(checkpoint.model.config).eval()
    return replace(checkpoint, model=model.to(device=checkpoint.model.device), weights="random, seed 0")


def score(
    checkpoint: OpenedModel,
    task: Task,
    *,
    drawing: Drawing,
    drawn: dict[str, list[Path]],
    rulers: Rulers,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Measure every row, write scores.json and captions.jsonl into drawing.out, and return the scores.

    Args:
        drawn: what draw_rows returned, with every rank's pictures there.
        facts: more entries of scores.json.
    """
    started = time.perf_counter()
    extractor, clip = rulers.extractor, rulers.clip
    rows = _distances(checkpoint, task, drawn=drawn, extractor=extractor)
    measures = [metric_key(extractor.name), kernel_key(extractor.name)]
    scores: dict[str, Any] = {key: rows["model"][key] for key in measures}
    if clip is not None:
        others = _add_clip_scores(rows, checkpoint, task, drawn=drawn, clip=clip)
        measures.append("clip_score")
        scores |= {"clip_score": rows["model"]["clip_score"], "clip_score_other_captions": others}
        scores |= {"clip": clip.name, "clip_sha256": clip.weights_sha256, "clip_rule": CLIP_RULE}
    scores |= {
        "measures": measures,
        "rows": {row: rows[row] for row in ROWS if row in rows},
        "note": sample_size_note(measures[0], n=len(task.captions), dims=extractor.dims),
        **_protocol(task, extractor),
        **_subject(checkpoint, drawing),
        "versions": {name: version(name) for name in PACKAGES},
        **facts,
        "seconds_to_measure": time.perf_counter() - started,
    }
    drawing.out.mkdir(parents=True, exist_ok=True)
    write_whole(drawing.out / CAPTIONS, caption_lines(task.captions))
    file = _scores_file(drawing.out, scores)
    scores["file"] = file.name
    write_json(file, scores)
    return scores


def _scores_file(out: Path, scores: dict[str, Any]) -> Path:
    """Name the file: scores.json, unless it holds what other features or another resize measured."""
    keys = ("features", "resize")
    file = out / SCORES
    if not file.is_file():
        return file
    found = json.loads(file.read_text())
    same = all(found.get(key) == scores[key] for key in keys)
    return file if same else out / f"scores_{scores['features']}_{scores['resize']}.json"


def _protocol(task: Task, extractor: FeatureExtractor) -> dict[str, Any]:
    """Name what a measure was taken on; two scores are compared only if all of it is equal."""
    return {
        "data": task.data,
        "n": len(task.captions),
        "features": extractor.name,
        "features_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "reference": task.reference.name,
        "reference_sha256": task.reference.sha256(),
        "crop": task.reference.made_of["crop"],
        "image_size": task.reference.made_of["image_size"],
        "captions": task.captions_rule,
        "captions_sha256": captions_sha256(task.captions),
        "kernel_seed": KERNEL_SEED,
    }


def _subject(checkpoint: OpenedModel, drawing: Drawing) -> dict[str, Any]:
    """Name what was measured."""
    return {
        "checkpoint": str(checkpoint.folder),
        "weights_sha256": checkpoint.weights,
        "image_tokenizer_sha256": checkpoint.needed_image_tokenizer().fingerprint(),
        "sampler": asdict(drawing.config),
        "seeds": "picture i of captions.jsonl is drawn with sampler.seed + i",
        "batch_size": drawing.batch_size,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "device": str(checkpoint.model.device.type),
    }


def _distances(
    checkpoint: OpenedModel, task: Task, *, drawn: dict[str, list[Path]], extractor: FeatureExtractor
) -> dict[str, dict[str, Any]]:
    """Measure the distances of every row: what it is, its number of pictures, and those of its reference."""
    reference = measure_reference(task.reference, extractor, progress=True)
    made: dict[str, Any] = {
        **drawn,
        "reconstructions": Reconstructions(task.own, checkpoint.needed_image_tokenizer()),
    }
    features = {
        row: measure(extract(pictures, extractor, batch_size=BATCH_SIZE, progress=True))
        for row, pictures in made.items()
    }
    rows = {row: _row(row, each, reference, extractor) for row, each in features.items()}
    if task.own_places is None:
        real = measure(extract(task.own, extractor, batch_size=BATCH_SIZE))
        rows["real"] = _row("real", real, reference, extractor)
    else:
        own = measure(reference.features[task.own_places])
        rows["matched"] = _row("matched", features["model"], own, extractor)
        rows["real"] = _row("real", *_apart(reference.features, task.own_places), extractor)
    return rows


def _apart(features: np.ndarray, places: Sequence[int]) -> tuple[Measured, Measured]:
    """Take the pictures at `places`, at most half of all, out of the reference that they are compared with."""
    taken = list(places[: len(features) // 2])
    return measure(features[taken]), measure(np.delete(features, taken, axis=0))


def _row(row: str, made: Measured, reference: Measured, extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "what": ROWS[row],
        "n": len(made.features),
        "n_reference": len(reference.features),
        metric_key(extractor.name): frechet_distance(made.statistics, reference.statistics),
        kernel_key(extractor.name): kernel_distance(made.features, reference.features, seed=KERNEL_SEED),
    }


def _add_clip_scores(
    rows: dict[str, dict[str, Any]],
    checkpoint: OpenedModel,
    task: Task,
    *,
    drawn: dict[str, list[Path]],
    clip: Clip,
) -> float:
    """Add the CLIP score to every row with pictures of its own; return that of the model under other captions."""
    captions = embed_captions(list(task.captions.values()), clip)
    made: dict[str, Any] = {
        **drawn,
        "real": islice(task.own, rows["real"]["n"]),
        "reconstructions": Reconstructions(task.own, checkpoint.needed_image_tokenizer()),
    }
    for row, pictures in made.items():
        embedded = embed_pictures(pictures, clip)
        rows[row]["clip_score"] = clip_score(embedded, captions[: len(embedded)])
        if row == "model":
            others = clip_score(embedded, captions.roll(1, dims=0))
    return others
