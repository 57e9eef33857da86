"""Preparation by several ranks that share a folder: the same result for any number, a lost rank's work done again."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import made_sources as made
import processes
import psutil
import pytest

from t2i.config import ASSETS, PrepareConfig
from t2i.data.prepare import images as preparing
from t2i.data.prepare.images import prepare
from t2i.data.sources import open_source
from t2i.distributed import heartbeat as ranks
from t2i.errors import DataError, LostRankError, UserError
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

ROOT = Path(__file__).parents[2]
CONFIG = PrepareConfig(unit_pairs=4, batch_size=3, views=2)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    made.text_folder(folder)
    (folder / "005.png").write_bytes(b"no picture")
    return {
        "source": open_source(str(folder), heldout_share=0.2),
        "image_tokenizer": ImageTokenizer.load(ASSETS / "image_tokenizer"),
        "text_tokenizer": TextTokenizer.load(ASSETS / "text_tokenizer"),
        "config": CONFIG,
    }


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "shards"
    prepare(out=out, **arguments)
    return contents(out)


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.1)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(rank, world_size, *, out, arguments):
    return processes.fork(prepare, **arguments, out=out, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_ranks(world_size, tmp_path, arguments, alone):
    out = tmp_path / "shards"
    started = [start(rank, world_size, out=out, arguments=arguments) for rank in range(world_size)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * world_size
    assert contents(out) == alone
    assert not (tmp_path / "shards.part").exists()


def test_a_killed_ranks_work_is_done_again_and_no_other(tmp_path, arguments, alone, monkeypatch):
    out, part = tmp_path / "shards", tmp_path / "shards.part"
    write = preparing.write_unit

    def die_at_three(part, index, **settings):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(part, index, **settings)

    monkeypatch.setattr(preparing, "write_unit", die_at_three)
    monkeypatch.setattr(ranks, "PATIENCE_SECONDS", 1.0)
    other = start(1, 2, out=out, arguments=arguments)
    with pytest.raises(LostRankError, match="rank 1 has pending work and sent no heartbeat for 1 s"):
        prepare(out=out, rank=0, world_size=2, **arguments)
    other.join(10)
    assert other.exitcode == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in (part / "units").glob("*.json")}
    assert sorted(before) == ["000000.json", "000001.json", "000002.json", "000004.json"]
    written = []
    monkeypatch.setattr(
        preparing,
        "write_unit",
        lambda part, index, **rest: written.append(index) or write(part, index, **rest),
    )
    prepare(out=out, **arguments)
    assert written == [3, 5]
    assert contents(out) == alone


def test_workers_read_the_same_images(tmp_path, arguments, alone):
    config = PrepareConfig(unit_pairs=4, batch_size=3, views=2, workers=2)
    prepare(out=tmp_path / "shards", **{**arguments, "config": config})
    found = contents(tmp_path / "shards")
    assert {name for name in alone if found[name] != alone[name]} == {Path("manifest.json")}  # names workers


@pytest.mark.parametrize("kind", ["tar_folder", "parquet_struct", "hub_parquet"])
def test_workers_read_out_of_files_that_hold_many_images(kind, tmp_path, arguments):
    source = open_source(made.KINDS[kind](tmp_path / "source"))
    for workers in (0, 2):
        config = PrepareConfig(unit_pairs=12, workers=workers)
        prepare(out=tmp_path / str(workers), **{**arguments, "source": source, "config": config})
    without, with_two = (contents(tmp_path / str(workers)) for workers in (0, 2))
    assert {name for name in without if with_two[name] != without[name]} == {Path("manifest.json")}


def test_a_worker_that_dies_is_told_of(tmp_path, arguments, monkeypatch):
    from t2i.data.prepare import decode

    monkeypatch.setattr(decode, "decode", lambda pair, config: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="one of 1 decoding processes died"):
        prepare(out=tmp_path / "shards", **{**arguments, "config": PrepareConfig(workers=1)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_die_with_the_preparation(number):
    own, other = processes.FORK.Pipe()
    preparation = processes.fork(decode_until_killed, other)
    other.close()
    workers = [psutil.Process(pid) for pid in own.recv()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    os.kill(preparation.pid, number)
    preparation.join()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def decode_until_killed(pipe):
    from t2i.data.prepare.decode import decoding

    # Multiprocessing lets its own daemons have no children; a preparation is none.
    multiprocessing.current_process()._config["daemon"] = False
    with decoding(PrepareConfig(workers=2)) as pool:
        pool.submit(os.getpid).result()
        pipe.send(list(pool._processes))
        signal.pause()


def test_a_later_rank_with_other_arguments_is_refused(tmp_path, arguments):
    out = tmp_path / "shards"
    (tmp_path / "shards.part" / "units").mkdir(parents=True)
    (tmp_path / "shards.part" / "arguments.json").write_text('{"views": 7}')
    with pytest.raises(UserError, match="views: 7 there, 2 here"):
        prepare(out=out, rank=1, world_size=2, **arguments)


def test_a_rank_outside_its_job_is_refused(monkeypatch):
    assert ranks.place_in_job() == (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is 2 and WORLD_SIZE 2"):
        ranks.place_in_job()


def test_silence_is_measured_by_changes_and_not_by_clocks(tmp_path):
    watch = ranks.Watch(tmp_path)
    assert watch.silence_seconds(0) < 0.1
    (tmp_path / "0").touch()
    os.utime(tmp_path / "0", (1, 1))  # a machine whose clock is half a century behind
    assert watch.silence_seconds(0) < 0.1
    time.sleep(0.2)
    assert watch.silence_seconds(0) > 0.1
    # A disk that does not answer is no change, and no error.
    (tmp_path / "0").unlink()
    (tmp_path / "0").symlink_to("0")
    assert watch.silence_seconds(0) > 0.1


def test_a_heart_beats_on_after_an_error_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)
    failing, beats = [OSError(errno.ESTALE, "Stale file handle")], []

    def touch(path, *_, **__):
        beats.append(path)
        if failing:
            raise failing.pop()

    monkeypatch.setattr(type(tmp_path), "touch", touch)
    with ranks.signs_of_life(tmp_path / "beats", rank=0):
        time.sleep(0.5)
    assert len(beats) > 2


def test_accelerate_launch_prepares_with_two_ranks(tmp_path, arguments):
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    command = [
        *launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(processes.free_port()), "launchers/prepare.py", "--source", arguments["source"].name,
        "--out", str(tmp_path / "shards"), "--unit-pairs", "4", "--batch-size", "3", "--views", "2",
        "--heldout-share", "0.2",
    ]  # fmt: skip
    done = processes.run(
        command,
        cwd=ROOT,
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 broken.") == 1
    assert (tmp_path / "shards" / "manifest.json").is_file()
