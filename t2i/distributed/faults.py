"""A hook to break a run on purpose: T2I_FAULT="rank:step:action[:arg]". Without the variable it does nothing.

The tests in tests/faults/ set it, so that they break the real program under the real launcher. Actions that end or hold
a process happen at the place `arg`, by default `step`:

    kill, stop, term   SIGKILL, SIGSTOP or SIGTERM to this process
    raise              an error that nobody expects
    full               the disk is full
    nan, scale         the loss of the step times nan, or times `arg`

Places: `step` (between backward and update), `shards`, `weights`, `manifest`, `rename` and `latest` (in a save, before
each of these), `periodic` (before a measure or a grid of images), `setup` (step 0, before the model is built).
"""

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "T2I_FAULT"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


@dataclass(frozen=True)
class Fault:
    """The action, and the rank and step at which it happens."""

    rank: int
    step: int
    action: str
    arg: str


def fault() -> Fault | None:
    """Read this process's fault from the environment; None in every run but a test's."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    rank, step, action, *arg = text.split(":")
    wanted = Fault(int(rank), int(step), action, arg[0] if arg else "step")
    return wanted if int(os.environ.get("RANK", "0")) == wanted.rank else None


def reach(place: str, *, step: int, path: Path | None = None) -> None:
    """Mark that this process has reached `place`; the fault meant for it happens here."""
    wanted = fault()
    if wanted is None or (wanted.step, wanted.arg) != (step, place):
        return
    if wanted.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[wanted.action])
    elif wanted.action == "raise":
        raise RuntimeError(f"an error made by {VARIABLE} at {place} of step {step}")
    elif wanted.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path or ""))


def loss_factor(*, step: int) -> float:
    """Return the factor of a step's loss: 1, except at the fault's step."""
    wanted = fault()
    if wanted is None or wanted.step != step or wanted.action not in ("nan", "scale"):
        return 1.0
    return float("nan") if wanted.action == "nan" else float(wanted.arg)
