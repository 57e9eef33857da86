"""A killed build's lock is removed before the next one waits for it; a lock that may be alive is left."""

import logging
import os
import subprocess
import sys
import time

import processes
import pytest
from torch.utils import cpp_extension

from t2i.distributed import build_locks


@pytest.fixture
def lock(tmp_path, monkeypatch, caplog):
    """An old lock as torch before 2.14 leaves it, in the folder of an operator that is not built."""
    caplog.set_level(
        logging.INFO, logger="t2i"
    )  # an earlier test may have run a command, which quiets the root
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "FileBaton", object, raising=False)
    file = tmp_path / "fused_adam" / "lock"
    file.parent.mkdir()
    file.touch()
    (file.parent / "build.ninja").touch()
    age(file.parent, seconds=build_locks.STALE_SECONDS + 60)
    return file


def age(folder, *, seconds):
    then = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_an_old_lock_that_nobody_holds_is_removed_and_named(lock, caplog):
    build_locks.remove_stale(["deepspeed_shm_comm", "fused_adam"])
    assert not lock.exists()
    assert (lock.parent / "build.ninja").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"removed {lock}, which a killed build of DeepSpeed's operators had left"
    ]


def test_a_lock_that_a_living_process_holds_stays_however_old_and_goes_after_its_kill(lock, caplog):
    holder = processes.start(
        [sys.executable, "-c", "import sys; file = open(sys.argv[1]); print(flush=True); input()", str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        build_locks.remove_stale(["fused_adam"])
        assert lock.exists()
        assert not caplog.records
    finally:
        holder.kill()
        holder.communicate()
    build_locks.remove_stale(["fused_adam"])
    assert not lock.exists()


def test_a_lock_beside_fresh_files_may_be_of_another_machine_so_it_is_only_named(lock, caplog):
    (lock.parent / "fused_adam.o").touch()
    build_locks.remove_stale(["fused_adam"])
    assert lock.exists()
    assert f"waiting for {lock}, which no process of this machine holds" in caplog.text


def test_other_operators_are_left_alone(lock):
    build_locks.remove_stale(["deepspeed_shm_comm"])
    assert lock.exists()


def test_a_torch_whose_locks_end_with_their_process_needs_nothing(lock, monkeypatch, caplog):
    monkeypatch.delattr(cpp_extension, "FileBaton")
    build_locks.remove_stale(["fused_adam"])
    assert lock.exists()
    assert not caplog.records
