"""The same image in fewer passes: several codes are guessed, computed in one pass, and kept as far as they were right.

A code is fixed by what stands before it and by its own noise, which is a hash of (seed, place, code). So a pass over W
codes shows at once how many of them one code at a time would have sampled. The first guess that differs from its own
draw ends what is kept, and that draw itself is right, for all before it was. Later draws are the next guesses.

This file is uploaded with exported models, so it imports only torch, transformers and the files beside it.

B images that are not finished, R = 2 B rows with guidance (conditional, then unconditional), K codes per image, W codes
per pass, N codes that may be sampled, D width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .race_open_lm import Draws, guided_logits, kept_codes, next_codes, race

WINDOWS = (1, 2, 4, 8, 16, 32)
"""Windows to choose from."""
TRIES = 2
"""Passes by which a window is timed, of which the shorter counts: the first of a new shape prepares kernels."""
LEAST_GUESSES = 8
"""Guesses that are looked at before windows are given up."""
MARGIN = 1.05
"""By so much a window must be faster than one code per pass."""
FADING = 0.98
"""What is left of a count after one more pass."""
PRIOR = 8
"""Right guesses, and as many wrong ones, that are taken as seen."""


@runtime_checkable
class WindowDecoder(Protocol):
    """What decodes windows, over keys and values in which each row stands at a position of its own."""

    length: int
    """Position of the next id of every row, in a call."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Read one id per row (R,) at `length`, and count it: hidden states (R, D)."""

    def read(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Read ids (R, W), each row's from its own position (R,) on: hidden states (R, W, D)."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""


@dataclass
class Pace:
    """Which window to use next: the one by which most codes per second are expected.

    How long passes take is measured, and so is how often guesses were right. No pass is made for that alone.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Of the last passes with all images of a batch, by window."""
    num_right: float = 0
    """Guesses that were right and had only right ones before them."""
    num_guesses: float = 0
    """Those, and the guesses that ended what was kept."""

    def window(self) -> int:
        """Choose the next window; windows grow step by step, as long as a larger one is expected to pay."""
        for window in [*WINDOWS[:2], *self.seconds]:
            if len(self.seconds.get(window, ())) < TRIES or (window > 1 and self.num_guesses < LEAST_GUESSES):
                return window
        return max(WINDOWS[: len(self.seconds) + 1], key=self._worth)

    @property
    def pays(self) -> bool | None:
        """Tell whether windows pay; None while too little was measured."""
        is_known = len(self.seconds.get(WINDOWS[1], ())) >= TRIES and self.num_guesses >= LEAST_GUESSES
        return self.window() > 1 if is_known else None

    def saw(self, window: int, *, seconds: float, num_kept: Sequence[int]) -> None:
        """Take in one pass, and how many codes of each image were kept."""
        self.seconds[window] = [*self.seconds.get(window, ())[-7:], seconds]
        # Older passes count less and less: weights change while a model is trained, and captions with them.
        if window > 1:
            self.num_right = FADING * self.num_right + sum(kept - 1 for kept in num_kept)
            self.num_guesses = FADING * self.num_guesses + sum(min(kept, window - 1) for kept in num_kept)

    def _worth(self, window: int) -> float:
        """Expect so many codes per second and image."""
        # One code per pass needs no bookkeeping, and nothing that could go wrong: windows have to beat it clearly.
        return self._codes(window) / self._time(window) * (MARGIN if window == 1 else 1)

    def _codes(self, window: int) -> float:
        """Return how many codes are kept per pass if every guess has the chance of those seen so far."""
        # Half of the guesses, until many were seen: an image may begin with a busy corner.
        chance = (self.num_right + PRIOR) / (self.num_guesses + 2 * PRIOR)
        return sum(chance**place for place in range(window))

    def _time(self, window: int) -> float:
        """Return the seconds of a pass; of a window that was not tried, by a line through the two largest tried."""
        if window in self.seconds:
            return min(self.seconds[window])
        first, second = sorted(self.seconds)[-2:]
        slope = (min(self.seconds[second]) - min(self.seconds[first])) / (second - first)
        return min(self.seconds[second]) + max(slope, 0) * (window - second)


def pace_of(
    window: int | Literal["auto"], *, model: PreTrainedModel, num_images: int, how: Draws
) -> Pace | int:
    """Return the window, or for "auto" what chooses it for such batches; it is kept with the model."""
    if window != "auto":
        return window
    # In 16 bits rounding decides many codes, and so would the measured times: the same command would give other images.
    if model.get_output_embeddings().weight.element_size() < 4:
        return 1
    # In __dict__, past nn.Module's __setattr__: it is no part of the model's state.
    pace: Pace = model.__dict__.setdefault("_paces", {}).setdefault((num_images, how), Pace())
    return 1 if pace.pays is False else pace


@dataclass
class Batch:
    """Images on their way, each at a place of its own; what is finished has left."""

    codes: Tensor
    """Of all images of the call (all, K + 1): known ones, then guesses; behind the last, a place that nobody reads."""
    keys: Tensor
    """Of all images (all, K)."""
    images: Tensor
    """Which of all images these are (B,)."""
    known: list[int]
    """How many codes are known of each."""

    @property
    def is_even(self) -> bool:
        """Tell whether all images of the call stand at the same place."""
        return len(self.known) == len(self.keys) and len({*self.known}) == 1

    def keys_at(self, places: Tensor) -> Tensor:
        """Return the keys of places (B, W), one after the other (B W,)."""
        return self.keys[self.images[:, None], places.clamp(max=self.keys.shape[1] - 1)].flatten()

    def advance(self, num_kept: Sequence[int]) -> Tensor | None:
        """Count kept codes in, and let finished images leave; return which of the others stay, or None if all do."""
        known = [known + kept for known, kept in zip(self.known, num_kept, strict=True)]
        stay = [index for index, number in enumerate(known) if number < self.keys.shape[1]]
        self.known = [known[index] for index in stay]
        if len(stay) == len(known):
            return None
        rows = torch.tensor(stay, dtype=torch.long, device=self.images.device)
        self.images = self.images[rows]
        return rows


@dataclass(frozen=True)
class Passes:
    """Images on their way, and all that draws their next codes."""

    batch: Batch
    decoder: WindowDecoder
    start: int
    """The length of the decoder less the number of known codes, of which the last is not read yet."""
    to_logits: Callable[[Tensor], Tensor]
    how: Draws

    def single(self) -> list[int]:
        """Draw the next code of each image of the call, all at one place; of each, one code becomes known."""
        batch, how = self.batch, self.how
        place = batch.known[0]
        self.decoder.length = self.start + place
        ids = batch.codes[:, place - 1] + how.image_ids.start
        hidden = self.decoder(torch.cat([ids, ids]) if how.is_guided else ids)  # (R, D)
        drawn = next_codes(hidden, batch.keys[:, place], to_logits=self.to_logits, how=how)
        batch.codes[:, place] = drawn
        return [1] * len(drawn.tolist())  # waits for the device, as a window's pass does

    def several(self, window: int) -> list[int]:
        """Draw the next codes of each image, and guess those behind; return how many of each became known."""
        batch, how = self.batch, self.how
        rows, num_codes = batch.images[:, None], batch.keys.shape[1]
        known = torch.tensor(batch.known, device=rows.device)[:, None]  # (B, 1)
        # Every image takes W places. Behind the last code is none, so near the end some that are known are read again.
        first = known.clamp(max=num_codes - window)
        places = first + torch.arange(window, device=rows.device)  # (B, W)
        ids = batch.codes[rows, places - 1] + how.image_ids.start
        starts = self.start + first[:, 0]
        if how.is_guided:
            ids, starts = torch.cat([ids, ids]), torch.cat([starts, starts])
        hidden = self.decoder.read(ids, starts).flatten(0, 1)  # (R W, D)
        logits = guided_logits(hidden, to_logits=self.to_logits, how=how)
        likely = kept_codes(
            logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
        )  # (B W, N) each
        drawn = race(*likely, batch.keys_at(places)).view_as(places)
        guessed = batch.codes[rows, places]
        drawn = guessed.where(
            places < known, drawn
        )  # what is known stays, even where rounding would decide otherwise
        num_right = (guessed == drawn)[:, :-1].long().cumprod(1).sum(1, keepdim=True)
        batch.codes[rows, places] = drawn
        num_kept: list[int] = (first + num_right + 1 - known)[
            :, 0
        ].tolist()  # waits for the device, once per pass
        _guess(batch, likely, first + window, count=max(num_kept))
        return num_kept


def sample_by_window(
    codes: list[Tensor],
    decoder: WindowDecoder,
    keys: Tensor,
    *,
    to_logits: Callable[[Tensor], Tensor],
    how: Draws,
    pace: Pace | int,
    on_code: Callable[[list[Tensor]], object] = len,
) -> None:
    """Append the codes that one at a time would give: all up to K, or fewer once windows are found not to pay.

    Args:
        codes: of each place (B,); the first is there.
        decoder: holds the prompts, and has room for K codes.
        keys: of each image (B, K).
        on_code: called after each code that is known of all images, with all such codes.
    """
    num_images, num_codes = keys.shape
    start = decoder.length - 1
    # On a CPU, waiting for a core that others use says nothing of a pass.
    clock = time.thread_time if keys.device.type == "cpu" else time.perf_counter
    # Nothing is known yet but the first code, which is as good a guess as any for the others.
    found = codes[0][:, None].repeat(1, num_codes + 1)
    batch = Batch(found, keys, torch.arange(num_images, device=keys.device), [1] * num_images)
    passes = Passes(batch, decoder, start, to_logits, how)
    while len(codes) < num_codes:
        if isinstance(pace, Pace) and pace.pays is False and batch.is_even:
            decoder.length = start + batch.known[0]
            return
        wish = pace.window() if isinstance(pace, Pace) else pace
        window = min(wish, num_codes - min(batch.known))
        began = clock()
        # The pass that windows are compared with is the plain one, without what they need beside it.
        num_kept = passes.single() if window == 1 and batch.is_even else passes.several(window)
        if isinstance(pace, Pace):
            if len(batch.known) == num_images and window == wish:
                # Not of images near their end: they read again what is known.
                pairs = zip(batch.known, num_kept, strict=True)
                counted = [kept for known, kept in pairs if known + window <= num_codes]
                pace.saw(window, seconds=clock() - began, num_kept=counted)
            if not pace.pays and batch.is_even:
                # Side by side until windows are known to pay, so that one code at a time remains possible.
                num_kept = [min(num_kept)] * num_images
        stay = batch.advance(num_kept)
        if stay is not None:
            decoder.keep(torch.cat([stay, stay + len(num_kept)]) if how.is_guided else stay)
        for place in range(len(codes), min(batch.known, default=num_codes)):
            codes.append(found[:, place])
            on_code(codes)


def _guess(batch: Batch, likely: tuple[Tensor, Tensor], start: Tensor, *, count: int) -> None:
    """Guess so many codes from places (B, 1) on, which are behind the window; within it the last draws are the guesses.

    Args:
        likely: probabilities and codes (B W, N) of the window.
    """
    # By the probabilities of the last place, but by their own noise: where both places have like probabilities, the
    # same code wins. docs/window.md has other rules that were measured.
    places = (start + torch.arange(count, device=start.device)).clamp(max=batch.keys.shape[1])
    probabilities, codes = (part.unflatten(0, (len(start), -1))[:, -1] for part in likely)  # (B, N) each
    probabilities, codes = (part.repeat_interleave(count, 0) for part in (probabilities, codes))
    batch.codes[batch.images[:, None], places] = race(probabilities, codes, batch.keys_at(places)).view_as(
        places
    )
