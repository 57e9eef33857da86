"""Trackers beside TensorBoard: they get every row, and a run neither waits for them nor fails with them."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from t2i.distributed.run_id import give_run_id
from t2i.errors import UserError
from t2i.runs.metrics_log import append_metrics, read_metrics
from t2i.runs.run_folder import read_status
from t2i.train import following, trackers
from t2i.train.following import Look, follow
from t2i.train.main import train
from t2i.train.metrics import MetricsWriter
from t2i.train.trackers import Trackers, check_trackers

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"
HANGS = "import os, time\ndef init(**_):\n    print('asked', os.getpid(), flush=True)\n    time.sleep(1000)\n"
FAILS = "def init(**_):\n    raise ConnectionError('no network')\n"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved.yaml").write_text(yaml.safe_dump({"train": {"lr": 0.1, "report_to": ["wandb"]}}))
    return folder


def stand_in(tmp_path, monkeypatch, code):
    """Put a package named wandb before any other, for the trackers' processes."""
    (tmp_path / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_a_tracker_that_hangs_delays_a_run_by_no_more_than_a_moment(tmp_path, run_dir, monkeypatch, caplog):
    stand_in(tmp_path, monkeypatch, HANGS)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.5)
    start = time.monotonic()
    writer = MetricsWriter(run_dir, report_to=("wandb",))
    writer.start(step=-1)
    process = writer.trackers.processes["wandb"]
    for step in range(200):
        writer.write({"step": step, "loss": 1.0})
    assert time.monotonic() - start < 5  # seconds of the run itself; the tracker hangs for a thousand
    log = run_dir / "trackers" / "wandb.log"
    while "asked" not in log.read_text():  # it hangs indeed
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < 5
    assert "wandb is not done yet" in caplog.text
    assert not (run_dir / "tensorboard").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_takes_its_steps_and_ends_though_its_tracker_hangs(finished, tmp_path, monkeypatch, caplog):
    stand_in(tmp_path, monkeypatch, HANGS)
    monkeypatch.syspath_prepend(tmp_path)  # the run itself asks whether it is installed
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.5)
    settings = replace(finished.train, max_steps=2, eval_every=0, save_every=2, report_to=("wandb",))
    config = replace(finished, run_dir=tmp_path / "run", train=settings)
    train(config, ds_config_path=DS_CONFIG)
    assert [row["step"] for row in read_metrics(config.run_dir) if "split" not in row] == [1, 2]
    assert read_status(config.run_dir).state == "done"
    assert "wandb is not done yet" in caplog.text
    log, end = config.run_dir / "trackers" / "wandb.log", time.monotonic() + 60
    while "asked" not in log.read_text():  # it was reached, and hangs
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    os.kill(int(log.read_text().split("asked ")[1].split()[0]), signal.SIGKILL)


def test_a_tracker_that_fails_is_said_at_the_end(tmp_path, run_dir, monkeypatch, caplog):
    stand_in(tmp_path, monkeypatch, FAILS)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 120.0)
    started = Trackers(["tensorboard", "wandb"], run_dir=run_dir)
    started.close()
    assert "wandb failed (ConnectionError: no network)" in caplog.text


class Recorder:
    """Stands in for one of accelerate's trackers."""

    def __init__(self, project, **how):
        self.project, self.how, self.tracker = project, how, SimpleNamespace()
        self.logged, self.images, self.is_finished = [], [], False
        Recorder.last = self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        self.logged.append((step, values))

    def log_images(self, values, step):
        self.images.append((step, values["samples"][0].size))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def followed(run_dir, monkeypatch):
    """Follow a run that has ended already, with a Recorder for W&B."""
    monkeypatch.setattr(following, "PartialState", lambda cpu: None)
    monkeypatch.setitem(following.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    (run_dir / "trackers").mkdir()

    def run():
        end, other = os.pipe()
        os.close(other)
        with os.fdopen(end) as stdin:
            monkeypatch.setattr(following.sys, "stdin", stdin)
            follow(run_dir, "wandb")
        # The one that ends a hanging process would end this one a minute later.
        timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)
        return Recorder.last

    return run


