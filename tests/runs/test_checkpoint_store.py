import errno
import json
from pathlib import Path

import pytest

from t2i.distributed.run_id import give_run_id, read_run_id
from t2i.errors import CheckpointError
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.engine_state import drop_engine_state
from t2i.runs.loading import find


def save(run_dir, step, keep_last=9, run_id=None):
    staging = checkpoints.begin(run_dir)
    (staging / "engine").mkdir()
    (staging / "model.safetensors").write_bytes(b"weights of %d" % step)
    (staging / "engine" / "state.pt").write_bytes(b"x" * 100)
    facts = checkpoints.Facts(run_id=run_id or read_run_id(run_dir), progress={"tokens": step * 10})
    return checkpoints.commit(run_dir, step=step, facts=facts, keep_last=keep_last)


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    assert checkpoints.choose_newest(tmp_path) is None
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert checkpoints.choose_newest(tmp_path) == newest
    assert (tmp_path / "latest").read_text().strip() == "checkpoints/step_000010"
    assert checkpoints.verify(newest).facts.progress == {"tokens": 100}


def test_a_run_is_opened_at_its_newest_checkpoint_whose_weights_are_whole(tmp_path, caplog):
    assert checkpoints.newest_readable(tmp_path) is None
    folders = [save(tmp_path, step) for step in (5, 10, 15)]
    assert checkpoints.newest_readable(tmp_path) == tmp_path / "checkpoints" / "step_000015"
    assert find(str(tmp_path)) == (tmp_path / "checkpoints" / "step_000015", tmp_path)
    assert checkpoints.last_step(tmp_path) == 15
    (folders[2] / "engine" / "state.pt").unlink()  # which only training reads
    assert checkpoints.newest_readable(tmp_path) == folders[2]
    assert not caplog.records
    flip(folders[2])
    assert checkpoints.newest_readable(tmp_path) == tmp_path / "checkpoints" / "step_000010"
    said = caplog.records[0].getMessage()
    assert "step_000015" in said and said.endswith("step_000010 is read instead.")
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
        patched.setattr(checkpoints, "sync", die)
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


def names(run_dir):
    checkpoints.wait_for_removals()
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_steps_of_any_number_of_digits_are_ordered_as_numbers(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 10_000_000, 9_999_999 + 2):
        newest = save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_10000000", "step_10000001"]
    assert newest.name == "step_10000001"
    assert checkpoints.last_step(tmp_path) == 10_000_001
    assert checkpoints.choose_newest(tmp_path) == checkpoints.newest_readable(tmp_path) == newest
    truncate(newest)
    assert checkpoints.choose_newest(tmp_path).name == "step_10000000"
    assert (tmp_path / "checkpoints" / "step_10000001.bad").is_dir()


FOREIGN = (
    "step_0000005",
    "step_5",
    "step_000005x",
    "step_\u0661\u0662\u0663\u0664\u0665\u0666",
    "step_",
    "step_-00005",
    "notes",
)
"""Names of folders that no run gives to a checkpoint; the digits of one are Arabic."""


def test_folders_of_other_names_are_left_alone(tmp_path):
    for name in FOREIGN:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (5, 10, 15):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == sorted([*FOREIGN, "step_000015"])
    assert checkpoints.choose_newest(tmp_path).name == "step_000015"


@pytest.fixture
def two_runs(tmp_path):
    """Two run folders with an id each, and checkpoints of steps 5 and 10 in each."""
    runs = tmp_path / "one", tmp_path / "other"
    for run_dir in runs:
        run_dir.mkdir()
        give_run_id(run_dir)
        for step in (5, 10):
            save(run_dir, step)
    return runs


def test_another_runs_checkpoint_is_set_aside_and_never_resumed_from(two_runs, caplog):
    own, other = two_runs
    stranger = save(other, 99).rename(own / "checkpoints" / "step_000099")
    assert checkpoints.last_step(own) == 10
    assert checkpoints.newest_readable(own).name == "step_000010"
    assert checkpoints.choose_newest(own).name == "step_000010"
    assert "step_000099 is no checkpoint of this run; it is now step_000099.other-run" in caplog.text
    assert not stranger.exists()
    assert (own / "checkpoints" / "step_000099.other-run" / "model.safetensors").is_file()


def test_a_run_without_a_checkpoint_of_its_own_does_not_begin_anew_beside_anothers(two_runs, tmp_path):
    new = tmp_path / "new"
    (new / "checkpoints").mkdir(parents=True)
    give_run_id(new)
    stranger = (two_runs[0] / "checkpoints" / "step_000010").rename(new / "checkpoints" / "step_000010")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint of its own.*--model.init .*step_000010"):
            checkpoints.choose_newest(new)
    with pytest.raises(CheckpointError, match="step_000010 is of another run"):
        find(str(new))
    assert stranger.is_dir()


