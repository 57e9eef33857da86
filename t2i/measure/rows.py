"""Distances of every row of images to its reference."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2i.generate.others.family import AnyTokenizer
from t2i.measure.extractor import FeatureExtractor
from t2i.measure.feature_cache import FEATURE_BATCH, Measured, measure_reference, with_statistics
from t2i.measure.features import extract
from t2i.measure.images import Reconstructions
from t2i.measure.measures import measure
from t2i.measure.protocol import ROWS, RowScore

if TYPE_CHECKING:  # it measures by this module
    from t2i.measure.score import Task

Images = Iterable[np.ndarray | Path]
"""Files, or uint8 images (H, W, 3)."""


def distance_rows(
    task: "Task",
    *,
    drawn: dict[str, list[Path]],
    tokenizer: AnyTokenizer,
    extractor: FeatureExtractor,
    replicates: int,
) -> dict[str, RowScore]:
    """Measure the distances of every row to its reference.

    Args:
        replicates: resamplings per interval; 0 for none.
    """
    reference = measure_reference(task.reference, extractor, progress=True)
    made: dict[str, Images] = {**drawn, "reconstructions": Reconstructions(task.own, tokenizer)}
    features = {
        row: with_statistics(extract(images, extractor, batch_size=FEATURE_BATCH, progress=True))
        for row, images in made.items()
    }
    compared = {row: (each, reference) for row, each in features.items()}
    if task.own_places is None:
        real = with_statistics(extract(task.own, extractor, batch_size=FEATURE_BATCH))
        compared["real"] = (real, reference)
    else:
        # The reference holds the captions' real images, and papers differ on whether it should: so both are measured.
        compared["matched"] = (features["model"], with_statistics(reference.features[task.own_places]))
        compared["real"] = _apart(reference.features, task.own_places)
    return {
        row: _row(row, *sides, features=extractor.name, replicates=replicates)
        for row, sides in compared.items()
    }


def _apart(features: np.ndarray, places: Sequence[int]) -> tuple[Measured, Measured]:
    """Take the images at `places`, at most half of all, out of the reference that they are compared with.

    Compared with themselves, real images would have a distance near zero for that reason alone.
    """
    taken = list(places[: len(features) // 2])
    return with_statistics(features[taken]), with_statistics(np.delete(features, taken, axis=0))


def _row(row: str, made: Measured, reference: Measured, *, features: str, replicates: int) -> RowScore:
    found = measure(made, reference, features=features, replicates=replicates)
    return RowScore(
        what=ROWS[row],
        n=len(made.features),
        n_reference=len(reference.features),
        measures={key: each.value for key, each in found.items()},
        intervals={key: each.interval for key, each in found.items() if each.interval is not None},
    )
