"""Score a model's images beside controls: one reference, one set of features, everything named.

Every process draws its share (draw_rows), and one of them measures (score).
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.files import read_optional_json, write_json, write_whole
from t2i.generate.best_of import Ranker
from t2i.generate.captions import caption_lines, captions_sha256
from t2i.generate.image_files import sampler_settings
from t2i.generate.others.drawing import draw_others_folder
from t2i.generate.others.family import OthersModel
from t2i.generate.sample import draw_folder
from t2i.measure.clip import Clip
from t2i.measure.distances import sample_size_note
from t2i.measure.extractor import FeatureExtractor, metric_key
from t2i.measure.feature_cache import Reference
from t2i.measure.images import LazyImages
from t2i.measure.judge import Judge
from t2i.measure.judge_answers import ANSWERS
from t2i.measure.measures import BOOTSTRAP_SEED, KERNEL_SEED, distances_on, replicates_for
from t2i.measure.pairing import Pairing, clip_scores, exact_scores, pairing_of, remote_scores, with_pairing
from t2i.measure.protocol import (
    BOOTSTRAP,
    CHOSE,
    CLIP,
    PREPROCESSING,
    SCORES,
    Bootstrap,
    DrawingFacts,
    JudgeScores,
    Protocol,
    Scores,
    Subject,
)
from t2i.measure.remote_judge import RemoteJudge
from t2i.measure.rows import distance_rows
from t2i.measure.verdict import MEAN
from t2i.model.backbone import made_of
from t2i.runs.loading import OpenedModel
from t2i.settings import MAX_WHOLE

logger = logging.getLogger(__name__)

CAPTIONS_DRAWN = "captions.jsonl"
SCORED_WITH = ("t2i", "torch", "transformers", "diffusers", "clean-fid", "pillow", "numpy")

Control = Literal["redrawn", "untrained"]


Contestant = OpenedModel | OthersModel
"""What draws."""


@dataclass(frozen=True)
class Task:
    """What to draw, and what to compare it with."""

    data: str
    """The data set, in words."""
    captions: dict[str, str]
    """Image name -> caption, in the order of the seeds."""
    captions_rule: str
    """How the list was chosen."""
    own: LazyImages
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
    ranker: Ranker | None = None
    """Judges candidates where config.best_by says so."""

    @property
    def ranked_by(self) -> str | None:
        """Name the judge that chose the images; None if none did."""
        is_chosen = self.config.best_by == "judge" and self.config.best_of > 1
        return self.ranker.name if self.ranker and is_chosen else None


@dataclass(frozen=True)
class Rulers:
    """Networks that images are measured with."""

    extractor: FeatureExtractor
    clip: Clip | None
    """None for no CLIP score."""
    judge: Judge | None = None
    """The exact judge; None where captions state no attributes."""
    remote: tuple[RemoteJudge, ...] = ()
    """Judges behind HTTP."""
    replicates: int | None = None
    """Resamplings per interval; None for a number by how many images there are."""


def draw_rows(
    checkpoint: Contestant, task: Task, *, drawing: Drawing, rank: int = 0, world_size: int = 1
) -> dict[str, list[Path]]:
    """Draw this rank's share of every row; return all paths, in the order of the captions.

    Raises:
        UserError: drawing.out holds images, or a list of captions, of another drawing.
    """
    # Checked before anything is drawn; the images' own settings.json would only say that the hash is another.
    listed = drawing.out / CAPTIONS_DRAWN
    if listed.is_file() and listed.read_text() != caption_lines(task.captions):
        raise UserError(f"{listed} holds another list of captions. Choose another --out.")
    read_optional_json(drawing.out / SCORES)  # a damaged one is named now, not after days of drawing
    # Seeds that no caption of the model's row has: the two differ by the chance of one drawing, and by nothing else.
    others = replace(
        drawing.config, seed=(drawing.config.seed + len(task.captions) * drawing.config.best_of) % MAX_WHOLE
    )
    rows: dict[str, tuple[Contestant, SampleConfig]] = {"model": (checkpoint, drawing.config)}
    if "redrawn" in drawing.controls:
        rows["redrawn"] = (checkpoint, others)
    if "untrained" in drawing.controls:
        rows["untrained"] = (untrained(checkpoint), drawing.config)
    return {
        row: _draw_row(
            drawer,
            task.captions,
            out=drawing.out / row,
            config=config,
            description=f"draw {row}",
            drawing=drawing,
            rank=rank,
            world_size=world_size,
        )
        for row, (drawer, config) in rows.items()
    }


def _draw_row(
    drawer: Contestant,
    captions: dict[str, str],
    *,
    out: Path,
    config: SampleConfig,
    description: str,
    drawing: Drawing,
    rank: int,
    world_size: int,
) -> list[Path]:
    """Draw by this package's sampler, or by the loop for models of others."""
    draw = (
        partial(draw_others_folder, drawer)
        if isinstance(drawer, OthersModel)
        else partial(draw_folder, drawer, ranker=drawing.ranker)
    )
    return draw(
        captions,
        out=out,
        config=config,
        batch_size=drawing.batch_size,
        rank=rank,
        world_size=world_size,
        description=description,
    )


