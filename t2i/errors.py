"""The few errors that end a command, each with its exit status."""

import os
import sys
import traceback
from collections.abc import Callable


class UserError(ValueError):
    """Wrong use or configuration."""

    exit_code = 2


class DataError(UserError):
    """Pictures, captions or shards that cannot be used as they are."""

    exit_code = 3


class NumericalError(ArithmeticError):
    """A loss or gradient that stopped being finite."""

    exit_code = 4


class CheckpointError(OSError):
    """A disk or a checkpoint that cannot be written or trusted."""

    exit_code = 5


class LostRankError(RuntimeError):
    """A process of the job that died or hangs."""

    exit_code = 6


class Stopped(Exception):
    """Stopped by a signal, with everything saved."""

    exit_code = 75


EXPECTED = (UserError, NumericalError, CheckpointError, LostRankError, Stopped)


def exit_code(error: BaseException) -> int:
    """Tell the exit status that an error ends a process with."""
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def run_command(command: Callable[[], None]) -> None:
    """Run a launcher's main function; turn expected errors into a sentence and an exit status.

    Tracebacks of expected errors are shown only when T2I_DEBUG=1.
    """
    try:
        command()
    except EXPECTED as error:
        if os.environ.get("T2I_DEBUG") == "1":
            traceback.print_exc()
        print(str(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
