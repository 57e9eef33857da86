"""What codes cost without a language model: the floors that every curve is read against."""

import numpy as np


def code_floors(codes: dict[str, np.ndarray], *, codebook_size: int) -> dict[str, dict[str, float]]:
    """Count simple models of the codes on the training split and score each split with them, in nats a code.

    Args:
        codes: per split, (N, K) codes in row order; "train" is counted.

    Returns:
        per split: uniform, unigram, position_unigram and bigram. On train, unigram is the plain entropy of the
        codes; elsewhere each is a cross-entropy. Counts are smoothed towards the next simpler model (unigram by
        one in all towards uniform; the others by ten towards unigram), so that an unseen code costs, but not for ever.
    """
    train = codes["train"]
    num_codes = train.shape[1]
    counts = np.bincount(train.ravel(), minlength=codebook_size)
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
    """Sparse counts of (given, chosen), smoothed by ten towards the unigram."""

    def __init__(self, given: np.ndarray, chosen: np.ndarray, unigram: np.ndarray, *, num_rows: int) -> None:
        self.unigram = unigram
        self.pairs, self.counts = np.unique(
            given.astype(np.int64) * len(unigram) + chosen, return_counts=True
        )
        self.totals = np.bincount(given, minlength=num_rows)

    def cost(self, given: np.ndarray, chosen: np.ndarray) -> float:
        """Mean nats of the chosen codes after what is given."""
        wanted = given.astype(np.int64) * len(self.unigram) + chosen
        places = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        found = np.where(self.pairs[places] == wanted, self.counts[places], 0)
        return float(-np.log((found + 10 * self.unigram[chosen]) / (self.totals[given] + 10)).mean())


def _bigram(rows: np.ndarray, unigram: np.ndarray, table: _Table) -> float:
    """Mean cost of a picture's codes: the first by unigram, each other after the one before it."""
    first = float(-np.log(unigram[rows[:, 0]]).mean())
    others = table.cost(rows[:, :-1].ravel(), rows[:, 1:].ravel())
    return (first + others * (rows.shape[1] - 1)) / rows.shape[1]
