"""Several workers on one study: processes here, or the tasks of a Slurm array. The study's folder is all they share."""

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i.errors import UserError


@contextmanager
def local_workers(command: list[str], *, count: int) -> Iterator[None]:
    """Run `count` more workers on this machine; wait for them, or stop them where this one was stopped."""
    others = [subprocess.Popen(command) for _ in range(count)]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for other in others:
            if not is_done:
                other.terminate()
            other.wait()


def submit(command: list[str], *, count: int, options: list[str], out: Path) -> str:
    """Submit an array job of `count` workers to Slurm and return what sbatch said.

    Five minutes before its time limit each worker's run is asked to save; submitting again goes on.

    Raises:
        UserError: there is no sbatch here, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--launcher is slurm, but there is no sbatch on this machine.")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    words = [
        "sbatch",
        f"--array=0-{count - 1}",
        "--job-name=t2i-study",
        "--signal=B:TERM@300",
        f"--output={out / 'logs' / 'worker-%a.log'}",
        *options,
        f"--wrap=exec {shlex.join(command)}",  # exec: the signal goes to the worker, not to a shell
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip()
