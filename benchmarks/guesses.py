"""What window.py measures windows by: the passes that they take, and other rules of guessing new places."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from t2i.data.shards.reader import read_split
from t2i.model.open_lm import window_open_lm
from t2i.model.open_lm.decoding_open_lm import Decoder
from t2i.model.open_lm.race_open_lm import race
from t2i.model.open_lm.window_open_lm import Batch

Rule = Callable[..., None]
"""Guesses as window_open_lm._guess does: by the window's probabilities and codes, from places (B, 1) on."""


@contextmanager
def counting() -> Iterator[list[int]]:
    """Collect the number of rows of each pass."""
    rows: list[int] = []
    read = Decoder.read

    def counted(decoder: Decoder, ids: Tensor, starts: Tensor) -> Tensor:
        rows.append(len(ids))
        return read(decoder, ids, starts)

    Decoder.read = counted
    try:
        yield rows
    finally:
        Decoder.read = read


@contextmanager
def guessing(rule: Rule) -> Iterator[None]:
    """Guess by another rule."""
    before = window_open_lm._guess
    window_open_lm._guess = rule
    try:
        yield
    finally:
        window_open_lm._guess = before


def rules_of(chances: Tensor) -> dict[str, Rule]:
    """Name the rules that are compared; `chances` are those of bigrams."""
    return {
        "the last place's probabilities, own noise": window_open_lm._guess,
        "the last draw": repeat,
        "the code above": above,
        "bigrams of training codes, own noise": partial(by_bigrams, chances=chances),
        "half bigrams, half the last place's probabilities": partial(by_bigrams, chances=chances, share=0.5),
    }


def repeat(batch: Batch, likely: tuple[Tensor, Tensor], start: Tensor, *, count: int) -> None:
    """Guess the last draw again."""
    places = (start + torch.arange(count)).clamp(max=batch.keys.shape[1])
    rows = batch.images[:, None]
    batch.codes[rows, places] = batch.codes[rows, start - 1].expand(-1, count)


def above(batch: Batch, likely: tuple[Tensor, Tensor], start: Tensor, *, count: int) -> None:
    """Guess the code above, in the grid of codes."""
    num_codes = batch.keys.shape[1]
    side = int(num_codes**0.5)
    for place in range(count):  # one after the other: the code above may be a guess of this very pass
        column = (start[:, 0] + place).clamp(max=num_codes)
        batch.codes[batch.images, column] = batch.codes[batch.images, (column - side).clamp(min=0)]


def by_bigrams(
    batch: Batch,
    likely: tuple[Tensor, Tensor],
    start: Tensor,
    *,
    count: int,
    chances: Tensor,
    share: float = 1.0,
) -> None:
    """Guess by the code before, known or guessed, each place under its own noise; the rest by the last place."""
    probabilities, codes = (part.unflatten(0, (len(start), -1))[:, -1] for part in likely)  # (B, N) each
    every = torch.arange(len(chances)).expand(len(start), -1)
    for place in range(count):
        column = (start + place).clamp(max=batch.keys.shape[1])  # (B, 1)
        after = chances[batch.codes[batch.images, column[:, 0] - 1]]  # (B, codebook)
        mixed = share * after.to(probabilities.dtype)
        mixed.scatter_add_(1, codes, (1 - share) * probabilities)
        batch.codes[batch.images, column[:, 0]] = race(mixed, every, batch.keys_at(column))


def bigram_chances(shards: Path, *, codebook_size: int) -> Tensor:
    """Count each training code after the code before it: probabilities (codebook, codebook), a row per code before."""
    counts = torch.zeros(codebook_size, codebook_size)
    for sample in read_split(shards, "train"):
        codes = torch.as_tensor(sample["codes"]).long()
        counts.index_put_((codes[:-1], codes[1:]), torch.ones(len(codes) - 1), accumulate=True)
    # One more count by how common codes are: a code that nothing followed says no more than that.
    counts += counts.sum(0) / counts.sum()
    return counts / counts.sum(1, keepdim=True)