def test_every_row_is_reported_once_and_samples_with_them(run_dir, followed):
    append_metrics(run_dir, {"step": 1, "loss": 2.0, "note": "text"})
    append_metrics(run_dir, {"step": 1, "split": "heldout", "image_loss": 3.0})
    (run_dir / "samples").mkdir()
    for step in (1, 5):
        Image.new("RGB", (4, 4)).save(run_dir / "samples" / f"step_{step:06d}.png")
    first = followed()
    assert first.logged == [(1, {"train/loss": 2.0}), (1, {"heldout/image_loss": 3.0})]
    assert first.images == [(1, (4, 4))]
    assert first.settings == {"train.lr": 0.1, "train.report_to": '["wandb"]'}
    assert first.is_finished
    append_metrics(run_dir, {"step": 5, "loss": 1.0})
    resumed = followed()
    assert (resumed.logged, resumed.images) == ([(5, {"train/loss": 1.0})], [(5, (4, 4))])


def test_a_stray_file_among_the_samples_is_left_out(run_dir, followed):
    append_metrics(run_dir, {"step": 1, "loss": 2.0})
    (run_dir / "samples").mkdir()
    for name in ("step_000001.png", "step_000001 copy.png", "step_.png"):
        Image.new("RGB", (4, 4)).save(run_dir / "samples" / name)
    assert followed().images == [(1, (4, 4))]


def test_runs_of_one_name_are_not_one_run_of_trackio(tmp_path, monkeypatch):
    monkeypatch.setitem(following.LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    names = []
    for parent in ("first", "second"):
        run = tmp_path / parent / "train"
        run.mkdir(parents=True)
        give_run_id(run)
        names += [following._opened("trackio", run_dir=run, run=None).how["name"] for _ in range(2)]
    assert names[0] == names[1] != names[2] == names[3]
    assert all(name.startswith("train ") for name in names)


def test_a_held_out_row_is_reported_though_its_step_was_before(run_dir, followed, monkeypatch):
    append_metrics(run_dir, {"step": 1, "loss": 2.0})
    real, polls = following.is_readable, []

    def late(stream, *, seconds):
        polls.append(seconds)
        if len(polls) > 1:
            return real(stream, seconds=seconds)
        append_metrics(run_dir, {"step": 1, "split": "heldout", "image_loss": 3.0})
        return False

    monkeypatch.setattr(following, "is_readable", late)
    assert followed().logged == [(1, {"train/loss": 2.0}), (1, {"heldout/image_loss": 3.0})]


def test_what_a_stopped_run_still_had_to_measure_is_reported_when_it_has(run_dir, followed):
    append_metrics(run_dir, {"step": 1, "split": "heldout", "image_loss": 4.0})
    append_metrics(run_dir, {"step": 2, "loss": 2.0})
    append_metrics(run_dir, {"step": 2, "split": "heldout", "image_loss": 3.0})
    followed()
    append_metrics(run_dir, {"step": 2, "split": "combinations", "image_loss": 2.5})
    append_metrics(run_dir, {"step": 3, "loss": 1.0})
    assert followed().logged == [(2, {"combinations/image_loss": 2.5}), (3, {"train/loss": 1.0})]


def line(step, loss=1.0):
    return json.dumps({"step": step, "loss": loss}) + "\n"


def test_a_half_written_row_waits_and_a_rewound_file_is_read_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    look = Look(path)
    assert look.new_rows() == []
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step"')
    assert [row["step"] for row in look.new_rows()] == [1]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert [row["step"] for row in look.new_rows()] == [2]
    assert look.new_rows() == []
    path.write_text("")
    assert look.new_rows() == []
    path.write_text(line(1))
    assert [row["step"] for row in look.new_rows()] == [1]


@pytest.mark.parametrize("later", [1, 2, 3, 9])
def test_rows_that_follow_a_rewind_are_all_read_however_many_came_between_two_looks(later, tmp_path):
    path = tmp_path / "metrics.jsonl"
    look = Look(path)
    path.write_text("".join(map(line, range(1, 6))))
    assert len(look.new_rows()) == 5
    again = [line(step, 2.5) for step in range(4, 4 + later)]  # from the checkpoint of step 3
    path.write_text("".join([*map(line, range(1, 4)), *again]))
    assert [(row["step"], row["loss"]) for row in look.new_rows()] == [
        (4 + place, 2.5) for place in range(later)
    ]
    assert look.new_rows() == []
    with path.open("a") as file:
        file.write(line(99))
    assert [row["step"] for row in look.new_rows()] == [99]


def test_a_tracker_that_is_not_installed_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError, match=r"train\.report_to names mlflow, which is not installed"):
        check_trackers(["tensorboard", "mlflow"])


def test_mlflow_keeps_runs_in_a_database_because_it_refuses_folders_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(following.LOGGER_TYPE_TO_CLASS, "mlflow", lambda *_, **__: None)
    following._opened("mlflow", run_dir=tmp_path, run=None)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/trackers/mlflow.db"
