"""What scores.json says: the rows of one model, and all that tells whether two scores may be compared."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # measuring loads torch and streaming, which comparing two files need not wait for
    from t2i.measure.heldout import CaptionMeter

SCORES = "scores.json"

ROWS = {
    "real": "real images that are not in the reference",
    "reconstructions": "the captions' own images through the image tokenizer",
    "model": "drawn from the captions",
    "matched": "drawn, against the captions' own images alone",
    "redrawn": "drawn again from the same captions, by other seeds",
    "untrained": "drawn by the same architecture, randomly initialised",
    "other_captions": "drawn, each beside the caption of another",
    "mismatched": "real images, each beside the caption of another",
}
"""Rows of scores.json. The last two are yardsticks of measures that see which caption an image belongs to."""


@dataclass(frozen=True)
class Protocol:
    """What a measure was taken on: entries of scores.json that must be equal for two scores to be compared."""

    data: str
    n: int
    features: str
    features_sha256: str
    resize: str
    reference: str
    reference_sha256: str
    crop: str
    image_size: int
    captions: str
    """How the list was chosen."""
    captions_sha256: str
    kernel_seed: int


@dataclass(frozen=True)
class Subject:
    """What was measured: entries that may differ between two scores, and are shown."""

    checkpoint: str
    weights_sha256: str
    image_tokenizer_sha256: str
    # Here and not in the protocol: guidance is tuned per model, so equal samplers would compare nobody at their best.
    sampler: dict[str, object]
    batch_size: int
    dtype: str
    device: str
    versions: dict[str, str]


OWN_MEASURES = re.compile(r"(fid|kid|mind|cmmd|judge|clip)(_.*)?|(fd|kd)_.*")
"""Names of measures of this package."""


def is_own(name: str) -> bool:
    """Tell whether scores.json has an entry or measure of its own that is called so."""
    entries = {each.name for kind in (Protocol, Subject, RowScore, Scores) for each in fields(kind)}
    return name in entries or OWN_MEASURES.fullmatch(name) is not None


CLIP, CLIP_RULE, BOOTSTRAP = "clip_sha256", "clip_rule", "bootstrap"
PIXELS = "reference_pixels_sha256"
"""The CLIP that a score was taken with, how it is computed, how intervals are, and the reference's pixels where its
description does not tell them: compared only where both have it."""
PREPROCESSING, CLIP_PREPROCESSING = "features_preprocessing_sha256", "clip_preprocessing_sha256"
"""How a folder's network reads images, beside its weights: compared likewise."""
RULES, JUDGES = "rules", "judges"
"""How each measure is computed, and who judged: compared by name, where both files have it. Older files have none."""
CHOSE = "chose_the_images"
"""Mark of a judge that scores the images that it chose itself."""


Intervals = dict[str, tuple[float, float]]
"""Measure -> 95% interval, of the measures that have one."""


