"""Work through a study's jobs: one after another here, or with any number of workers over one shared folder.

A job's lock is held by the worker and by the job's own process, so a job whose worker was killed is not taken before
it ends. A job that is done has a record; one that failed does not stop the others, and is tried anew by the next call.
"""

import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from t2i.errors import Stopped, UserError
from t2i.files import write_json
from t2i.study.jobs import Job
from t2i.study.spec import TRAIN, Study

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 2.0
STOPPED = Stopped.exit_code


def work(jobs: list[Job], *, study: Study, out: Path) -> dict[str, dict[str, Any]]:
    """Do every job that is not done; return the records of all by name.

    Raises:
        UserError: a finished job was done with another command.
        Stopped: a signal asked for it; what runs has saved, and the same command goes on.
    """
    started = time.time()
    for folder in ("jobs", "locks", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        _same_command(job, out)
    while True:
        records = {job.name: record_of(job, out) for job in jobs}
        settled = {name for name, record in records.items() if _is_settled(record, started)}
        waiting = [job for job in jobs if job.name not in settled]
        if not waiting:
            return records
        if not any(_try(job, records, settled, study=study, out=out) for job in waiting):
            time.sleep(WAIT_SECONDS)


def record_of(job: Job, out: Path) -> dict[str, Any]:
    """Read what became of a job: state is open, done, failed or skipped."""
    path = out / "jobs" / f"{job.name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"state": "open"}


def _is_settled(record: dict[str, Any], started: float) -> bool:
    return record["state"] == "done" or record.get("time", 0) > started


def _try(job: Job, records: dict[str, dict[str, Any]], settled: set[str], *, study: Study, out: Path) -> bool:
    """Do a job if its needs are met and nobody else has it; tell whether anything came of it."""
    failed = [name for name in job.needs if name in settled and records[name]["state"] != "done"]
    if failed:
        _write_record(job, out, {"state": "skipped", "reason": f"needs {failed[0]}, which is not done"})
        return True
    if not set(job.needs) <= settled:
        return False
    with _claimed(out / "locks" / job.name) as lock:
        if lock is None:
            return False
        if record_of(job, out)["state"] != "done":
            _write_record(job, out, _run(job, lock, study=study, out=out))
        return True


def _run(job: Job, lock: IO[str], *, study: Study, out: Path) -> dict[str, Any]:
    """Run a job's process to its end; its output goes to logs/NAME.log."""
    prefix = study.launch if job.command[0] == TRAIN and study.launch else [sys.executable]
    began = time.time()
    logger.warning("%s", job.name)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (out / "logs" / f"{job.name}.log").open("a") as log:
        process = subprocess.Popen(
            [*prefix, *job.command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
        )
        with _signals_passed_on(process) as signals:
            code = process.wait()
    if signals or code == STOPPED:
        raise Stopped(f"Stopped at {job.name}; the same command goes on.")
    state = "done" if code == 0 else "failed"
    if code:
        logger.warning("%s ended with status %d; see %s", job.name, code, out / "logs" / f"{job.name}.log")
    return {"state": state, "code": code, "seconds": time.time() - began, "command": job.command}


@contextmanager
def _signals_passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Send SIGTERM and Ctrl-C on to the job, which saves and ends; collect them."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _claimed(path: Path) -> Iterator[IO[str] | None]:
    """Hold a job's lock; None if somebody else does."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield lock


def _write_record(job: Job, out: Path, record: dict[str, Any]) -> None:
    write_json(out / "jobs" / f"{job.name}.json", {**record, "time": time.time()})


def _same_command(job: Job, out: Path) -> None:
    record = record_of(job, out)
    if record["state"] == "done" and record["command"] != job.command:
        changed = sorted(set(record["command"]) ^ set(job.command))
        raise UserError(
            f"{out}: {job.name} was done with another command (differs in {' '.join(changed)}). Choose another --out."
        )


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