def test_pruning_counts_and_removes_only_own_checkpoints_before_the_new_one(two_runs):
    own, other = two_runs
    for step in (3, 7, 20):  # the last is of a higher number than the run's own
        save(other, step).rename(own / "checkpoints" / f"step_{step:06d}")
    (own / "checkpoints" / "step_000030").mkdir()  # nobody's
    assert save(own, 15, keep_last=1).is_dir()
    assert names(own) == ["step_000003", "step_000007", "step_000015", "step_000020", "step_000030"]
    assert checkpoints.last_step(own) == 15


def test_what_stands_in_the_place_of_a_new_checkpoint_makes_way(two_runs):
    own, other = two_runs
    save(other, 15).rename(own / "checkpoints" / "step_000015")
    (own / "checkpoints" / "step_000020").write_text("a file")
    assert checkpoints.make_way(own, step=10)
    for step in (15, 20):
        assert not checkpoints.make_way(own, step=step)
        save(own, step)
    assert {"step_000015.other-run", "step_000020.other-run"} < set(names(own))
    assert checkpoints.choose_newest(own).name == "step_000020"


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    give_run_id(tmp_path)
    folder = save(tmp_path, 5)
    path = folder / "manifest.json"
    content = path.read_bytes()
    unnoticed = []
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = checkpoints.read_checkpoint_manifest(folder)
        except CheckpointError:
            continue
        unnoticed.append((place, found))
    path.write_bytes(content)
    assert unnoticed == []
    assert checkpoints.verify(folder).step == 5


def test_a_damaged_manifest_leads_to_the_checkpoint_before(tmp_path):
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    text = (bad / "manifest.json").read_text()
    (bad / "manifest.json").write_text(text.replace('"tokens": 100', '"tokens": 101'))
    with pytest.raises(CheckpointError, match="other content than its own hash says"):
        checkpoints.verify(bad)
    assert checkpoints.newest_readable(tmp_path) == good
    assert checkpoints.choose_newest(tmp_path) == good


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10).rename(tmp_path / "checkpoints" / "step_000020")
    with pytest.raises(CheckpointError, match="is of step 10; expected 20, as its folder's name says"):
        checkpoints.verify(tmp_path / "checkpoints" / "step_000020")
    assert checkpoints.choose_newest(tmp_path).name == "step_000005"


def test_a_checkpoint_that_cannot_be_removed_yet_fails_no_save(tmp_path, monkeypatch, caplog):
    rename = Path.rename

    def refuse(self, target):
        if self.name == "step_000005":  # as Windows and some network disks do while a file in it is open
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    save(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        save(tmp_path, 10, keep_last=1)
    assert "step_000005 cannot be removed yet: Permission denied" in caplog.text
    assert names(tmp_path) == ["step_000005", "step_000010"]
    save(tmp_path, 15, keep_last=1)
    assert names(tmp_path) == ["step_000015"]


def test_a_reader_takes_the_next_checkpoint_while_the_run_removes_them(tmp_path, monkeypatch):
    for step in (5, 10):
        save(tmp_path, step)
    verify = checkpoints.verify

    def verify_late(folder, **options):
        if folder.name == "step_000010":
            save(tmp_path, 15, keep_last=1)
            checkpoints.wait_for_removals()
        return verify(folder, **options)

    monkeypatch.setattr(checkpoints, "verify", verify_late)
    assert checkpoints.newest_readable(tmp_path).name == "step_000015"


def test_a_reader_that_is_never_quick_enough_is_told_why(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def verify_late(folder, **_):
        save(tmp_path, int(folder.name[5:]) + 1, keep_last=1)
        checkpoints.wait_for_removals()
        raise CheckpointError("gone")

    monkeypatch.setattr(checkpoints, "verify", verify_late)
    with pytest.raises(CheckpointError, match="removes its checkpoints faster than they can be read"):
        checkpoints.newest_readable(tmp_path)


def test_a_finished_run_can_do_without_the_state_of_its_engine(tmp_path):
    folders = [save(tmp_path, step) for step in (5, 10)]
    assert drop_engine_state(tmp_path) == 200
    assert not list(tmp_path.rglob("engine"))
    assert [checkpoints.verify(folder).step for folder in folders] == [5, 10]  # whole, not damaged
    assert find(str(tmp_path)) == (folders[1], tmp_path)
    assert drop_engine_state(tmp_path) == 0


def test_what_a_killed_conversion_left_goes_before_the_next_save(tmp_path):
    left = tmp_path / "checkpoints" / ".universal" / "engine"
    left.mkdir(parents=True)
    save(tmp_path, 5)
    assert not left.parent.exists()
