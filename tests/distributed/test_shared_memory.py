"""Of what lies in shared memory, only files that t2i made are removed; each data set's have a number of their own."""

import os

import pytest

from t2i.distributed import shared_memory
from t2i.distributed.rendezvous import LOOPBACK


@pytest.fixture
def old_files(tmp_path, monkeypatch):
    """Make old files that no process uses, in a folder that stands for both /dev/shm and the temporary files."""
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shared_memory.tempfile, "tempdir", str(tmp_path))

    def make(*names):
        paths = {tmp_path / name for name in names}
        for path in paths:
            path.touch()
            os.utime(path, (1, 1))
        return paths

    return make


def test_only_files_that_this_program_made_are_swept(old_files):
    number, uid = shared_memory.new_number(), os.getuid()
    own = old_files(
        f"{number}_locals",
        f"{number}_barrier_filelock",
        f"{shared_memory.new_number()}_epoch_data",
        f"deepspeed_allreduce_buffer_{uid}_{LOOPBACK}_29500_0",
    )
    others = old_files(
        "000123_notes",
        "000000_locals",
        "000000_barrier_filelock",
        "845073_locals",
        f"{number}",
        f"9{number}_locals",
        f"deepspeed_allreduce_buffer_{uid}_127.0.0.1_29500_0",
        f"deepspeed_allreduce_buffer_{uid}_10.0.0.1_29500_0",
    )
    assert set(shared_memory.sweep()) == own
    assert all(path.exists() for path in others)


def test_files_of_a_run_stay_while_one_of_them_is_open(old_files):
    number = shared_memory.new_number()
    old_files(f"{number}_locals", f"{number}_resume")
    with (shared_memory.SHARED_MEMORY / f"{number}_resume").open():
        assert shared_memory.sweep() == []
    assert len(shared_memory.sweep()) == 2
