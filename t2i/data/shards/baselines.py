"""Count-based baselines: what codes cost without a language model, to read every loss curve against."""

import numpy as np


def code_floors(codes: dict[str, np.ndarray], *, codebook_size: int) -> dict[str, dict[str, float]]:
    """Count simple models of the codes on train and score each split with them, in nats per code.

    Args:
        codes: per split, (N, K) codes in row order; "train" is counted.

    Returns:
        per split: uniform, unigram, position_unigram and bigram. On train, unigram is the entropy of the codes;
        elsewhere each is a cross-entropy.
    """
    train = codes["train"]
    num_codes = train.shape[1]
    counts = np.bincount(train.ravel(), minlength=codebook_size)
    # Counts are smoothed towards the next simpler model, so that the cost of an unseen code is finite: here
    # by one count in all towards uniform, in _Table by ten towards the unigram.
    unigram = (counts + 1 / codebook_size) / (counts.sum() + 1)
    places = np.tile(np.arange(num_codes), len(train))
    position = _Table(places, train.ravel(), unigram, num_rows=num_codes)
    bigram = _Table(train[:, :-1].ravel(), train[:, 1:].ravel(), unigram, num_rows=codebook_size)
    return {
        split: {
            "uniform": float(np.log(codebook_size)),
            "unigram": float(-np.log(unigram[rows]).mean()),
            "position_unigram": position.cost(np.tile(np.arange(num_codes), len(rows)), rows.ravel()),
            "bigram": _bigram(rows, unigram, bigram),
        }
        for split, rows in codes.items()
    }


class _Table:
    """Counts of (given, chosen) pairs, smoothed by ten counts towards the unigram."""

    def __init__(self, given: np.ndarray, chosen: np.ndarray, unigram: np.ndarray, *, num_rows: int) -> None:
        self.unigram = unigram
        # Sparse: a dense table of 16,384 x 16,384 codes would take gigabytes.
        self.pairs, self.counts = np.unique(
            given.astype(np.int64) * len(unigram) + chosen, return_counts=True
        )
        self.totals = np.bincount(given, minlength=num_rows)

    def cost(self, given: np.ndarray, chosen: np.ndarray) -> float:
        """Return the mean nats of the chosen codes, each after what is given."""
        wanted = given.astype(np.int64) * len(self.unigram) + chosen
        places = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        found = np.where(self.pairs[places] == wanted, self.counts[places], 0)
        return float(-np.log((found + 10 * self.unigram[chosen]) / (self.totals[given] + 10)).mean())


def _bigram(rows: np.ndarray, unigram: np.ndarray, table: _Table) -> float:
    """Return the mean cost of an image's codes: the first by unigram, each other after its predecessor."""
    first = float(-np.log(unigram[rows[:, 0]]).mean())
    if rows.shape[1] == 1:  # a code that stands alone has no predecessor, and a mean over none is nan
        return first
    others = table.cost(rows[:, :-1].ravel(), rows[:, 1:].ravel())
    return (first + others * (rows.shape[1] - 1)) / rows.shape[1]
