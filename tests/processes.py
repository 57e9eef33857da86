"""Processes that tests start, and their end: none outlives the tests, however these end.

The ranks of a launcher are its children, in other sessions than the tests: killing the launcher, or pytest, does not
reach them. So whatever is started carries a mark in its environment, which children inherit. A watcher in a session of
its own kills all that carry the mark once the process that started them is gone, be it by SIGKILL.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "T2I_STARTED_BY_TESTS"
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a job; a training in this process leaves them behind."""
TIMEOUT_SECONDS = 600
FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies."""

_marks: dict[int, str] = {}
_numbers = itertools.count()


def guard():
    """Mark all that this process starts from now on, and have it killed when this process is gone; return the mark."""
    own = os.getpid()
    if own not in _marks:
        _marks[own] = f"{own}:{time.time_ns()}"
        unmarked = {key: value for key, value in os.environ.items() if key != MARK}
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(own), _marks[own]],
            env=unmarked,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.environ[MARK] = _marks[own]  # also for what t2i itself starts
    return _marks[own]


def environment(**changes):
    """Return this process's environment without the variables of a job, with one thread for arithmetic."""
    kept = {key: value for key, value in os.environ.items() if key not in JOB}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def free_port():
    """Choose a port that nobody uses: the same tests may run beside these."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, *, env=None, **settings):
    """Start a process as subprocess.Popen does, marked and in a session of its own."""
    mark = f"{guard()}/{next(_numbers)}"
    given = dict(os.environ if env is None else env)
    process = subprocess.Popen(command, env=given | {MARK: mark}, start_new_session=True, **settings)
    process.mark = mark
    return process


def run(command, *, timeout=TIMEOUT_SECONDS, check=False, capture_output=False, **settings):
    """Run a command as subprocess.run does; nothing that it started is left, whatever ends the waiting."""
    if capture_output:
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(command, **settings)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end(process)
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def end(process):
    """Kill what is left of a started process and of all that it started."""
    kill_marked(process.mark)
    process.wait()


def fork(target, *args, **keywords):
    """Start a fork of this process, which has its environment and no mark: the kernel ends it with its parent."""
    # A daemon: else an interpreter that Ctrl-C ends would wait for it.
    process = FORK.Process(target=_live_with_parent, args=(os.getpid(), target, args, keywords), daemon=True)
    process.start()
    return process


def _live_with_parent(parent, target, args, keywords):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # which may have died before
        target(*args, **keywords)


def marked(mark):
    """Find the processes whose mark is this one, or begins with it."""
    found = []
    for process in psutil.process_iter():
        try:
            its_mark = process.environ().get(MARK, "")
            is_alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):  # gone, or somebody else's
            continue
        if is_alive and (its_mark == mark or its_mark.startswith(f"{mark}/")):
            found.append(process)
    return found


def kill_marked(mark, *, timeout=60):
    """Kill marked processes until there are none: one may start another while it is looked for."""
    ended, locks = time.monotonic() + timeout, set()
    while (found := [one for one in marked(mark) if one.pid != os.getpid()]) and time.monotonic() < ended:
        for process in found:
            with suppress(psutil.Error):
                locks |= locks_of(process)
                process.kill()
        time.sleep(0.02)
    for lock in locks:
        lock.unlink(missing_ok=True)


def locks_of(process):
    """Find the locks that a process holds on builds of torch's C++ operators.

    They are files that its death would leave, and every later build and load would wait for them without end.
    """
    files = [Path(file.path) for file in process.open_files()]
    return {file for file in files if file.name == "lock" and file.with_name("build.ninja").exists()}


def watch(parent, mark):
    """Wait for a process's end, then kill what it has left."""
    while os.getppid() == parent:
        time.sleep(0.2)
    kill_marked(mark)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