@dataclass(frozen=True)
class RowScore:
    """One set of images, measured."""

    what: str
    n: int
    """Images in it."""
    measures: dict[str, float]
    """By the keys of scores.json, which name the features: fid only on Inception's."""
    n_reference: int | None = None
    """None if a file does not say."""
    intervals: Intervals = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Give it the form of a row in scores.json."""
        found: dict[str, object] = {
            "what": self.what,
            "n": self.n,
            "n_reference": self.n_reference,
            **self.measures,
        }
        intervals = {key: list(bounds) for key, bounds in self.intervals.items()}
        return found | ({"intervals": intervals} if intervals else {})


@dataclass(frozen=True)
class DrawingFacts:
    """What the caller knows of the drawing, for scores.json."""

    processes: int
    seconds_to_draw: float | None
    """None where an earlier call has drawn some of the images."""
    captions_heard: "dict[str, CaptionMeter] | None" = None
    """Caption sensitivity by held-out split; None where it was not measured, as with COCO."""

    def to_json(self) -> dict[str, object]:
        """Give them the form of entries of scores.json."""
        facts: dict[str, object] = {"processes": self.processes}
        if self.seconds_to_draw is not None:
            facts["seconds_to_draw"] = self.seconds_to_draw
        if self.captions_heard is None:
            return facts
        meters = {split: asdict(meter) for split, meter in self.captions_heard.items()}
        return facts | {"captions_heard": meters}


@dataclass(frozen=True)
class ClipScores:
    """CLIP scores of every row that has images of its own."""

    name: str
    weights_sha256: str
    rule: str
    """How it is computed, in words."""
    rows: dict[str, float]
    other_captions: float | None
    """Of the model's images under captions of other images: the control, a score that no caption can explain. None
    where all captions are one."""
    preprocessing: str = ""
    """Hash of how its folder says that images are read; empty if it is not known."""

    def to_json(self) -> dict[str, object]:
        """Give them the form of entries of scores.json."""
        return {
            "clip_score": self.rows["model"],
            "clip_score_other_captions": self.other_captions,
            "clip": self.name,
            CLIP: self.weights_sha256,
            **({CLIP_PREPROCESSING: self.preprocessing} if self.preprocessing else {}),
            CLIP_RULE: self.rule,
        }


@dataclass(frozen=True)
class JudgeScores:
    """What one judge says of every row that has images and captions."""

    protocol: dict[str, object]
    """Name, revision and what else two scores must share to be compared."""
    rows: dict[str, dict[str, float]]
    """Row -> measures."""
    details: dict[str, dict[str, object]]
    """Row -> what stands behind the measures, such as attributes; empty where nothing does."""
    intervals: dict[str, Intervals] = field(default_factory=dict)
    """Row -> intervals of its measures."""


@dataclass(frozen=True)
class Bootstrap:
    """What intervals are made of."""

    replicates: int
    """Resamplings per interval; 0 for no intervals."""
    seed: int


@dataclass(frozen=True)
class Scores:
    """All rows of one model, and all that a comparison has to know."""

    rows: dict[str, RowScore]
    protocol: Protocol
    subject: Subject
    clip: ClipScores | None
    """None for no CLIP score."""
    rules: dict[str, str]
    """How each distance is computed, in words."""
    bootstrap: Bootstrap
    reference_pixels: str
    """SHA-256 of the reference's pixels; empty where its description names its files and their sizes."""
    judges: dict[str, JudgeScores]
    """By the judge's key in scores.json."""
    note: str
    """On the sample size; empty if it is large enough."""
    facts: DrawingFacts
    seconds_to_measure: float
    preprocessing: str
    """How the feature network reads images, beside its weights; empty for those that come with their rule."""
    file: str
    """Name of the file that holds the scores."""

    @property
    def measures(self) -> list[str]:
        """Name the measures of the model's row."""
        return list(self.rows["model"].measures)

    def to_json(self) -> dict[str, object]:
        """Give them the form of scores.json."""
        return {
            # At the top too: most readers look for the model's number alone.
            **self.rows["model"].measures,
            **(self.clip.to_json() if self.clip else {}),
            "measures": self.measures,
            "rows": {row: self.rows[row].to_json() for row in ROWS if row in self.rows},
            "note": self.note,
            **asdict(self.protocol),
            RULES: self.rules,
            # Without intervals there is nothing to compare in how they would have been made.
            **({BOOTSTRAP: asdict(self.bootstrap)} if self.bootstrap.replicates else {}),
            **({PIXELS: self.reference_pixels} if self.reference_pixels else {}),
            **({PREPROCESSING: self.preprocessing} if self.preprocessing else {}),
            JUDGES: {name: judge.protocol for name, judge in self.judges.items()},
            "judged": {name: judge.details for name, judge in self.judges.items() if judge.details},
            **asdict(self.subject),
            "seeds": seeds_rule(self.subject.sampler, n=self.protocol.n),
            **self.facts.to_json(),
            "seconds_to_measure": self.seconds_to_measure,
            "file": self.file,
        }


def seeds_rule(sampler: Mapping[str, object], *, n: int) -> str:
    """Say which image is drawn by which seed."""
    if sampler.get("best_of", 1) == 1:
        return "image i of captions.jsonl is drawn with sampler.seed + i"
    return (
        f"candidate j of image i of captions.jsonl is drawn with sampler.seed + i + {n} j; the PNG file of the one that"
        " was kept names its candidate and image_seed"
    )
