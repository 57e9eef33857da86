"""Which folder a run resumes from, and when it refuses to."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i.config import DataConfig, RunConfig
from t2i.distributed.run_id import RUN_ID
from t2i.errors import CheckpointError, DataError, NumericalError, Stopped, UserError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.engine_state import drop_engine_state
from t2i.runs.metrics_log import append_metrics, read_metrics
from t2i.runs.run_folder import open_run
from t2i.train.main import train
from t2i.train.step import Stepper

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"


def weights(run_dir, step=6):
    return load_file(checkpoints.step_folder(run_dir, step) / "model.safetensors")


def same(found, wanted):
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def at_step_3(finished, run_dir):
    """Copy the finished run as it was after step 3."""
    shutil.copytree(finished.run_dir, run_dir)
    shutil.rmtree(checkpoints.step_folder(run_dir, 6))
    return replace(finished, run_dir=run_dir)


def status_of(run_dir):
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize(
    "name", ["lr[12]", "a*b?", "-x", "with space\nand line", "ü {1,2} [!a]", "step_000005"]
)
def test_a_folder_of_any_name_resumes_its_own_run(name, finished, tmp_path):
    config = at_step_3(finished, tmp_path / name)
    if name == "lr[12]":  # as a pattern it is the name of this other run, whose weights are others
        other = replace(
            finished, run_dir=tmp_path / "lr1", train=replace(finished.train, seed=5, max_steps=3)
        )
        train(other, ds_config_path=DS_CONFIG)
    train(config, ds_config_path=DS_CONFIG)
    assert same(weights(config.run_dir), weights(finished.run_dir))
    steps = [row["loss"] for row in read_metrics(config.run_dir) if "split" not in row]
    assert steps == [row["loss"] for row in read_metrics(finished.run_dir) if "split" not in row]


def test_shards_are_known_by_their_content_at_any_path(finished, tmp_path, monkeypatch):
    config = at_step_3(finished, tmp_path / "run")
    moved = shutil.copytree(finished.data.shards, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    config = replace(config, data=replace(config.data, shards=Path("moved")))
    train(config, ds_config_path=DS_CONFIG)
    assert same(weights(config.run_dir), weights(finished.run_dir))
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "source": "moved too", "arguments": {}}))
    train(config, ds_config_path=DS_CONFIG)
    shutil.rmtree(config.run_dir / "checkpoints" / "step_000006")
    index = moved / "train" / "index.json"
    manifest["files"]["train/index.json"] = "0" * 16
    (config.run_dir / "data_manifest.json").write_text(json.dumps(manifest))
    before = {name: (config.run_dir / name).read_text() for name in ("resolved.yaml", "environment.json")}
    named = replace(config, data=replace(config.data, shards=moved))  # the same folder, by another name
    with pytest.raises(UserError, match="started with other shards than .*moved holds now"):
        train(named, ds_config_path=DS_CONFIG)
    assert index.is_file()
    # What measures read is that of the run, not of the start that was refused.
    assert {name: (config.run_dir / name).read_text() for name in before} == before


def test_another_runs_process_writes_nothing_into_a_folder_begun_anew(finished, tmp_path, monkeypatch):
    config = replace(finished, run_dir=tmp_path / "run", train=replace(finished.train, save_every=1))
    step, before = Stepper.step, {}

    def step_and_begin_anew(stepper, batches, progress):
        done = step(stepper, batches, progress)
        if progress.step == 2:
            shutil.rmtree(config.run_dir)
            shutil.copytree(finished.run_dir, config.run_dir)
            (config.run_dir / RUN_ID).write_text("another\n")
            before.update(contents(config.run_dir))
        return done

    monkeypatch.setattr(Stepper, "step", step_and_begin_anew)
    with pytest.raises(CheckpointError, match="is not this run's folder any more"):
        train(config, ds_config_path=DS_CONFIG)
    assert contents(config.run_dir) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_checkpoint_copied_in_from_another_run_is_not_resumed_from(finished, tmp_path, caplog):
    config = at_step_3(finished, tmp_path / "run")
    other = replace(finished, run_dir=tmp_path / "other", train=replace(finished.train, seed=5, max_steps=5))
    train(other, ds_config_path=DS_CONFIG)
    shutil.copytree(checkpoints.step_folder(other.run_dir, 5), checkpoints.step_folder(config.run_dir, 5))
    train(config, ds_config_path=DS_CONFIG)
    assert "step_000005 is no checkpoint of this run" in caplog.text
    assert same(weights(config.run_dir), weights(finished.run_dir))


def test_a_start_that_is_refused_blocks_no_other_and_is_not_what_to_run_next(finished, shards, tmp_path):
    run_dir = tmp_path / "run"
    settings = replace(finished.train, max_steps=1, eval_every=0)
    right = replace(finished, run_dir=run_dir, train=settings)
    # Found only when the model is made, after the run folder is opened.
    rows = tmp_path / "rows.safetensors"
    save_file({"input_rows": torch.zeros(3, 3)}, rows)
    wrong = replace(right, model=replace(right.model, new_embeddings=str(rows)))
    with pytest.raises(UserError, match=r"input_rows .* has shape \(3, 3\)"):
        train(wrong, ds_config_path=DS_CONFIG)
    assert (status_of(run_dir)["state"], status_of(run_dir)["next"]) == ("failed", "")
    train(replace(right, train=replace(settings, lr=0.1)), ds_config_path=DS_CONFIG)
    good = status_of(run_dir)
    assert good["next"].endswith(f"report.py {run_dir}")
    # Found before the folder is opened.
    nowhere = DataConfig(shards=tmp_path / "nowhere", seq_len=90)
    with pytest.raises(DataError, match="nowhere is no shard folder"):
        train(replace(right, data=nowhere), ds_config_path=DS_CONFIG)
    assert status_of(run_dir) == good


def test_other_shards_may_be_given_before_the_first_step(finished, tmp_path, monkeypatch):
    config = replace(
        finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=1, eval_every=0)
    )
    other = shutil.copytree(finished.data.shards, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "source": "another"}))

    def refuse(*_):
        raise NumericalError("before the first step")

    with monkeypatch.context() as patch, pytest.raises(NumericalError):
        patch.setattr(Stepper, "step", refuse)
        train(replace(config, data=replace(config.data, shards=other)), ds_config_path=DS_CONFIG)
    assert "another" in (config.run_dir / "data_manifest.json").read_text()
    train(config, ds_config_path=DS_CONFIG)
    assert "another" not in (config.run_dir / "data_manifest.json").read_text()


def test_weights_that_are_not_finite_are_never_saved(finished, tmp_path):
    settings = replace(finished.train, lr=1e39, save_every=1, warmup_steps=0)
    config = at_step_3(finished, tmp_path / "run")
    resolved = config.run_dir / "resolved.yaml"
    resolved.write_text(
        resolved.read_text()
        .replace("lr: 0.0015", "lr: 1.0e+39")
        .replace("warmup_steps: 2", "warmup_steps: 0")
    )
    kept = weights(config.run_dir, 3)
    with pytest.raises(NumericalError, match=r"After step 4 the values of .* are not finite.*step_000003"):
        train(replace(config, train=settings), ds_config_path=DS_CONFIG)
    assert [folder.name for folder in checkpoints.committed(config.run_dir).values()] == ["step_000003"]
    assert same(weights(config.run_dir, 3), kept)


def test_what_was_saved_before_skipped_steps_stays(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_FAULT", "0:4:nan")
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        train=replace(finished.train, max_steps=4, save_every=1, keep_last=1),
    )
    train(config, ds_config_path=DS_CONFIG)
    checkpoints.wait_for_removals()
    assert list(checkpoints.committed(config.run_dir)) == [3, 4]


def test_steps_that_are_measured_and_the_last_one_have_a_row(finished, tmp_path):
    """Held-out losses are drawn against the tokens in it."""
    settings = replace(finished.train, max_steps=5, log_every=3, eval_every=2)
    config = replace(finished, run_dir=tmp_path / "run", train=settings)
    train(config, ds_config_path=DS_CONFIG)
    rows = read_metrics(config.run_dir)
    assert [row["step"] for row in rows if "split" not in row] == [2, 3, 4, 5]
    assert {row["step"] for row in rows if row.get("split") == "heldout"} == {2, 4, 5}


def test_a_finished_run_says_so_and_what_to_change(finished, tmp_path, caplog):
    caplog.set_level("INFO", logger="t2i")
    run_dir = shutil.copytree(finished.run_dir, tmp_path / "run")
    train(replace(finished, run_dir=run_dir), ds_config_path=DS_CONFIG)
    assert (
        "this run is done; for more steps, run the same command with a larger --train.max-steps"
        in caplog.text
    )
    loss = read_metrics(run_dir)[-2]["loss"]
    report = f"Next: python launchers/report.py {run_dir}"
    assert f"done: step 6, loss {loss:.3f}. Checkpoints: {run_dir / 'checkpoints'}" in caplog.text
    assert report in caplog.text


def test_a_stop_that_comes_during_the_last_step_leaves_no_request(finished, tmp_path, monkeypatch):
    config = replace(
        finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=2, eval_every=0)
    )
    step = Stepper.step

    def ask_in_the_last_one(stepper, batches, progress):
        done = step(stepper, batches, progress)
        if progress.step == 2:
            (config.run_dir / "STOP").touch()
        return done

    monkeypatch.setattr(Stepper, "step", ask_in_the_last_one)
    train(config, ds_config_path=DS_CONFIG)
    assert status_of(config.run_dir)["state"] == "done"
    assert not (config.run_dir / "STOP").exists()  # else more steps, asked for later, would end at once


def test_a_stop_leaves_no_traceback(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run")
    with pytest.raises(Stopped):
        train(config, ds_config_path=DS_CONFIG, stop_at=2)
    assert not (config.run_dir / "error.txt").exists()
    assert status_of(config.run_dir)["state"] == "stopped"


def test_a_disk_that_fills_while_inputs_are_kept_leaves_a_folder_that_starts(finished, tmp_path, monkeypatch):
    config = replace(
        finished, run_dir=tmp_path / "run", train=replace(finished.train, max_steps=1, eval_every=0)
    )
    write = Path.write_bytes

    def half(path, data):
        if "data_manifest" not in path.name:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"data_manifest\.json.*No space left"):
        patch.setattr(Path, "write_bytes", half)
        train(config, ds_config_path=DS_CONFIG)
    assert not [path.name for path in config.run_dir.iterdir() if "data_manifest" in path.name]
    train(config, ds_config_path=DS_CONFIG)
    assert status_of(config.run_dir)["state"] == "done"


def test_text_that_is_replayed_is_known_by_its_content(tmp_path):
    run_dir, texts = tmp_path / "run", [tmp_path / "one", tmp_path / "other"]
    for text in texts:
        text.mkdir()
    config = RunConfig(run_dir=run_dir, data=DataConfig(replay_ratio=0.5, replay_shards=texts[0]))
    other = replace(config, data=replace(config.data, replay_shards=texts[1]))
    open_run(config, ds_config={}).close()
    append_metrics(run_dir, {"step": 1})
    with pytest.raises(UserError, match=r"data\.replay_shards is .*one there, .*other here"):
        open_run(other, ds_config={})  # of a run of the last release, which kept no copy to compare with
    (run_dir / "replay_manifest.json").write_text("{}")
    open_run(other, ds_config={}).close()


def test_a_run_without_the_state_of_its_engine_does_not_resume_and_keeps_its_checkpoints(finished, tmp_path):
    config = at_step_3(finished, tmp_path / "run")
    drop_engine_state(config.run_dir)
    with pytest.raises(CheckpointError, match=r"step_000003 has no engine/.*--model\.init"):
        train(config, ds_config_path=DS_CONFIG)
    assert [folder.name for folder in (config.run_dir / "checkpoints").glob("step_*")] == ["step_000003"]
    # As a kill leaves it that comes while the state is being removed.
    left = config.run_dir / "checkpoints" / "step_000003" / "engine" / "left.pt"
    left.parent.mkdir()
    left.write_bytes(b"a part")
    with pytest.raises(CheckpointError, match=r"step_000003 has no engine/.*--model\.init"):
        train(config, ds_config_path=DS_CONFIG)
    drop_engine_state(config.run_dir)
    assert not left.parent.exists()
