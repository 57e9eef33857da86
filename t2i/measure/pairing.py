"""Measures that see which caption an image belongs to: CLIP score and judges, on rows of images and captions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from t2i.generate.others.family import AnyTokenizer
from t2i.measure.clip import RULE as CLIP_RULE
from t2i.measure.clip import Clip, clip_score, embed_captions, embed_images
from t2i.measure.images import LazyImages, Reconstructions
from t2i.measure.judge import Judge
from t2i.measure.protocol import ROWS, ClipScores, Intervals, JudgeScores, RowScore
from t2i.measure.remote_judge import RemoteJudge, ask
from t2i.measure.shuffled import unrelated
from t2i.measure.verdict import Verdict, judged

Images = Iterable[np.ndarray | Path]
"""Files, or uint8 images (H, W, 3)."""


@dataclass(frozen=True)
class Row:
    """Images of one set, and the place of the caption that each is judged under."""

    images: str
    """Name of the set."""
    places: list[int]
    """Indices of captions, one per image."""


@dataclass(frozen=True)
class Pairing:
    """All rows that have images and captions."""

    captions: list[str]
    sets: dict[str, Images]
    """Each can be iterated again and again."""
    rows: dict[str, Row]

    def captions_of(self, row: str) -> list[str]:
        """List the captions that a row's images are judged under."""
        return [self.captions[place] for place in self.rows[row].places]


def pairing_of(
    captions: dict[str, str],
    own: LazyImages,
    *,
    image_ids: Sequence[int] | None,
    num_real: int,
    drawn: dict[str, list[Path]],
    tokenizer: AnyTokenizer,
) -> Pairing:
    """Put images beside captions: matched ones, and for yardsticks those of others.

    Args:
        own: real images, in the order of their first captions, which come before all others.
        num_real: how many of them the row `real` has.
    """
    texts = list(captions.values())
    everything = list(range(len(texts)))
    some = replace(own, openers=own.openers[:num_real])
    sets: dict[str, Images] = {**drawn, "real": some, "reconstructions": Reconstructions(own, tokenizer)}
    rows = {row: Row(row, everything) for row in drawn}
    # Real images come in the order of their captions, so the two line up.
    rows |= {
        "real": Row("real", everything[:num_real]),
        "reconstructions": Row("reconstructions", everything[: len(own)]),
    }
    others = unrelated(texts, image_ids or list(captions), shift=1)
    if others:
        # What a model gets that ignores captions: unrelated images and captions agree in some things too.
        rows |= {"other_captions": Row("model", others), "mismatched": Row("real", others[:num_real])}
    return Pairing(texts, sets, rows)


def clip_scores(pairing: Pairing, clip: Clip) -> ClipScores:
    """Compute the CLIP score of every row."""
    captions = embed_captions(pairing.captions, clip)  # (N, D)
    embedded: dict[str, Tensor] = {name: embed_images(images, clip) for name, images in pairing.sets.items()}
    rows = {
        name: clip_score(embedded[row.images], captions[row.places]) for name, row in pairing.rows.items()
    }
    return ClipScores(
        clip.name,
        clip.weights_sha256,
        rule=CLIP_RULE,
        rows=rows,
        other_captions=rows.get("other_captions"),
        preprocessing=clip.preprocessing,
    )


def exact_scores(pairing: Pairing, judge: Judge, *, replicates: int) -> JudgeScores:
    """Let the exact judge read every row; a row none of whose captions state anything has no measure.

    Args:
        replicates: resamplings per interval; 0 for none.
    """
    read = {name: judge.read(images) for name, images in pairing.sets.items()}
    verdicts = {
        name: judged(read[row.images], pairing.captions_of(name)) for name, row in pairing.rows.items()
    }
    return judge_scores(judge, verdicts, replicates=replicates)


def judge_scores(judge: Judge, verdicts: Mapping[str, Verdict], *, replicates: int) -> JudgeScores:
    """Measure verdicts by row, with what stands behind them."""
    found = {name: verdict.estimates(replicates=replicates) for name, verdict in verdicts.items()}
    return JudgeScores(
        protocol={**judge.made_of, "sha256": judge.sha256()},
        rows={name: {key: each.value for key, each in row.items()} for name, row in found.items() if row},
        details={name: verdict.to_json() for name, verdict in verdicts.items()},
        intervals={
            name: {key: each.interval for key, each in row.items() if each.interval is not None}
            for name, row in found.items()
        },
    )


def remote_scores(pairing: Pairing, judge: RemoteJudge) -> JudgeScores:
    """Let a judge behind HTTP score every row: the mean over images of each measure that it gives."""
    rows, revisions = {}, set()
    for name, row in pairing.rows.items():
        answers = ask(
            judge,
            pairing.sets[row.images],
            pairing.captions_of(name),
            description=f"{judge.name} of {name}",
        )
        revisions.add(answers.revision)
        rows[name] = answers.means()
    return JudgeScores(judge.protocol(revisions, captions=pairing.captions), rows=rows, details={})


def with_pairing(
    rows: dict[str, RowScore],
    *,
    clip: ClipScores | None,
    judges: dict[str, JudgeScores],
    pairing: Pairing,
) -> dict[str, RowScore]:
    """Add what sees pairing to rows that have captions, and rows that are nothing but that."""
    found = {name: {"clip_score": score} for name, score in clip.rows.items()} if clip else {}
    intervals: dict[str, Intervals] = {}
    for judge in judges.values():
        for name, measures in judge.rows.items():
            found[name] = found.get(name, {}) | measures
            intervals[name] = intervals.get(name, {}) | judge.intervals.get(name, {})
    new = {
        name: RowScore(ROWS[name], n=len(pairing.rows[name].places), measures={})
        for name in found
        if name not in rows
    }
    return {
        name: replace(
            row,
            measures=row.measures | found.get(name, {}),
            intervals=row.intervals | intervals.get(name, {}),
        )
        for name, row in (rows | new).items()
    }
