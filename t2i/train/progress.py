"""How far a run is, and the losses that the spike guard looks back on."""

from dataclasses import dataclass, field

WINDOW_STEPS = 64
"""Losses that a new one is held against."""


@dataclass
class Progress:
    """What a run has done; saved and restored with the weights."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    """Real tokens, padding not counted."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps whose update was left out, for a gradient that was not finite or a spike of the loss."""
    skipped_in_a_row: int = 0
    rewinds: int = 0
    """Times that a spike sent the run back to a checkpoint."""
    losses: list[float] = field(default_factory=list)
    """Those of the last steps, which a spike is told by."""
    owed: list[int] = field(default_factory=list)
    """Places of periodic work that a stop cut short; it is done first when the run goes on."""

    def count(self, num_sequences: int, *, tokens: int, loss: float | None, was_skipped: bool) -> None:
        """Count a step over all ranks. One without an update counts too: the schedule and the data go on."""
        self.step += 1
        self.samples += num_sequences
        self.tokens += tokens
        self.skipped += was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        if loss is not None and not was_skipped:
            add_loss(loss, self.losses)


def add_loss(loss: float, window: list[float]) -> None:
    """Put a loss into the window, in place, and drop the oldest beyond WINDOW_STEPS."""
    window.append(loss)
    del window[:-WINDOW_STEPS]
