"""How often images show what their captions state: by attribute, on average over attributes, and over all facts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2i.measure.attributes import attributes_of
from t2i.measure.measures import LEAST_RESAMPLED, Estimate, bootstrap_counts, interval_of

MEAN, POOLED = "judge", "judge_pooled"
"""Keys in scores.json: the mean share over attributes, and the share of all stated facts."""
FEWEST = 20
"""Captions that must state an attribute for it to be part of the mean: the share of fewer is chance."""


@dataclass(frozen=True)
class Verdict:
    """Of every image, whether it shows what its caption states."""

    num_captions: int
    right: dict[str, np.ndarray]
    """Attribute -> (N,): 1 where the image shows what the caption states, 0 where it does not, NaN where the caption
    states nothing. Attributes that no caption states are left out."""

    @property
    def n(self) -> dict[str, int]:
        """Count the captions that state each attribute."""
        return {name: int((~np.isnan(each)).sum()) for name, each in self.right.items()}

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of them whose image shows it."""
        return {name: float(np.nanmean(each)) for name, each in self.right.items()}

    @property
    def averaged(self) -> list[str]:
        """Name the attributes that are part of the mean."""
        return [name for name, count in self.n.items() if count >= FEWEST]

    def mean(self) -> float | None:
        """Average over attributes, so that many captions with a skin tone decide no more than a few with a colour."""
        found = self.estimates(replicates=0).get(MEAN)
        return found.value if found else None

    def estimates(self, *, replicates: int) -> dict[str, Estimate]:
        """Measure the mean over attributes and the share of all facts; what no caption states has no measure.

        Args:
            replicates: resamplings of the captions per interval; fewer than 2 for no intervals.
        """
        once = np.ones((1, self.num_captions))
        counts = bootstrap_counts(self.num_captions, replicates=replicates)
        num_stating = int(self._stated(list(self.right)).any(axis=0).sum())
        found = {}
        for key, share in ((MEAN, self._means), (POOLED, self._pooled)):
            value = float(share(once)[0])
            if np.isnan(value):
                continue
            resampled = share(counts)
            resampled = resampled[
                ~np.isnan(resampled)
            ]  # by chance, no caption that states anything was drawn
            is_enough = num_stating >= LEAST_RESAMPLED and len(resampled) >= 2
            found[key] = Estimate(value, interval_of(value, resampled) if is_enough else None)
        return found

    def to_json(self) -> dict[str, object]:
        """Give it the form of an entry of `judged` in scores.json."""
        return {"accuracy": self.accuracy, "n": self.n, "averaged": self.averaged}

    def _means(self, counts: np.ndarray) -> np.ndarray:
        """Average over attributes in resamplings (R, N): (R,)."""
        shares = _share(*self._sums(self.averaged, counts))  # (A, R)
        return _share(np.nan_to_num(shares).sum(0), (~np.isnan(shares)).sum(0))

    def _pooled(self, counts: np.ndarray) -> np.ndarray:
        """Share of all stated facts in resamplings (R, N): (R,)."""
        right, stated = self._sums(list(self.right), counts)
        return _share(right.sum(0), stated.sum(0))

    def _sums(self, names: Sequence[str], counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum what images show and what captions state: each (A, R)."""
        stated = self._stated(names)
        right = np.array([np.nan_to_num(self.right[name]) for name in names]).reshape(stated.shape)
        return right @ counts.T, stated @ counts.T

    def _stated(self, names: Sequence[str]) -> np.ndarray:
        """Say which captions state which attributes: (A, N)."""
        return np.array([~np.isnan(self.right[name]) for name in names]).reshape(
            len(names), self.num_captions
        )


def judged(read: dict[str, list[str]], captions: Sequence[str]) -> Verdict:
    """Compare what a judge read from images with what their captions state."""
    stated = [attributes_of(caption) for caption in captions]
    right = {
        name: np.array(
            [
                float(values[place] == said[name]) if name in said else np.nan
                for place, said in enumerate(stated)
            ]
        )
        for name, values in read.items()
    }
    return Verdict(len(captions), {name: each for name, each in right.items() if not np.isnan(each).all()})


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
