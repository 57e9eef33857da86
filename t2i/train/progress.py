"""How far a run has come, and the recent losses that the spike guard compares with."""

import itertools
from dataclasses import dataclass, field

WINDOW_STEPS = 64
"""Recent losses that a new one is compared with."""
RISES = 3
"""Evaluations in a row with a higher held-out loss, after which a run is said to overfit."""
WINDOW_EVALUATIONS = RISES + 2


@dataclass
class Progress:
    """What a run has done so far; saved and restored with the weights."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    """Tokens trained on, without padding."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps whose update was skipped, for a loss or gradient that was not finite, or for a loss spike."""
    skipped_in_a_row: int = 0
    rewinds: int = 0
    """Times that a spike rewound the run to a checkpoint."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last WINDOW_STEPS steps, by which a spike is recognised."""
    heldout_losses: list[float] = field(default_factory=list)
    """Losses of the last WINDOW_EVALUATIONS evaluations of the held-out split."""
    heldout_step: int = -1
    """Step of the last of them; -1 before the first."""
    owed: list[int] = field(default_factory=list)
    """Indices of pending periodic work, which a stop cut short and a resumed run does first."""

    def note_heldout(self, loss: float) -> None:
        """Keep the held-out loss of this step."""
        if self.step != self.heldout_step:  # measured again where a run was resumed
            self.heldout_losses = [*self.heldout_losses, loss][-WINDOW_EVALUATIONS:]
            self.heldout_step = self.step

    def has_begun_to_rise(self) -> bool:
        """Tell whether the held-out loss has now risen in RISES evaluations in a row, and not in one more."""
        rises = [later > earlier for earlier, later in itertools.pairwise(self.heldout_losses)]
        return len(rises) >= RISES and all(rises[-RISES:]) and not all(rises[-RISES - 1 : -RISES] or [False])

    def count(self, num_sequences: int, *, tokens: int, loss: float | None, was_skipped: bool) -> None:
        """Count a step over all ranks, also one without an update."""
        # Schedule and data move on at a skipped step, or ranks and resumed runs would have to agree on another count.
        self.step += 1
        self.samples += num_sequences
        self.tokens += tokens
        self.skipped += was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        # A spike that was skipped is no loss to compare with.
        if loss is not None and not was_skipped:
            add_loss(loss, self.losses)


def add_loss(loss: float, window: list[float]) -> None:
    """Put a loss into the window, in place, and drop the oldest beyond WINDOW_STEPS."""
    window.append(loss)
    del window[:-WINDOW_STEPS]
