import json

import pytest

from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.loading import find


def save(run_dir, step, keep_last=9):
    staging = checkpoints.begin(run_dir)
    (staging / "engine").mkdir()
    (staging / "model.safetensors").write_bytes(b"weights of %d" % step)
    (staging / "engine" / "state.pt").write_bytes(b"x" * 100)
    return checkpoints.commit(
        run_dir, step=step, facts=checkpoints.Facts(progress={"tokens": step * 10}), keep_last=keep_last
    )


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    assert checkpoints.choose_newest(tmp_path) is None
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert checkpoints.choose_newest(tmp_path) == newest
    assert (tmp_path / "latest").read_text().strip() == "checkpoints/step_000010"
    assert checkpoints.verify(newest).facts.progress == {"tokens": 100}


def test_a_run_is_opened_at_its_newest_checkpoint_whose_weights_are_whole(tmp_path):
    assert checkpoints.newest_readable(tmp_path) is None
    folders = [save(tmp_path, step) for step in (5, 10, 15)]
    assert checkpoints.newest_readable(tmp_path) == tmp_path / "checkpoints" / "step_000015"
    assert find(str(tmp_path)) == (tmp_path / "checkpoints" / "step_000015", tmp_path)
    assert checkpoints.last_step(tmp_path) == 15
    (folders[2] / "engine" / "state.pt").unlink()  # which only training reads
    assert checkpoints.newest_readable(tmp_path) == folders[2]
    flip(folders[2])
    assert checkpoints.newest_readable(tmp_path) == tmp_path / "checkpoints" / "step_000010"
    assert all(folder.is_dir() for folder in folders)  # nothing is set aside: the run may be training


@pytest.mark.parametrize("text", ["checkpoints/step_000005\n", "", "\xff"])
def test_latest_names_what_is_chosen_though_a_death_came_before_it_could(tmp_path, text):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    (tmp_path / "latest").write_text(text, encoding="latin-1")
    assert checkpoints.choose_newest(tmp_path) == newest
    assert (tmp_path / "latest").read_text() == "checkpoints/step_000010\n"


def truncate(folder):
    (folder / "engine" / "state.pt").write_bytes(b"x" * 99)


def flip(folder):
    (folder / "model.safetensors").write_bytes(b"weightt of 10")


def remove(folder):
    (folder / "model.safetensors").unlink()


def tear(folder):
    (folder / "manifest.json").write_text('{"step": 10, "fi')


@pytest.mark.parametrize("damage", [truncate, flip, remove, tear])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_chosen(tmp_path, damage):
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    damage(bad)
    assert checkpoints.choose_newest(tmp_path) == good
    assert bad.with_suffix(".bad").is_dir()
    damage(good)
    for _ in range(2):  # the second try must not start from step 0 either, and says the same
        with pytest.raises(CheckpointError, match=r"whole: .*step_000010\.bad/.*step_000005\.bad/"):
            checkpoints.choose_newest(tmp_path)


def test_a_killed_save_leaves_the_one_before(tmp_path, monkeypatch):
    good = save(tmp_path, 5)

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_sync", die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    assert checkpoints.choose_newest(tmp_path) == good
    assert checkpoints.choose_newest(tmp_path) != save(tmp_path, 10)


def test_only_the_last_are_kept_and_none_is_overwritten(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    checkpoints.wait_for_removals()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000003",
    ]
    with pytest.raises(CheckpointError, match="already exists"):
        save(tmp_path, 3)


def test_the_manifest_lists_every_file(tmp_path):
    manifest = json.loads((save(tmp_path, 5) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "engine/state.pt"}