def untrained(checkpoint: Contestant) -> Contestant:
    """Swap the model for one of the same architecture randomly initialised (seed 0).

    Raises:
        UserError: it is a model of others, whose image tokenizer would be randomly initialised too.
    """
    if isinstance(checkpoint, OthersModel):
        raise UserError(
            f"--controls untrained is for models of this package; {checkpoint.folder} is a {checkpoint.kind}."
        )
    torch.manual_seed(0)  # the same on every rank, as ranks draw shares of one folder
    # In the model's own precision too, or two rows of one score would differ in it.
    model = made_of(checkpoint.model.config).eval().to(checkpoint.model.device, checkpoint.model.dtype)
    return replace(checkpoint, model=model, weights="random, seed 0")


def score(
    checkpoint: Contestant,
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
    extractor = rulers.extractor
    tokenizer = checkpoint.needed_image_tokenizer()
    replicates = replicates_for(rulers.replicates, n=len(task.captions))
    # One process measures everything: drawing is nearly all of the time, and ranks then need not agree on order.
    rows = distance_rows(task, drawn=drawn, tokenizer=tokenizer, extractor=extractor, replicates=replicates)
    pairing = pairing_of(
        task.captions,
        task.own,
        image_ids=task.image_ids,
        num_real=rows["real"].n,
        drawn=drawn,
        tokenizer=tokenizer,
    )
    clip = clip_scores(pairing, rulers.clip) if rulers.clip else None
    judges = {MEAN: exact_scores(pairing, rulers.judge, replicates=replicates)} if rulers.judge else {}
    judges |= {judge.key: _judged(pairing, judge, drawing=drawing) for judge in rulers.remote}
    rows = with_pairing(rows, clip=clip, judges=judges, pairing=pairing)
    protocol = _protocol(task, extractor)
    file = _scores_file(drawing.out, protocol, preprocessing=extractor.preprocessing)
    scores = Scores(
        rows=rows,
        protocol=protocol,
        subject=_subject(checkpoint, drawing),
        clip=clip,
        rules={key: distance.rule for key, distance in distances_on(extractor.name).items()},
        bootstrap=Bootstrap(replicates, seed=BOOTSTRAP_SEED),
        reference_pixels="" if task.reference.cache else task.reference.images.sha256(),
        judges=judges,
        note=sample_size_note(metric_key(extractor.name), n=len(task.captions), dims=extractor.dims),
        facts=facts,
        seconds_to_measure=time.perf_counter() - started,
        preprocessing=extractor.preprocessing,
        file=file.name,
    )
    drawing.out.mkdir(parents=True, exist_ok=True)
    write_whole(drawing.out / CAPTIONS_DRAWN, caption_lines(task.captions))
    _keep_what_is_lost(file, scores)
    write_json(file, scores.to_json())
    return scores


def _keep_what_is_lost(file: Path, scores: Scores) -> None:
    """Keep a file of scores that has measures or rows which the new one lacks, under another name."""
    before = read_optional_json(file)
    if lost := sorted(_parts(before) - _parts(scores.to_json())):
        names = (f"{file.stem}.before{number if number > 1 else ''}.json" for number in count(1))
        kept = next(path for path in map(file.with_name, names) if not path.exists())
        write_json(kept, before)
        logger.warning("%s had %s, which this score has not; it is kept as %s.", file, ", ".join(lost), kept)


def _parts(entries: Mapping[str, Any]) -> set[str]:
    """Name what a scores.json has: measures, rows, a CLIP score, intervals."""
    return {*entries.get("measures", []), *entries.get("rows", {}), *({CLIP, BOOTSTRAP} & entries.keys())}


def _judged(pairing: Pairing, judge: RemoteJudge, *, drawing: Drawing) -> JudgeScores:
    """Let a judge score every row, its answers kept; say so if it chose the images that it scores."""
    scores = remote_scores(pairing, replace(judge, answers=drawing.out / ANSWERS))
    chose = {CHOSE: True} if drawing.ranked_by == judge.name else {}
    return replace(scores, protocol=scores.protocol | chose)


SAME_FEATURES = ("features", "features_sha256", "resize")
"""Entries of the protocol by which a file of scores is measured again."""


def _scores_file(out: Path, protocol: Protocol, *, preprocessing: str = "") -> Path:
    """Name the file: scores.json, unless it holds scores on another network's features or another resize."""
    # Aside and not over it: the scores on one network's features are no worse for being measured on another's.
    name = f"scores_{protocol.features}_{protocol.resize}"
    of_weights = f"{name}_{protocol.features_sha256[:8]}"
    for file in (out / SCORES, out / f"{name}.json", out / f"{of_weights}.json"):
        found = read_optional_json(file)
        # Of the weights too: a DINOv2 and a CLIP come in several sizes; and of how images are read.
        is_same = all(found.get(key) == getattr(protocol, key) for key in SAME_FEATURES)
        if not found or (is_same and found.get(PREPROCESSING, preprocessing) == preprocessing):
            return file
    return out / f"{of_weights}_{preprocessing[:8]}.json"


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


def _subject(checkpoint: Contestant, drawing: Drawing) -> Subject:
    return Subject(
        checkpoint=str(checkpoint.folder),
        weights_sha256=checkpoint.weights,
        image_tokenizer_sha256=checkpoint.needed_image_tokenizer().fingerprint(),
        sampler=sampler_settings(drawing.config)
        | ({"ranked_by": drawing.ranked_by} if drawing.ranked_by else {}),
        batch_size=drawing.batch_size,
        dtype=checkpoint.dtype,
        device=str(checkpoint.model.device.type),
        versions={name: version(name) for name in SCORED_WITH},
    )
