"""Each arm's own best learning rate, found by short runs on a seed that no other run has.

One rate for all arms favours the arm that it suits. So an arm is tried with each of a few values, and its runs take the
one whose held-out loss ended lowest. The seed of the trials is left out of every comparison: a value that was chosen on
a seed fits that seed better than the next.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import NumericalError, UserError
from t2i.runs.metrics_log import read_metrics, step_of
from t2i.runs.run_folder import read_status
from t2i.study.spec import Study, Tuning

DONE = "done"
LOSSES = ("image_loss", "text_loss")
"""What a trial can be judged by."""


@dataclass(frozen=True)
class Tuned:
    """What the trials of one arm say."""

    losses: dict[float, float]
    """Value -> held-out loss at the end; nan for one that did not finish or whose loss is not finite."""
    chosen: float | None
    """The value of the lowest loss; None before all trials have ended, or if none has a loss."""
    has_ended: bool
    """Whether every trial has ended, well or by a loss that is not finite."""

    @property
    def is_at_edge(self) -> bool:
        """Whether the chosen value is the smallest or largest tried, so that a better one may lie beyond it."""
        return len(self.losses) > 1 and self.chosen in (min(self.losses), max(self.losses))


def tuning_of(study: Study) -> Tuning:
    """Return the study's tuning, which it must have."""
    assert study.tuning is not None, "only a study with `tuning` has trials"
    return study.tuning


def trials(study: Study) -> list[tuple[str, float]]:
    """List arms and values to try; empty for a study without tuning."""
    return [(arm, value) for arm in study.arms for value in study.tuning.values] if study.tuning else []


def trial_name(arm: str, value: float) -> str:
    """Name one trial."""
    return f"tune-{arm}-{value:g}"


def trial_dir(out: Path, arm: str, value: float) -> Path:
    """Return the run folder of one trial."""
    return out / "runs" / trial_name(arm, value)


def tuned(study: Study, *, arm: str, out: Path) -> Tuned:
    """Read the trials of an arm."""
    tuning = tuning_of(study)
    folders = {value: trial_dir(out, arm, value) for value in tuning.values}
    losses = {value: _last_loss(folder, key=tuning.loss) for value, folder in folders.items()}
    finite = {value: loss for value, loss in losses.items() if math.isfinite(loss)}
    has_ended = all(map(_has_ended, folders.values()))
    chosen = min(finite, key=finite.__getitem__) if finite and has_ended else None
    return Tuned(losses, chosen, has_ended)


def tuned_flags(study: Study, *, arm: str, out: Path) -> list[str]:
    """Write an arm's chosen value as flags of its runs; none without tuning, or before it is known."""
    if study.tuning is None:
        return []
    chosen = tuned(study, arm=arm, out=out).chosen
    return [] if chosen is None else [f"--{study.tuning.key.replace('_', '-')}", f"{chosen:g}"]


def untuned_reason(study: Study, *, arm: str, out: Path) -> str:
    """Say why an arm's runs cannot be trained once its trials are done; empty if they can."""
    if study.tuning is None:
        return ""
    found = tuned(study, arm=arm, out=out)
    if found.chosen is not None:
        return ""
    if not found.has_ended:  # though its record may say that it is done
        return f"the folder of a trial of {arm} is gone or has no end"
    return f"no trial of {arm} ended with a finite held-out {study.tuning.loss}"


def check_tuning(study: Study) -> None:
    """Check a study's tuning.

    Raises:
        UserError: its seed is one of the runs', it has no values, no run measures its loss, or an arm sets what it
            tunes.
    """
    tuning = study.tuning
    if tuning is None:
        return
    where = f"{study.file}: tuning"
    taken = study.all_seeds()
    if tuning.seed in taken:
        raise UserError(f"{where}.seed is {tuning.seed}; expected none of the seeds of the runs ({taken}).")
    # By name, since a value that is written alike would be tried in the same folder.
    names = {f"{value:g}" for value in tuning.values if value > 0}
    if len(names) < 2 or len(names) < len(tuning.values):
        raise UserError(f"{where}.values is {tuning.values}; expected at least two different numbers > 0.")
    if tuning.loss not in LOSSES:
        raise UserError(f"{where}.loss is {tuning.loss}; expected one of {', '.join(LOSSES)}.")
    group, _, name = tuning.key.partition(".")
    for arm, settings in study.arms.items():
        own = settings.get(group)
        if isinstance(own, dict) and name in own:
            raise UserError(f"{study.file}: arm {arm} sets {tuning.key}, which tuning chooses; remove one.")


def _has_ended(folder: Path) -> bool:
    # A loss that is not finite says what the trial was for. One that was killed, or had no disk left, has said nothing.
    status = read_status(folder)
    return status is not None and (status.state == DONE or status.code == NumericalError.exit_code)


def _last_loss(folder: Path, *, key: str) -> float:
    status = read_status(folder)
    if status is None or status.state != DONE:
        return math.nan
    rows = [row for row in read_metrics(folder) if row.get("split") == "heldout"]
    value = max(rows, key=step_of).get(key) if rows else None
    return float(value) if isinstance(value, int | float) else math.nan
