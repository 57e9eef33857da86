"""Files on disks that are full, keep no modes, or hold on to what is open."""

import errno
import fcntl
import os
import platform
import resource
import shutil
import socket
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from t2i import disk, files
from t2i.errors import CheckpointError, DataError, UserError, disk_reason, run_command
from t2i.runs.trust import check_owner


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o664, 0o775)]
)
def test_weights_may_be_read_by_whom_the_umask_says_and_written_by_nobody_else(
    mask, file, folder, umask, tmp_path
):
    umask(mask)
    with files.new_folder(tmp_path / "out") as part:
        (part / "sub").mkdir()
        save_file({"x": torch.zeros(3)}, part / "sub" / "model.safetensors")
        (part / "config.json").write_text("{}")
        (part / "run.sh").write_text("")
        (part / "run.sh").chmod(0o700)
        (part / "link").symlink_to("/nowhere")
    out = tmp_path / "out"
    assert {mode(out / name) for name in ("sub/model.safetensors", "config.json")} == {file}
    assert {mode(out), mode(out / "sub")} == {folder}
    assert mode(out / "run.sh") == 0o700 | file
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "link", "run.sh", "sub"]


def refuse(path, number, times):
    """Have Path.replace refuse a target some times."""
    left, real = [number] * times, Path.replace

    def replace(self, target):
        if Path(target) == path and left:
            code = left.pop()
            raise OSError(code, os.strerror(code), str(self), None, str(target))
        return real(self, target)

    return replace


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY])
def test_a_file_that_is_open_elsewhere_is_tried_again_and_then_named(number, tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    files.write_whole(path, "old")
    monkeypatch.setattr(disk, "PAUSES", (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse(path, number, times=2))
        files.write_whole(path, "new")
    assert path.read_text() == "new"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse(path, number, times=9))
        with pytest.raises(
            CheckpointError, match=r"status\.json cannot be replaced: .* open in another program"
        ):
            files.write_whole(path, "newer")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_a_disk_without_modes_is_no_reason_not_to_resume(tmp_path, monkeypatch, caplog):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "state.pt").write_text("")
    (tmp_path / "step" / "state.pt").chmod(0o666)
    with pytest.raises(CheckpointError, match="is writable by anyone"):
        check_owner(tmp_path / "step")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result((0o100777, *real(file)[1:])))
    check_owner(tmp_path / "step")
    assert f"{tmp_path} keeps no permissions" in caplog.text


def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.whole_file(path) as written:
        written.write_text("ne")
        raise RuntimeError
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


FULL = os.strerror(errno.ENOSPC)
REASONS = [
    (OSError(errno.ENOSPC, FULL, "packaged.json", None, "out/copy.json"), f"out/copy.json: {FULL}."),
    (OSError(errno.EACCES, "Permission denied", "a", None, "b"), "a: Permission denied."),
    (OSError(errno.ENOSPC, FULL), f"The disk: {FULL}."),
    (shutil.Error([("a/x", "b/x", FULL), ("a/y", "b/y", "more")]), f"b/x: {FULL}."),
    (SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"), "(a full disk?)."),
    (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "(a full disk?)."),
    (RuntimeError("shapes differ"), ""),
    (SafetensorError("header too large"), ""),
]


@pytest.mark.parametrize(("error", "reason"), REASONS)
def test_a_full_disk_is_one_sentence_whichever_library_meets_it(error, reason, capsys):
    assert disk_reason(error).endswith(reason)
    assert bool(disk_reason(error)) == bool(reason)

    def command():
        raise error

    with pytest.raises(SystemExit if reason else type(error)) as ended:
        run_command(command)
    if reason:
        assert ended.value.code == 5
        assert capsys.readouterr().err.strip() == disk_reason(error)


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path):
    path = tmp_path / "index.json"
    with path.open("wb") as file:
        file.truncate(2**31)  # a hole: no byte is on the disk
    with pytest.raises(
        DataError, match=r"index\.json has 2,147,483,648 bytes; expected at most 1,073,741,824"
    ):
        files.read_json(path)
    with pytest.raises(UserError, match="expected at most 16,777,216"):
        files.read_yaml(path, name="--config x.yaml")


def test_a_stream_is_readable_once_its_other_side_is_closed_whatever_its_number():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(2_000, before[0]), before[1]), before[1]))
    one, other = socket.socketpair()
    # 1,024 and more: what select does not take.
    with one, socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 1_500)) as far:
        assert not files.is_readable(far)
        other.close()
        assert files.is_readable(far, seconds=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_two_that_make_one_folder_do_not_touch_each_others_work(tmp_path, monkeypatch):
    out = tmp_path / "exported"
    with pytest.raises(UserError, match="already exists; choose another"), files.new_folder(out) as first:
        (first / "of").write_text("the first")
        monkeypatch.setattr(os, "getpid", lambda: 1)  # as another process
        with files.new_folder(out) as second:
            (second / "of").write_text("the second")
            assert first != second and (first / "of").read_text() == "the first"
        monkeypatch.undo()
    assert (out / "of").read_text() == "the second"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_what_a_killed_process_left_of_a_folder_is_removed_and_a_living_ones_work_is_not(tmp_path):
    node = platform.node()
    left, living, other = (
        tmp_path / name
        for name in (
            f".out.{node}.4194304.part",
            f".out.{node}.{os.getppid()}.part",
            f".outer.{node}.4194304.part",
        )
    )  # above the largest number of a process
    for folder in (left, living, other):
        folder.mkdir()
    with files.new_folder(tmp_path / "out"):
        pass
    assert not left.exists() and living.exists() and other.exists()
