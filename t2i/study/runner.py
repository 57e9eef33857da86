"""Run a study's jobs: one after another, or by any number of workers over one shared folder.

A job's lock is held by the worker and by the job's own process. If the worker is killed, nobody takes the job before
its process ends. A job that is done has a record. A failed job does not stop the others; the next call tries it again.
"""

import fcntl
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from t2i.config.renamed import with_new_flags
from t2i.env import with_own_code
from t2i.errors import CheckpointError, DataError, Stopped, UserError
from t2i.runs.engine_state import drop_engine_state
from t2i.runs.run_folder import read_status
from t2i.shipped import find_shipped
from t2i.study.jobs import Job, Record, changed_words, read_record, write_record
from t2i.study.spec import TRAIN, Study

logger = logging.getLogger(__name__)

WAIT_SECONDS = 2.0
STOPPED = Stopped.exit_code


def work(listed: Callable[[], list[Job]], *, study: Study, out: Path) -> dict[str, Record]:
    """Run every job that is not done; return all records by name.

    Args:
        listed: lists the jobs, always by the same names; a run's command is known once its arm's trials have ended.

    Raises:
        UserError: a job was done with another command, before or meanwhile by another worker, or one calls a script
            that does not exist.
        Stopped: on a signal; the running job has saved. Run the same command to resume.
    """
    for folder in ("jobs", "locks", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = listed()
    before = {job.name: read_record(out, job.name) for job in jobs}
    for job in jobs:
        _check_script(job, before[job.name])
        _check_command(job, before[job.name], out)
    for job in jobs:
        # Of a worker that was killed between a record and this; where nothing is left, nothing is done.
        _drop_state(job, before[job.name])
    with _stopped_by_signals():
        # Until every job is done or was tried since: other workers, on other machines, try some of them.
        while True:
            records = {job.name: read_record(out, job.name) for job in jobs}
            # After the records: trials that have ended by these have chosen what runs are listed with.
            jobs = listed()
            for job in jobs:
                _check_command(job, records[job.name], out)
            settled = {job.name for job in jobs if _is_settled(job, records, before[job.name])}
            waiting = [job for job in jobs if job.name not in settled]
            if not waiting:
                return records
            # Nothing could be started: others hold what is left, or it waits for what they hold. A worker then waits,
            # and does not leave: what another ends, or leaves unfinished, may free the next job.
            if not any(_try(job, records, settled, study=study, out=out) for job in waiting):
                time.sleep(WAIT_SECONDS)  # a poll: workers on many machines share a folder and nothing else


def exit_status(records: Iterable[Record]) -> int:
    """Return the exit status of a study: that of its first job that failed, 1 where a signal ended it, else 0."""
    codes = [record.code for record in records if record.state == "failed"]
    return next((code if code is not None and 0 < code < STOPPED else 1 for code in codes), 0)


def _is_settled(job: Job, records: dict[str, Record], before: Record) -> bool:
    """Whether a job is finished with: done, or tried by some worker since this one started, when it was `before`."""
    record = records[job.name]
    # Another worker skipped it for a need that a later call has made good.
    if record.state == "skipped" and all(records[name].state == "done" for name in job.needs):
        return False
    # A failure from before this call is tried anew; one of another worker beside it is not. By no clock: those of
    # machines differ, and one that was set back would have a failing job tried for ever.
    # One that was stopped is open still, though it has taken time.
    return record.state == "done" or (record.state != "open" and record != before)


def _try(job: Job, records: dict[str, Record], settled: set[str], *, study: Study, out: Path) -> bool:
    """Run a job if its needs are met and nobody else has it; return whether anything was done."""
    failed = [name for name in job.needs if name in settled and records[name].state != "done"]
    if failed:
        reason = f"needs {failed[0]}, which is not done"
        write_record(out, job.name, _not_run("skipped", reason))
        return True
    if not set(job.needs) <= settled:
        return False
    if job.refusal:
        write_record(out, job.name, _not_run("failed", job.refusal, code=DataError.exit_code))
        return True
    with _claimed(out / "locks" / job.name) as lock:
        if lock is None:
            return False
        # Between reading the records and taking the lock another worker may have done it, or failed to.
        if (before := read_record(out, job.name)) == records[job.name]:
            _run(job, lock, before=before, study=study, out=out)
        return True


def _drop_state(job: Job, record: Record) -> None:
    """Remove the state of the optimizer of a training run that is done; runs of 0.1.0, without an attempt, keep it."""
    if record.state == "done" and record.attempt and job.run_dir is not None:
        drop_engine_state(job.run_dir)


def _run(job: Job, lock: IO[str], *, before: Record, study: Study, out: Path) -> None:
    """Run a job's process to its end, with its output in logs/NAME.log, and write its record.

    Args:
        before: its record so far, of processes that were stopped or failed.

    Raises:
        Stopped: on a signal. A job that it ended stays open, and will resume.
    """
    script, *flags = job.command
    prefix = study.launch if script == TRAIN and study.launch else [sys.executable]
    began = time.monotonic()
    logger.warning("%s", job.name)
    with (out / "logs" / f"{job.name}.log").open("a") as log:
        process = subprocess.Popen(
            [*prefix, str(find_shipped(Path(script))), *flags],
            # A log takes a line of progress now and then, not ten per second.
            env={"TQDM_MININTERVAL": "10", **with_own_code(os.environ)},
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),  # the job holds its lock too, should this worker be killed
        )
        # A process per job: its memory ends with it, and one that is killed takes no worker with it.
        with _signals_passed_on(process) as signals:
            code = process.wait()
    seconds = (before.seconds or 0.0) + time.monotonic() - began
    # A run that could not say its end is no finished one to any reader, and would resume.
    is_done = code in job.done_codes and (code != 0 or job.run_dir is None or _says_done(job.run_dir))
    state = "done" if is_done else "failed"
    # A signal may come when all is done: such a job is not run again, and not all of them could be.
    if state == "done" or not (signals or code == STOPPED):
        if code:
            logger.warning(
                "%s ended with status %d; see %s", job.name, code, out / "logs" / f"{job.name}.log"
            )
        record = Record(
            state,
            code=code,
            seconds=seconds,
            command=tuple(job.command),
            attempt=_new_attempt(),
            time=time.time(),
        )
        write_record(out, job.name, record)
        # After the record: until then the job might be run again, and would resume. Measures read weights alone.
        _drop_state(job, record)
    else:
        write_record(out, job.name, Record(seconds=seconds))
    if signals or code == STOPPED:
        raise Stopped(f"Stopped at {job.name}; run the same command to resume.")


