"""What tests start ends with them: by SIGKILL, by Ctrl-C, in sessions of its own."""

import signal
import sys
import time
from pathlib import Path

import processes
import pytest
from processes import environment, kill_marked, marked

HERE = Path(__file__).parent

RANK = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
LAUNCHER = f"""
import subprocess, sys, time
for _ in range(2):  # as a launcher's ranks: one in its session, and a loader's process in another
    subprocess.Popen([sys.executable, "-c", {RANK!r}])
    subprocess.Popen([sys.executable, "-c", {RANK!r}], start_new_session=True)
time.sleep(600)
"""
TESTS = """
import os, signal, sys, time
import processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin by ignoring it
sys.path.append(os.getcwd())
def sleep():
    time.sleep(600)
job = processes.start({command})
forked = processes.fork(sleep)
print(processes.guard(), forked.pid, flush=True)
{then}
"""
TOY_RANK = "import pathlib, sys, time; pathlib.Path(sys.argv[2] + sys.argv[1]).touch(); time.sleep(600)"
"""The launcher's --local_rank comes first."""


def wait_until(is_true, *, seconds):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and ") Z " not in stat.read_text()


@pytest.fixture
def started(tmp_path):
    """Start a stand-in for pytest with a job of its own; yields how to."""
    tests = []

    def begin(command, *, then="time.sleep(600)"):
        (tmp_path / "tests.py").write_text(TESTS.format(command=command, then=then))
        with (tmp_path / "said").open("w") as file:
            env = environment(PYTHONPATH=str(HERE))
            tests.append(processes.start([sys.executable, tmp_path / "tests.py"], env=env, stdout=file))
        wait_until(lambda: (tmp_path / "said").read_text().count("\n"), seconds=60)
        mark, forked = (tmp_path / "said").read_text().split()
        return tests[0], mark, int(forked)

    yield begin
    for one in tests:
        processes.end(one)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_tests_started_dies_with_them(number, started):
    tests, mark, forked = started([sys.executable, "-c", LAUNCHER])
    wait_until(lambda: len(marked(mark)) == 5, seconds=30)
    assert is_alive(forked)
    tests.send_signal(number)
    tests.wait(10)
    try:
        wait_until(lambda: not marked(mark) and not is_alive(forked), seconds=10)
    finally:
        kill_marked(mark)


def test_the_ranks_of_deepspeeds_launcher_die_too(started, tmp_path):
    (tmp_path / "rank.py").write_text(TOY_RANK)
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    tests, mark, _ = started([*launcher, str(tmp_path / "rank.py"), str(tmp_path / "is_up")])
    wait_until(lambda: len(list(tmp_path.glob("is_up*"))) == 2, seconds=300)
    assert len(marked(mark)) == 4  # the command, its launcher and two ranks
    tests.kill()
    try:
        wait_until(lambda: not marked(mark), seconds=10)
    finally:
        kill_marked(mark)


def test_what_is_left_of_a_command_ends_when_its_time_is_over():
    others = set(marked(processes.guard()))  # such as multiprocessing's own, of earlier tests
    with pytest.raises(processes.subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", LAUNCHER], timeout=1)
    assert set(marked(processes.guard())) <= others
    done = processes.run([sys.executable, "-c", "print(3)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


WARM = """
import atexit, os, sys, threading, time
assert {"torch", "deepspeed", "streaming", "t2i.train.main"} <= set(sys.modules)
assert threading.enumerate() == [threading.main_thread()] and os.getsid(0) == os.getpid()
atexit.register(print, "at the end")
print(sys.argv, os.environ["OWN"], os.getcwd(), flush=True)
if "stay" in sys.argv:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if os.fork() == 0:
        time.sleep(600)
    print("up", flush=True)
    time.sleep(600)
sys.exit(7)
"""


def test_a_warm_process_begins_and_ends_as_any_other(tmp_path):
    words = ["-c", WARM, "a word"]
    done = processes.run_warm(words, env=environment(OWN="own"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"['-c', 'a word'] own {tmp_path}\nat the end\n"
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv, __name__, sys.path[0])\nraise ValueError('why')")
    done = processes.run_warm([script])
    assert (done.returncode, done.stdout) == (1, f"['{script}'] __main__ {tmp_path}\n")
    assert done.stderr.endswith("ValueError: why\n")
    done = processes.run_warm(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert done.returncode == -signal.SIGKILL


def test_what_a_warm_process_started_ends_with_it(tmp_path):
    with (tmp_path / "said").open("w") as file:
        words = ["-c", WARM, "stay"]
        process = processes.start_warm(words, env=environment(OWN="own"), stdout=file, stderr=file)
    wait_until(lambda: "up" in (tmp_path / "said").read_text(), seconds=30)
    assert process.poll() is None
    with pytest.raises(processes.subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    assert len(marked(process.mark, session=process.pid)) == 3
    processes.end(process)
    assert marked(process.mark, session=process.pid) == []
    assert process.poll() == -signal.SIGKILL


def test_a_build_that_is_killed_leaves_no_lock(tmp_path):
    folders = {name: tmp_path / name for name in ("ours", "theirs", "no-build")}
    for name, folder in folders.items():
        folder.mkdir()
        if name != "no-build":
            (folder / "build.ninja").touch()
    (folders["theirs"] / "lock").touch()
    build = (
        "import sys, time\n"
        "from torch.utils.file_baton import FileBaton\n"
        "held = [FileBaton(f'{folder}/lock').try_acquire() or folder for folder in sys.argv[1:]]\n"
        "batons = [FileBaton(f'{folder}/other') for folder in sys.argv[1:]]\n"
        "[baton.try_acquire() for baton in batons]\n"
        "time.sleep(600)\n"
    )
    process = processes.start([sys.executable, "-c", build, folders["ours"], folders["no-build"]])
    wait_until((folders["no-build"] / "other").exists, seconds=60)
    processes.end(process)
    assert {name: (folder / "lock").exists() for name, folder in folders.items()} == {
        "ours": False, "theirs": True, "no-build": True,
    }  # fmt: skip
