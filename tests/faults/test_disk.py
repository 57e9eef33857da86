"""Disks that are full, read-only or wrong, and checkpoints that are damaged."""

import os
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from conftest import config_of
from launched import LEARN, ROOT, Job, copy_run, ds_config, first_difference, record, state_of_last, steps

from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.metrics_log import append_metrics, read_metrics
from t2i.train.main import train
from t2i.train.metrics import MetricsWriter


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of some size at tmp_path/disk; call it with options to mount it anew."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(options):
        if mounted:
            options = f"remount,{options}"
        done = processes.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"mounting needs root: {done.stderr.strip()}")
        mounted.append(options)
        return place

    yield mount
    if mounted:
        processes.run(["umount", "-l", str(place)], check=True)


def settings_of(shards, run_dir, **train_settings):
    config = config_of(shards, run_dir, eval_every=0, deterministic=True, **train_settings)
    return replace(config, model=replace(config.model, num_layers=1))


@pytest.mark.fault(
    19,
    "disk full in one save",
    injected="ENOSPC when DeepSpeed's state of step 2 is written",
    expected="one warning, nothing half left, training continues, the next save is made",
)
def test_a_save_that_fails_once_ends_no_run(shards, tmp_path, monkeypatch, caplog, observed):
    monkeypatch.setenv("T2I_FAULT", "0:2:full:shards")
    config = settings_of(shards, tmp_path / "run", save_every=2, keep_last=9)
    train(config, ds_config_path=ds_config(tmp_path))
    kept = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]
    said = [record.message for record in caplog.records if "could not be written" in record.message]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "Training continues until the next save" in said[0]
    observed(said[0].partition(". Training")[0])


@pytest.mark.fault(
    19,
    "disk full in two saves",
    injected="room for no second checkpoint",
    expected="exit 5 with bytes needed and free; the first checkpoint stays",
)
def test_a_second_save_that_fails_ends_the_run(shards, tmp_path, monkeypatch, observed):
    config = settings_of(shards, tmp_path / "run", save_every=1)
    usage = shutil.disk_usage(tmp_path)

    def nearly_full(path):
        return usage if checkpoints.last_step(config.run_dir) == 0 else usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(
        CheckpointError, match=r"step 3 could not be written: disk full: .* MB, 0\.0 MB are free at"
    ):
        train(config, ds_config_path=ds_config(tmp_path))
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step_000001"]
    checkpoints.verify(config.run_dir / "checkpoints" / "step_000001")
    status = (config.run_dir / "status.json").read_text()
    assert '"code": 5' in status
    observed("exit 5, step 1 kept and whole")


def room_for(run_dir, *, weights, state):
    """Count the bytes of a run's folder beside its checkpoints, and of parts of a checkpoint."""
    held = {path: path.stat().st_size for path in run_dir.rglob("*") if path.is_file()}
    kept = sum(size for path, size in held.items() if "checkpoints" not in path.parts)
    files = checkpoints.read_checkpoint_manifest(checkpoints.step_folder(run_dir, 8)).files
    of_state = sum(file.bytes for name, file in files.items() if name.startswith("engine/"))
    of_weights = sum(file.bytes for file in files.values()) - of_state
    return kept + int(weights * of_weights + state * of_state)


@pytest.mark.slow
@pytest.mark.fault(
    19,
    "a disk that fills up, 2 ranks",
    injected="a file system with room for one checkpoint and a half; then made larger",
    expected="exit 5 at the second failure, the first checkpoint valid; with room, equal to the undisturbed run",
)
def test_a_disk_that_fills_up(shards, whole, tmp_path, small_disk, observed):
    disk = small_disk(f"size={room_for(whole, weights=1.5, state=1.5)}")
    job = Job(shards, disk / "run", beside=tmp_path, **LEARN).run()
    assert job.status()["code"] == 5, job.said()[-3000:]
    reason = job.status()["reason"]
    assert "disk full: a checkpoint needs" in reason
    assert checkpoints.choose_newest(job.run_dir).name == "step_000002"
    small_disk("size=100m")
    again = Job(shards, job.run_dir, beside=tmp_path, **LEARN).run()
    assert again.code == 0, again.said()[-3000:]
    assert record(job.run_dir) == record(whole)
    assert not first_difference(state_of_last(job.run_dir), state_of_last(whole))
    observed(f"exit 5: {reason.partition(' at ')[0]}; then equal")


