"""Frechet distance between two sets of images, or of features, for `evaluate.load`."""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np

from t2i.errors import DataError
from t2i.measure.distances import frechet_distance, sample_size_note, statistics
from t2i.measure.extractor import metric_key
from t2i.measure.features import extract, load_features

CITATION = """\
@inproceedings{heusel2017gans,
  title={{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""

_INPUTS = """
Args:
    predictions: image files (as texts or paths), or rows of features.
    reference: the images or rows that they are compared with; their number may differ.
    features: for images, `efficientnet_lite0` or `inception`.
    inception: file of Inception's weights; by default it is downloaded once and hash-checked.
    resize: `clean` or `legacy_tensorflow`.

Returns:
    `fid` for images on Inception's features, `fd_` and their name on others, `frechet_distance` for given features;
    n, n_reference, and a note where n is too small.
"""


class FrechetDistance(evaluate.Metric):
    """Measure the Frechet distance between Gaussians fitted to two sets of features."""

    def _info(self) -> evaluate.MetricInfo:
        # Two forms: whoever has features of another network already need not have its images here.
        rows = datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))})
        files = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation=CITATION,
            inputs_description=_INPUTS,
            features=[rows, files],
            reference_urls=["https://arxiv.org/abs/1706.08500"],
        )

    def add_batch(self, *, predictions: Sequence[object] | None = None, **others: object) -> None:
        """Take a batch of images or rows.

        Raises:
            DataError: it is empty.
        """
        if predictions is None or not len(predictions):
            raise DataError("frechet_distance has no predictions; expected image files or rows of features.")
        super().add_batch(predictions=[_as_text(one) for one in predictions], **others)

    def add(self, *, prediction: object = None, **others: object) -> None:
        """Take one image or row."""
        super().add(prediction=_as_text(prediction), **others)

    def _compute(
        self,
        predictions: Sequence[str] | Sequence[Sequence[float]],
        # Not evaluate's `references`, which must be as many as the predictions.
        reference: Sequence[str] | Sequence[Sequence[float]],
        features: str = "efficientnet_lite0",
        inception: str | None = None,
        resize: str = "clean",
    ) -> dict[str, object]:
        if isinstance(predictions[0], str):
            extractor = load_features(features, weights=Path(inception) if inception else None, resize=resize)
            key = metric_key(features)
            made, real = (
                extract([Path(str(file)) for file in files], extractor, batch_size=32)
                for files in (predictions, reference)
            )
        else:
            key, made, real = "frechet_distance", np.asarray(predictions), np.asarray(reference)
        return {
            key: frechet_distance(statistics(made), statistics(real)),
            "n": len(made),
            "n_reference": len(real),
            "note": sample_size_note(key, n=len(made), dims=made.shape[1]),
        }


def _as_text(one: object) -> object:
    # evaluate knows texts and numbers; of a Path it says that references are missing.
    return os.fspath(one) if isinstance(one, os.PathLike) else one
