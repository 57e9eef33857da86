"""The errors that end a command, each with its exit status."""

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from t2i.verbs import as_typed

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What a disk says that takes no more."""
WRITER_WORDS = ("PytorchStreamWriter", "iostream", "unexpected pos", "I/O error")
"""Words of torch's and safetensors' errors when the disk fails; they wrap the system's error, without its number."""


class UserError(ValueError):
    """Wrong use or configuration; a model, a checkpoint or a file of settings is not there."""

    exit_code = 2


class DataError(UserError):
    """Images, captions or shards are not there, or cannot be used as they are."""

    exit_code = 3


class NumericalError(ArithmeticError):
    """A loss, gradient or weight is not finite, spikes do not end, ranks differ, or `verify-resume` says Not equal."""

    exit_code = 4


class CheckpointError(OSError):
    """A disk cannot be written, or a checkpoint cannot be trusted."""

    exit_code = 5


class LostRankError(RuntimeError):
    """A process of the job died or hangs."""

    exit_code = 6


class Stopped(Exception):
    """The run was stopped on request, with everything saved."""

    exit_code = 75


READER_GONE = 141
"""Exit status where nobody reads what is printed any more: as of a program that SIGPIPE ends (128 + 13)."""

EXPECTED = (UserError, NumericalError, CheckpointError, LostRankError, Stopped)


def exit_code(error: BaseException) -> int:
    """Return the exit status of a process that an error ends; any OSError counts as a problem of the disk."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", CheckpointError.exit_code if isinstance(error, OSError) else 1)


def first_line(error: Exception) -> str:
    """Return the first line of what a library's error says, at most 300 characters; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def disk_reason(error: Exception) -> str:
    """Say in one sentence what the disk refused; empty for an error that has nothing to do with a disk."""
    if isinstance(error, OSError):
        if error.errno is None and not isinstance(error, shutil.Error):
            return str(error)  # a library's own, which says what it is about
        place, reason = error.filename, error.strerror or str(error)
        # shutil.copytree collects the errors of all files in one; the first one's is enough.
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
            _, place, reason = error.args[0][0]
        # A copy names its source first, but it is the target's disk that has no room.
        elif error.errno in NO_ROOM and error.filename2:
            place = error.filename2
        return f"{place or 'The disk'}: {reason}."
    # By name: this file is read first, also by a Python that has no package but its own.
    is_writers = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    is_writers = is_writers and any(word in str(error) for word in WRITER_WORDS)
    return f"{first_line(error)} (a full disk?)." if is_writers else ""


def memory_reason(error: Exception) -> str:
    """Say what to do about a GPU without memory left; empty for another error."""
    # By name: torch may not be there.
    if type(error).__name__ != "OutOfMemoryError":
        return ""
    return (
        f"{first_line(error)} To train, a smaller train_micro_batch_size_per_gpu in --ds_config needs less and gives"
        " the same result, and --model.gradient-checkpointing needs less again; `t2i plan` estimates both. To draw or"
        " measure, take a smaller batch."
    )


RESUMING = (
    "Run the same command again: training, preparing images, aligning, drawing and studies resume; what was measured or"
    " converted begins anew."
)
"""Said after Ctrl-C."""


def run_command(command: Callable[[], None]) -> None:
    """Run a launcher's main function, and turn expected errors into a sentence and an exit status.

    Tracebacks of expected errors are shown only when T2I_DEBUG=1.
    """
    try:
        _run_to_end(command)
    except _ReaderGone:
        sys.exit(READER_GONE)
    except EXPECTED as error:
        _end(error, sentence=str(error))
    except ModuleNotFoundError as error:
        # The system's Python, usually. Packages that only some commands need are asked for by themselves.
        advice = "run `make install` and use .venv/bin/python, or `pip install` t2i"
        _end(error, sentence=f"{error}, which t2i needs: {advice}.")
    except Exception as error:
        if sentence := memory_reason(error):
            _end(error, sentence=sentence)
        if not (sentence := disk_reason(error)):
            raise
        _end(CheckpointError(sentence), sentence=sentence)
    except KeyboardInterrupt:
        print(f"Interrupted. {RESUMING}", file=sys.stderr)
        sys.exit(130)


class _ReaderGone(Exception):
    """Whoever read what this process prints reads no more, such as `head`."""


def _run_to_end(command: Callable[[], None]) -> None:
    """Run a command and hand over all that it printed."""
    try:
        try:
            command()
        finally:  # --help ends by an exception too
            _hand_over()
    except BrokenPipeError:
        if not _is_reader_gone():  # it was another pipe
            raise
        _print_no_more()
        raise _ReaderGone from None


def _hand_over() -> None:
    """Flush what was printed; an error of the disk or of the reader remains the only one."""
    if sys.stdout is None:  # it was closed before this process began, as a supervisor may do
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _print_no_more()
        raise


def _print_no_more() -> None:
    # The interpreter flushes again when it ends, and would complain, with a status of its own.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_reader_gone() -> bool:
    if sys.stdout is None:
        return False
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _end(error: Exception, *, sentence: str) -> NoReturn:
    if os.environ.get("T2I_DEBUG") == "1":
        traceback.print_exception(error)
    # Advice calls scripts; whoever typed a verb reads verbs.
    print(as_typed(sentence), file=sys.stderr)
    sys.exit(exit_code(error))
