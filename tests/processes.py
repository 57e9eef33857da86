"""Processes that tests start, and their end: none outlives the tests, however these end.

The ranks of a launcher are its children, in other sessions than the tests: killing the launcher, or pytest, does not
reach them. So whatever is started carries a mark in its environment, which children inherit. A watcher in a session of
its own kills all that carry the mark once the process that started them is gone, be it by SIGKILL.

Importing torch and DeepSpeed takes longer than a tiny run. So there is a server as well, which has imported them and
nothing else, and forks what tests start warm; the fork ends as any interpreter does. Hashes of text are the server's,
so they are the same on all ranks: what must not depend on that is for ranks that a launcher starts.
"""

import ctypes
import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
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

ROOT = Path(__file__).parents[1]
WARM = (
    "t2i.train.main",
    "t2i.measure.score",
    *(f"t2i.commands.{verb}" for verb in ("train", "sample", "score")),
)
"""What the server imports, and all that these import."""
REQUEST_BYTES = 2**17
"""Of one request to the server, whose environment and words are far fewer."""

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
    kill_marked(process.mark, session=process.pid)
    process.wait()


class Forked:
    """A process that the server has forked, with what tests ask of subprocess.Popen."""

    def __init__(self, words, *, connection, mark):
        self.args, self.connection, self.mark = words, connection, mark
        self.returncode = None
        self.pid = int(connection.recv(32))

    def wait(self, timeout=None):
        """Wait for the end and return the exit status.

        Raises:
            TimeoutExpired: it has not ended by then.
        """
        if self.returncode is None:
            ready = select.poll()  # not select, which knows no file beyond the 1,024th
            ready.register(self.connection, select.POLLIN)
            if not ready.poll(None if timeout is None else 1_000 * timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.connection.recv(32))
        return self.returncode

    def poll(self):
        """Return the exit status; None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None


def start_warm(words, *, stdout, stderr, env=None, cwd=ROOT):
    """Run a script or `-c` code as Python does, in a fork of a process that has imported t2i's training.

    It has a session of its own. PYTHONPATH is not read.
    """
    mark = f"{guard()}/{next(_numbers)}"
    words = list(map(str, words))
    request = {"words": words, "cwd": str(cwd), "env": (env or environment()) | {MARK: mark}}
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
        socket.send_fds(_server(), [json.dumps(request).encode()], files)
    return Forked(words, connection=ours, mark=mark)


def run_warm(words, *, timeout=TIMEOUT_SECONDS, **settings):
    """Run as `start_warm` does until the end; return status and texts as subprocess.run does."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start_warm(words, stdout=out, stderr=err, **settings)
        try:
            process.wait(timeout)
        finally:
            end(process)
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(words, process.returncode, *texts)


@functools.cache
def _server():
    """Start the server, once; it ends when this process does. Return the socket for requests."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, "serve", str(theirs.fileno())]
        start(command, env=environment(TQDM_MININTERVAL="10"), pass_fds=[theirs.fileno()], cwd=ROOT)
    return ours


def serve(control):
    """Fork a process for each request, and return in this fork alone, with its words."""
    from t2i.distributed.launch import prepare_environment

    prepare_environment()  # before DeepSpeed, as commands do
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each fork would copy what its collector looks through
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        request, files, *_ = socket.recv_fds(control, REQUEST_BYTES, 3)
        if not request:  # the tests are over
            raise SystemExit
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *outputs, answer = files
    if own := os.fork():
        _, status = os.waitpid(own, 0)
        os.write(answer, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.setsid()
    os.write(answer, str(os.getpid()).encode())
    for number, file in enumerate(outputs, start=1):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    request = json.loads(request)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    return request["words"]


def run_words(words):
    """Do what Python does with the words behind its name."""
    code, *rest = words
    if code == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(code).resolve().parent), words
        runpy.run_path(code, run_name="__main__")


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


def marked(mark, *, session=None):
    """Find the processes whose mark is this one, or begins with it, and those of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            its_mark = process.environ().get(MARK, "")
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            # A fork of the server shows the server's mark.
            is_of_session = os.getsid(process.pid) == session
        except (psutil.Error, OSError):  # gone, or somebody else's
            continue
        if is_alive and (is_of_session or its_mark == mark or its_mark.startswith(f"{mark}/")):
            found.append(process)
    return found


def kill_marked(mark, *, session=None, timeout=60):
    """Kill what `marked` finds until there is nothing: one may start another while it is looked for."""
    ended, locks = time.monotonic() + timeout, set()

    def others():
        return [one for one in marked(mark, session=session) if one.pid != os.getpid()]

    while (found := others()) and time.monotonic() < ended:
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
    if sys.argv[1] == "serve":
        run_words(serve(socket.socket(fileno=int(sys.argv[2]))))
    else:
        watch(int(sys.argv[1]), sys.argv[2])