@pytest.mark.slow
@pytest.mark.fault(
    19,
    "a disk too small for one checkpoint, 2 ranks",
    injected="a file system with room for half the weights, or for these and a tenth of DeepSpeed's state",
    expected="no rank waits for another; exit 5 at the second failure; nothing half is left",
)
@pytest.mark.parametrize(
    ("weights", "state", "who"), [(0.5, 0.0, r"(?!rank)"), (1.0, 0.1, r"rank \d: ")], ids=["weights", "state"]
)
def test_a_disk_without_room_for_one(weights, state, who, shards, whole, tmp_path, small_disk, observed):
    disk = small_disk(f"size={room_for(whole, weights=weights, state=state)}")
    job = Job(shards, disk / "run", beside=tmp_path, train__hang_timeout_seconds=60, **LEARN).run()
    assert re.search(f"could not be written: {who}", job.said()), job.said()[-3000:]
    assert job.said().count("could not be written") == 2
    assert not list((job.run_dir / "checkpoints").iterdir())
    assert [row["step"] for row in steps(job.run_dir)] == [1, 2, 3, 4]
    observed("one warning at step 2, exit 5 at step 4")


@pytest.mark.fault(
    20,
    "disk full for metrics.jsonl",
    injected="RLIMIT_FSIZE below the file's size, then lifted",
    expected="one warning, rows wait in memory, all are written later, none is torn",
)
def test_rows_wait_for_room(tmp_path, caplog, observed):
    writer = MetricsWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [{"step": step, "loss": step / 7} for step in range(60)]
    try:
        for row in rows:
            if row["step"] == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
            if row["step"] == 50:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            writer.write(row)
            assert all(line.endswith("}") for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path) == rows
    assert sum("kept in memory" in record.message for record in caplog.records) == 1
    observed("60 rows in order, one warning")


def damage(run_dir, kind):
    """Spoil the newest checkpoint, or what points to it."""
    newest = run_dir / "checkpoints" / "step_000006"
    state = newest / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if kind == "truncated":
        os.truncate(state, state.stat().st_size - 7)
    elif kind == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 4
        state.unlink()
        state.write_bytes(content)
    elif kind == "missing":
        state.unlink()
    elif kind == "latest":
        (run_dir / "latest").write_text("")
    elif kind == "manifest":
        (newest / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        pytest.param(
            "truncated",
            r"has \d+ bytes; expected \d+ by the manifest",
            marks=pytest.mark.fault(
                21,
                "a truncated optimizer file",
                injected="7 bytes cut off",
                expected="file, found and wanted bytes; goes on from the checkpoint before, equal",
            ),
        ),
        pytest.param(
            "flipped",
            "has other content than the manifest says",
            marks=pytest.mark.fault(
                22,
                "a flipped bit in a checkpoint",
                injected="one bit in the optimizer's state",
                expected="the file is named; goes on from the checkpoint before, equal",
            ),
        ),
        pytest.param(
            "missing",
            "is missing; the manifest lists it",
            marks=pytest.mark.fault(
                23,
                "a rank's file is missing",
                injected="removed",
                expected="named; goes on from the checkpoint before, equal",
            ),
        ),
        pytest.param(
            "latest",
            "",
            marks=pytest.mark.fault(
                23,
                "an empty `latest`",
                injected="cut to 0 bytes",
                expected="the newest whole checkpoint is found all the same",
            ),
        ),
        pytest.param(
            "manifest",
            "manifest.json: step is None; expected int",
            marks=pytest.mark.fault(
                23,
                "a manifest that says nothing",
                injected="{} written over it",
                expected="named; goes on from the checkpoint before, equal",
            ),
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_not_used(kind, sentence, finished, tmp_path, caplog, observed):
    run_dir = copy_run(finished.run_dir, tmp_path / "run")
    wanted = state_of_last(finished.run_dir)
    damage(run_dir, kind)
    train(replace(finished, run_dir=run_dir), ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert not first_difference(state_of_last(run_dir), wanted)
    assert record(run_dir) == record(finished.run_dir)
    warnings = [
        record.message for record in caplog.records if "setting a bad checkpoint aside" in record.message
    ]
    assert len(warnings) == bool(sentence)
    if sentence:
        assert caplog.text.count("step_000006") >= 1
    said = re.search(sentence, warnings[0]).group() if sentence else "found"
    observed(f"{said}; equal at step 6")


@pytest.mark.fault(
    22,
    "100 flipped bits in a checkpoint, one at a time",
    injected="a random bit of a random file, 100 seeds",
    expected="all 100 found, each naming its file",
)
def test_every_flipped_bit_is_found(finished, tmp_path, observed):
    spoiled = copy_run(finished.run_dir / "checkpoints" / "step_000006", tmp_path / "step")
    names = sorted(checkpoints.read_checkpoint_manifest(spoiled).files)
    draw = torch.Generator().manual_seed(0)
    for _ in range(100):
        path = spoiled / names[torch.randint(len(names), (1,), generator=draw)]
        with path.open("r+b") as file:
            place = int(torch.randint(path.stat().st_size, (1,), generator=draw))
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ (1 << int(torch.randint(8, (1,), generator=draw)))]))
            file.flush()
            with pytest.raises(CheckpointError, match=path.name):
                checkpoints.verify(spoiled)
            file.seek(place)
            file.write(bytes([byte]))
    checkpoints.verify(spoiled)
    observed("100 of 100 found")