def _says_done(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is None or status.state == "done"


def _not_run(state: str, reason: str, *, code: int | None = None) -> Record:
    return Record(state, code=code, reason=reason, attempt=_new_attempt(), time=time.time())


def _new_attempt() -> str:
    return secrets.token_hex(8)


@contextmanager
def _signals_passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Forward SIGTERM and Ctrl-C to the job, which saves and ends; collect the signals."""
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        process.send_signal(signal.SIGTERM)  # also for Ctrl-C, as a run saves on SIGTERM before it ends

    with _handled(pass_on):
        yield signals


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise Stopped on SIGTERM and Ctrl-C while no job runs, also in a worker that a shell told to ignore Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("Stopped; run the same command to resume.")

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM and Ctrl-C so, and as before afterwards."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def _claimed(path: Path) -> Iterator[IO[str] | None]:
    """Hold a job's lock; yield None if another worker does."""
    with path.open("a") as lock:
        try:
            # flock and not a file that exists: the kernel lets go of it when its holders die.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be locked: {error.strerror}. Workers of a study share its folder by locks; choose an"
                " --out on a disk that has them."
            ) from error
        yield lock


def _check_script(job: Job, record: Record) -> None:
    # Now, and not when its turn comes: a measure's comes after all runs.
    if record.state != "done" and not find_shipped(Path(job.command[0])).is_file():
        raise UserError(f"{job.name} calls {job.command[0]}, which is neither here nor shipped with t2i.")


def _check_command(job: Job, record: Record, out: Path) -> None:
    # Names alone would let a changed study report the results of the one before it, or of a worker that still is at it.
    if (
        record.state == "done"
        and not job.refusal
        and (changed := changed_words(job.command, with_new_flags(record.command)))
    ):
        raise UserError(
            f"{out}: {job.name} was done with another command (differs in {changed}). Choose another --out, and end"
            " workers of another version of the study."
        )


def gpus_to_share(study: Study) -> list[str]:
    """List the GPUs that workers of this machine share out, as CUDA names them; none where runs have a launcher."""
    if study.launch:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch  # here: only several workers share GPUs out

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def local_workers(command: list[str], *, count: int, gpus: Sequence[str] = ()) -> Iterator[None]:
    """Run `count` more workers on this machine; wait for them, or stop them if this one is stopped.

    Args:
        gpus: what they share out in turn, this worker first: a run takes the first GPU that it sees, so workers that
            see all of them would train on one. Empty: each sees what this one sees.
    """
    seen = [{"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {} for worker in range(count + 1)]
    os.environ.update(seen[0])
    others = [subprocess.Popen(command, env=os.environ | own) for own in seen[1:]]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for other in others:
            if not is_done:
                other.terminate()
            if other.wait() and is_done:
                logger.warning("a worker beside this one ended with status %d", other.returncode)


def submit(command: list[str], *, count: int, options: list[str], out: Path) -> str:
    """Submit an array job of `count` workers to Slurm and return sbatch's output.

    Five minutes before its time limit each worker's run is asked to save. Submit again to resume.

    Raises:
        UserError: there is no sbatch on this machine, or it failed.
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
        f"--wrap=exec {shlex.join(command)}",  # exec: the signal reaches the worker, not a shell
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip()
