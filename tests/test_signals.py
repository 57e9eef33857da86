"""Requests to a run, without a run."""

import errno
import os
import signal
from contextlib import suppress

import pytest

from t2i.distributed.run_id import OwnFolder
from t2i.distributed.signals import SAVE, STOP, Requests, StopFlag, stop_flag
from t2i.errors import Stopped


def test_one_rank_looks_for_files_and_grants_them(tmp_path):
    first, other = (
        Requests(StopFlag(), OwnFolder.at(tmp_path), reads_files=is_first) for is_first in (True, False)
    )
    assert not first.should_stop() and not first.should_save()
    (tmp_path / STOP).touch()
    assert (first.should_stop(), other.should_stop(), first.should_save()) == (True, False, False)
    (tmp_path / SAVE).touch()
    assert (first.should_save(), other.should_save()) == (True, False)
    other.grant(SAVE)
    assert first.should_save()
    first.grant(SAVE)
    assert first.should_stop() and not first.should_save()


def test_a_file_breaks_off_no_measure_and_a_signal_does(tmp_path):
    requests = Requests(StopFlag(), OwnFolder.at(tmp_path), reads_files=True)
    (tmp_path / STOP).touch()
    assert requests.should_stop() and not requests.is_signalled()
    requests.begin()
    requests.flag.note(signal.SIGTERM)
    assert requests.is_signalled()


def test_a_stop_that_an_import_caught_is_not_forgotten():
    # Suppressed as by libraries that import what is optional.
    with pytest.raises(Stopped, match="before the first step"), stop_flag(), suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_first_step_began_ends_nothing_by_itself(tmp_path):
    with stop_flag() as flag:
        requests = Requests(flag, OwnFolder.at(tmp_path), reads_files=False)
        requests.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.should_stop()


@pytest.mark.parametrize("launcher", [b"bash", b"python -m deepspeed.launcher.launch"])
def test_ctrl_c_is_answered_at_once_and_a_launchers_traceback_is_explained(launcher, monkeypatch, capfd):
    monkeypatch.setattr("t2i.distributed.signals.command_of", lambda pid: launcher)
    monkeypatch.setenv("RANK", "0")
    flag = StopFlag(raises=False)
    flag.note(signal.SIGINT)
    said = capfd.readouterr().err
    assert "the run ends after this step, and saves. Ctrl-C again ends it at once." in said
    assert ("KeyboardInterrupt here is the `deepspeed` command's own" in said) == (b"deepspeed" in launcher)


def test_a_shared_disk_that_does_not_answer_for_a_moment_says_nothing(tmp_path, monkeypatch):
    requests = Requests(StopFlag(), OwnFolder.at(tmp_path), reads_files=True)

    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        for name in ("read_text", "stat"):
            patch.setattr(type(tmp_path), name, stale)
        patch.setattr(os, "stat", stale)
        assert not requests.should_stop() and not requests.should_save()
        with pytest.raises(OSError, match="Stale"):  # a save asks again, and may fail
            requests.folder.check()
    (tmp_path / "run_id").write_text("another")
    assert requests.should_stop()
