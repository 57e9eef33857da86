"""Which try holds the record, and that what failed stays on the page."""

import os
import signal
import sys
import time

import processes
import pytest
from conftest import ROOT


@pytest.fixture
def speedrun(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speedrun

    return speedrun


def a_try(speedrun, name, *, seconds, num_seeds=5, loss=0.0, judge=0.0):
    """Make a try whose runs are so far beyond the targets."""
    return {
        "name": name,
        "flags": ["--train.lr", "3e-3"],
        "commit": "0123456789",
        "date": "2026-01-01",
        "machine": "a machine",
        "runs": [
            {
                "seed": seed,
                "steps": 10,
                "seconds": seconds + seed,
                "loss": speedrun.LOSS_TARGET - loss,
                "caption": 0.5,
                "judge": speedrun.JUDGE_TARGET + judge,
                "frechet": 100.0,
            }
            for seed in range(num_seeds)
        ],
    }


def test_the_fastest_that_reaches_both_targets_with_enough_seeds_holds_the_record(speedrun):
    tries = [
        a_try(speedrun, "slow", seconds=900),
        a_try(speedrun, "fast", seconds=300),
        a_try(speedrun, "few seeds", seconds=100, num_seeds=4),
        a_try(speedrun, "blind", seconds=200, loss=-0.01),
        a_try(speedrun, "ugly", seconds=200, judge=-0.01),
    ]
    assert speedrun.record_of(tries)["name"] == "fast"
    assert speedrun.record_of(tries[2:]) is None
    reached, missed = speedrun.page_of(tries).split(speedrun.MISSED)
    names = [
        [row.split("<br>")[0] for row in part.splitlines() if "<br>" in row] for part in (reached, missed)
    ]
    assert names == [["| few seeds", "| fast", "| slow"], ["| blind", "| ugly"]]
    assert "4 (pilot)" in reached
    assert "302 ± 2" in reached  # mean and half of a 95% t interval of 300 to 304


def test_a_finished_seed_is_not_trained_again(speedrun, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(speedrun, "call", called.append)
    (tmp_path / "eval" / "step_000010").mkdir(parents=True)
    (tmp_path / "latest").write_text("checkpoints/step_000010\n")
    (tmp_path / "eval" / "step_000010" / "scores.json").write_text(
        '{"rows": {"model": {"judge_pooled": 0.5, "fd_efficientnet_lite0": 99.0}}}'
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "step_seconds": 1.0, "seconds": 2.0}\n{"step": 10, "step_seconds": 1.0, "seconds": 5.5}\n'
        '{"step": 10, "split": "heldout", "image_loss": 3.5, "image_loss_wrong_caption": 4.25}\n'
    )
    run = speedrun.run_of(["--train.lr", "3e-3"], seed=3, folder=tmp_path)
    assert (run["seconds"], run["steps"], run["loss"], run["caption"]) == (5.5, 10, 3.5, 0.75)
    # Training resumes where it ended, which costs nothing; what is scored stays.
    (train,) = called
    assert train[1:4] == ["-m", "t2i", "train"] and train[train.index("--train.seed") + 1] == "3"


def test_seeds_of_another_commit_are_not_this_ones(speedrun, monkeypatch, tmp_path, capsys):
    folders = []

    def run_of(flags, *, seed, folder):
        folders.append(folder)
        return a_try(speedrun, "a try", seconds=300)["runs"][seed]

    monkeypatch.setattr(speedrun, "run_of", run_of)
    monkeypatch.setattr(speedrun, "use_two_cores", lambda: None)
    monkeypatch.setattr(speedrun, "FILE", tmp_path / "speedrun.json")
    monkeypatch.setattr(speedrun, "PAGE", tmp_path / "speedrun.md")
    for commit in ("a" * 40, "b" * 40):
        facts = {"commit": commit, "machine": "a machine", "date": "2026-01-01"}
        monkeypatch.setattr(speedrun.side_by_side, "facts", lambda facts=facts: facts)
        monkeypatch.setattr("sys.argv", ["speedrun.py", "--name", "a try", "--out", str(tmp_path)])
        speedrun.main()
    assert len(set(folders)) == 10
    (kept,) = speedrun.json.loads((tmp_path / "speedrun.json").read_text())
    assert kept["commit"] == "b" * 40
    for changed, sentence in (
        (["--seeds", "1"], "a try has 5 seeds, which --seeds 1 would replace"),
        (["--", "--train.lr", "1e-2"], "a try is a try with other flags"),
    ):
        monkeypatch.setattr("sys.argv", ["speedrun.py", "--name", "a try", *changed])
        with pytest.raises(SystemExit):
            speedrun.main()
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr(speedrun.side_by_side, "facts", lambda: facts | {"commit": "b" * 40 + "+"})
    monkeypatch.setattr("sys.argv", ["speedrun.py", "--name", "another try"])
    with pytest.raises(SystemExit, match="Files differ from the last commit"):
        speedrun.main()


def test_the_deepspeed_file_of_a_try_is_kept_however_it_is_spelt(speedrun, monkeypatch, tmp_path):
    called = []

    def call(command):
        called.append(command)
        raise SystemExit

    monkeypatch.setattr(speedrun, "call", call)
    for flags in (["--ds_config", "mine.json"], ["--ds-config=mine.json"], []):
        with pytest.raises(SystemExit):
            speedrun.run_of(flags, seed=0, folder=tmp_path)
    shipped = [[word for word in command if word.startswith("ds_configs/")] for command in called]
    assert [len(words) for words in shipped] == [0, 0, 1]


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text("begun")
time.sleep(60)
"""
CALLS = "import sys; sys.path.insert(0, 'benchmarks'); import speedrun; speedrun.call(sys.argv[1:])"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_command_save_and_ends_with_its_status(number, tmp_path):
    said = tmp_path / "said"
    words = [sys.executable, "-c", CALLS, sys.executable, "-c", SAVES, said]
    caller = processes.start(list(map(str, words)), cwd=ROOT)
    try:
        while not (said.exists() and said.read_text() == "begun"):
            assert caller.poll() is None
            time.sleep(0.05)
        os.kill(caller.pid, number)
        assert caller.wait(60) == 75
        assert said.read_text() == "saved"
    finally:
        processes.end(caller)


def test_without_a_record_the_fastest_pilot_is_run_with_enough_seeds(speedrun, monkeypatch, tmp_path):
    pilots = [
        a_try(speedrun, name, seconds=seconds, num_seeds=1) for name, seconds in (("slow", 9), ("fast", 5))
    ]
    (tmp_path / "speedrun.json").write_text(speedrun.json.dumps(pilots))
    monkeypatch.setattr(
        speedrun, "run_of", lambda flags, *, seed, folder: pilots[1]["runs"][0] | {"seed": seed}
    )
    facts = {"commit": "a" * 40, "machine": "a machine", "date": "2026-01-01"}
    monkeypatch.setattr(speedrun.side_by_side, "facts", lambda: facts)
    monkeypatch.setattr(speedrun, "use_two_cores", lambda: None)
    monkeypatch.setattr(speedrun, "FILE", tmp_path / "speedrun.json")
    monkeypatch.setattr(speedrun, "PAGE", tmp_path / "speedrun.md")
    monkeypatch.setattr("sys.argv", ["speedrun.py", "--out", str(tmp_path)])
    speedrun.main()
    assert [
        (one["name"], len(one["runs"]))
        for one in speedrun.json.loads((tmp_path / "speedrun.json").read_text())
    ] == [
        ("slow", 1),
        ("fast", 5),
    ]


@pytest.mark.parametrize(
    "flag", ["--data.shards", "--train.eval-images", "--train.seed", "--train.sample_every", "--config"]
)
def test_what_is_the_same_for_all_tries_is_no_trys_to_set(speedrun, monkeypatch, tmp_path, flag, capsys):
    monkeypatch.setattr(speedrun, "FILE", tmp_path / "speedrun.json")
    monkeypatch.setattr("sys.argv", ["speedrun.py", "--name", "a try", "--", flag, "1"])
    with pytest.raises(SystemExit):
        speedrun.main()
    assert f"{flag} is the same for all tries" in capsys.readouterr().err