@pytest.mark.fault(
    24,
    "every checkpoint is bad",
    injected="a byte cut off a file of each",
    expected="exit 5 with each one's reason, now and the next time; never a start from step 0",
)
def test_no_run_begins_anew_by_itself(finished, tmp_path, observed):
    run_dir = copy_run(finished.run_dir, tmp_path / "run")
    for step in (3, 6):
        weights = run_dir / "checkpoints" / f"step_{step:06d}" / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 1)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"no checkpoint of .* is whole: .*step_000006.*step_000003"
        ) as end:
            train(replace(finished, run_dir=run_dir), ds_config_path=ds_config(tmp_path))
        assert end.value.exit_code == 5
    observed("exit 5, twice")


@pytest.mark.fault(
    25,
    "a run folder that cannot be made",
    injected="--run-dir below a file",
    expected="exit 5 before anything heavy is imported, one sentence",
)
def test_a_place_that_cannot_be_written_is_said_at_once(shards, tmp_path, observed):
    (tmp_path / "file").write_text("")
    listing = {"PYTHONPROFILEIMPORTTIME": "1"}
    job = Job(shards, tmp_path / "file" / "run", ranks=0, beside=tmp_path, environment=listing).run()
    assert job.code == 5, job.said()[-2000:]
    listed = [line for line in job.said().splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in listed}
    assert "yaml" in imported and not imported & {"torch", "transformers", "deepspeed"}
    assert "cannot be written: Not a directory. Choose another --run-dir" in job.said()
    assert "Traceback" not in job.said()
    observed(f"exit 5 after {job.seconds:.1f} s, start of Python included")


@pytest.mark.slow
@pytest.mark.fault(
    25,
    "a read-only disk, 2 ranks",
    injected="the run folder's file system mounted read-only",
    expected="exit 5 before data and model",
)
def test_a_read_only_disk_is_said(shards, tmp_path, small_disk, observed):
    disk = small_disk("size=10m")
    (disk / "run").mkdir()
    small_disk("ro")
    job = Job(shards, disk / "run", beside=tmp_path).run()
    assert job.code == 5, job.said()[-2000:]
    assert "cannot be written: Read-only file system" in job.said()
    observed(f"exit 5 after {job.seconds:.1f} s, launcher included")


@pytest.mark.fault(
    26,
    "power cut after a rename",
    injected="order of writes, syncs and renames recorded",
    expected="files, then folders are synced before the rename; the parent before `latest`; `latest` last",
)
def test_nothing_is_named_before_it_is_on_the_disk(tmp_path, monkeypatch, observed):
    events = []
    plain_sync, plain_rename, plain_replace = os.fsync, Path.rename, Path.replace

    def sync(descriptor):
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("sync", place.relative_to(tmp_path).as_posix()))
        plain_sync(descriptor)

    def rename(self, target):
        events.append(("name", Path(target).relative_to(tmp_path).as_posix()))
        return plain_rename(self, target)

    def replace_(self, target):
        events.append(("name", Path(target).relative_to(tmp_path).as_posix()))
        return plain_replace(self, target)

    staging = checkpoints.begin(tmp_path)
    (staging / "engine").mkdir()
    for name in ("model.safetensors", "engine/state.pt"):
        (staging / name).write_bytes(b"content")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", replace_)
    checkpoints.commit(tmp_path, step=5, facts=checkpoints.Facts(), keep_last=2)
    named = [place for kind, place in events if kind == "name"]
    assert named == ["checkpoints/step_000005", "latest"]
    before = [place for kind, place in events[: events.index(("name", named[0]))] if kind == "sync"]
    inside = {
        f"checkpoints/.saving/{name}" for name in ("model.safetensors", "engine/state.pt", "manifest.json")
    }
    assert inside | {"checkpoints/.saving", "checkpoints/.saving/engine"} == set(before)
    between = events[events.index(("name", named[0])) + 1 : events.index(("name", named[1]))]
    assert between == [("sync", "checkpoints"), ("sync", ".latest.tmp")]
    observed(f"{len(events)} events in order")


def test_checkpoints_of_every_so_many_steps_stay(tmp_path):
    for step in range(1, 9):
        (checkpoints.begin(tmp_path) / "model.safetensors").write_bytes(b"x")
        checkpoints.commit(tmp_path, step=step, facts=checkpoints.Facts(), keep_last=2, keep_every=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000006",
        "step_000007",
        "step_000008",
    ]


def test_a_row_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    append_metrics(tmp_path, {"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, text: write(descriptor, text[:5]))
    with pytest.raises(OSError, match="No space left"):
        append_metrics(tmp_path, {"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
