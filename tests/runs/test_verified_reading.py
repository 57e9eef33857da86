"""Whatever names a checkpoint, it is verified before it is read."""

import random
import shutil

import pytest

from t2i.distributed.run_id import read_run_id
from t2i.errors import CheckpointError
from t2i.model import backbone
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs import loading
from t2i.runs.loading import find, open_model


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return shutil.copytree(finished.run_dir, tmp_path_factory.mktemp("copies") / "run")


def step(run_dir):
    return run_dir / "checkpoints" / "step_000006"


@pytest.mark.parametrize("place", ["in its run", "elsewhere", "elsewhere without engine/", "set aside"])
def test_a_flipped_bit_anywhere_is_found_before_a_checkpoint_is_read(place, run, tmp_path):
    folder = step(run)
    if place == "set aside":
        run = shutil.copytree(run, tmp_path / "run")
        folder = step(run).rename(step(run).with_name("step_000006.bad"))
    elif place != "in its run":
        folder = shutil.copytree(folder, tmp_path / "best")
    if place == "elsewhere without engine/":
        shutil.rmtree(folder / "engine")
    assert find(str(folder))[0] == folder
    draw = random.Random(0)
    for name in (*sorted(checkpoints.read_checkpoint_manifest(folder).files), "manifest.json"):
        if name.startswith("engine/"):
            continue
        path = folder / name
        content = path.read_bytes()
        spoiled = bytearray(content)
        spoiled[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=name):
            find(str(folder))
        path.unlink()
        if name != "manifest.json" or place in ("in its run", "set aside", "elsewhere"):
            with pytest.raises(CheckpointError, match=name):
                find(str(folder))
        path.write_bytes(content)


def test_another_runs_checkpoint_is_not_read_with_this_runs_image_tokenizer(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "run_id").write_text("another\n")
    with pytest.raises(CheckpointError, match=f"step_000006 is of another run than {other}"):
        find(str(step(other)))


def test_folders_that_are_no_checkpoints_need_no_manifest(model_folder, tmp_path):
    plain = shutil.copytree(model_folder, tmp_path / "checkpoints" / "step_1000")
    for text in ('{"files": [], "version": 3}', "[1]", None):
        if text is None:
            (plain / "manifest.json").unlink()
        else:
            (plain / "manifest.json").write_text(text)
        assert find(str(plain)) == (plain, None)


def test_a_checkpoint_that_its_run_removes_meanwhile_is_replaced_by_the_next(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    load, loaded = backbone.load_model, []

    def load_late(folder, **options):
        if not loaded:
            shutil.rmtree(folder)  # the run has saved another one and removes this one
        loaded.append(folder.name)
        return load(folder, **options)

    monkeypatch.setattr(loading, "load_model", load_late)
    assert open_model(str(copy), needs_images=False).folder.name == "step_000003"
    assert loaded == ["step_000006", "step_000003"]
    with pytest.raises(CheckpointError, match="step_000003 was removed while it was read"):
        loaded.clear()
        open_model(str(copy / "checkpoints" / "step_000003"), needs_images=False)


def test_a_run_and_its_checkpoints_carry_one_id(run):
    facts = checkpoints.read_checkpoint_manifest(step(run)).facts
    assert facts.run_id == read_run_id(run) != ""
