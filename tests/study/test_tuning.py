"""Each arm at its own best learning rate: trials on a seed that is left out, and runs that take what they chose."""

import shutil

import pytest
from made_runs import Made, write_json
from matplotlib import pyplot

from t2i.errors import UserError
from t2i.report.sections.registry import make_section
from t2i.study.cost import run_costs
from t2i.study.jobs import jobs_of, read_study
from t2i.study.spec import SectionSpec
from t2i.study.tuning import trial_dir, tuned

STUDY = """
title: Tuned
question: Which rate?
seeds: [0, 1]
settings: {data: {seq_len: 90, shards: "{out}/images"}, train: {max_steps: 30, lr: 7.0}}
tuning: {seed: 9, values: [1.0e-4, 3.0e-4, 1.0e-3], settings: {train: {max_steps: 10}}}
arms: {pretrained: {model: {hidden_size: 96}}, random: {}}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    return read_study(tmp_path / "study.yaml")


def write_trials(out, arm, losses, *, state="done", code=4):
    """Write an arm's trials by hand, with these held-out losses at the end; None for one that failed with a code."""
    made = Made(out, **{arm: [0]})
    for value, loss in zip((1e-4, 3e-4, 1e-3), losses, strict=True):
        heldout = [] if loss is None else [{"image_loss": 9.0}, {"image_loss": loss}]
        made.run(arm, 0, heldout=heldout, state="failed" if loss is None else state)
        if loss is None:
            write_json(made.folder(arm, 0) / "status.json", {"state": "failed", "code": code})
        made.folder(arm, 0).rename(trial_dir(out, arm, value))


def command_of(study, name, out):
    return {job.name: job for job in jobs_of(study, out=out)}[name].command


def test_trials_come_before_the_runs_of_their_arm_on_a_seed_of_their_own(study, tmp_path):
    jobs = {job.name: job for job in jobs_of(study, out=tmp_path)}
    trials = [name for name in jobs if name.startswith("tune-")]
    assert len(trials) == 6 and trials[0] == "tune-pretrained-0.0001"
    flags = " ".join(jobs["tune-random-0.001"].command)
    # The last of two equal flags wins.
    assert flags.rindex("--train.lr 0.001") > flags.rindex("--train.lr 7.0")
    assert flags.rindex("--train.max_steps 10") > flags.rindex("--train.max_steps 30")
    assert flags.endswith("--train.seed 9")
    assert [one for one in jobs["random-seed1"].needs if one.startswith("tune-")] == trials[3:]
    assert {cost.name for cost in run_costs(study, out=tmp_path)} >= {*trials, "random-seed0"}


def test_runs_take_their_arms_best_value(study, tmp_path):
    assert "0.0003" not in command_of(study, "pretrained-seed0", tmp_path)
    write_trials(tmp_path, "pretrained", [5.0, 4.0, 4.5])
    write_trials(tmp_path, "random", [5.0, None, 4.5])
    flags = " ".join(command_of(study, "pretrained-seed1", tmp_path))
    assert flags.rindex("--train.lr 0.0003") > flags.rindex("--train.lr 7.0")
    assert "--train.lr 0.001" in " ".join(command_of(study, "random-seed0", tmp_path))
    assert "0.0003" in tuned_table(study, tmp_path)[1][-1]


def tuned_table(study, out):
    found = make_section(SectionSpec("tuning"), study=study, out=out)
    pyplot.close("all")
    assert "seed 9, which no comparison has" in found.found
    assert "Of random it is the smallest or largest tried" in found.found
    return found.table


def test_nothing_is_chosen_before_every_trial_has_ended(study, tmp_path):
    write_trials(tmp_path, "random", [5.0, 4.0, 3.0], state="running")
    write_trials(tmp_path, "pretrained", [None, None, None])
    assert tuned(study, arm="random", out=tmp_path).chosen is None
    assert tuned(study, arm="pretrained", out=tmp_path).chosen is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seed: 9", "seed: 1"), "tuning.seed is 1; expected none of the seeds of the runs"),
        (("[1.0e-4, 3.0e-4, 1.0e-3]", "[1.0e-3]"), "expected at least two different numbers"),
        (("[1.0e-4, 3.0e-4, 1.0e-3]", "[1.0e-3, 1.0e-3]"), "expected at least two different numbers"),
        (("random: {}", "random: {train: {lr: 1.0}}"), "arm random sets train.lr, which tuning chooses"),
        (("seed: 9, values", "sed: 9, values"), "unknown key sed of a tuning; perhaps seed was meant"),
        (("seed: 9, values", "seed: 9, loss: image_los, values"), "tuning.loss is image_los; expected"),
        (("{max_steps: 10}", "{max_step: 10}"), "tuning has the setting train.max_step"),
        (
            ("random: {}", "random: {data: {mode: text-only}}"),
            "loss is image_loss, of which arm random has none",
        ),
        # Without its point YAML takes it for a text.
        (("[1.0e-4,", "[1e-4,"), r"values\[0\] is '1e-4'; expected a number such as 1.0e-4"),
        (("seed: 9", "key: train.rate, seed: 9"), "trials of pretrained: There is no flag --train.rate"),
        (("[1.0e-4, 3.0e-4, 1.0e-3]", "[1.0e-4, 1.00000001e-4]"), "at least two different numbers"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused_before_anything_runs(tmp_path, change, sentence):
    (tmp_path / "study.yaml").write_text(STUDY.replace(*change))
    with pytest.raises(UserError, match=sentence):
        read_study(tmp_path / "study.yaml")


def test_a_trial_that_was_killed_is_no_answer(study, tmp_path):
    write_trials(tmp_path, "pretrained", [5.0, None, 4.0], code=-9)
    assert tuned(study, arm="pretrained", out=tmp_path).chosen is None


@pytest.fixture
def trained(study, tmp_path, monkeypatch):
    """Run the command's own order with a trainer that notes its flags; its loss, or its exit status, is the rate's."""
    from t2i.commands.study import work_through

    def train(loss):
        script = tmp_path / "toy.py"
        script.write_text(TRAINER + f"loss, code = {loss}\n" + ENDING)
        monkeypatch.setattr("t2i.study.runner.find_shipped", lambda path: script)
        status = work_through(study, out=tmp_path / "out")
        rates = {path.parent.name: path.read_text() for path in (tmp_path / "out" / "runs").glob("*/lr")}
        return status, {name: rate.split() for name, rate in rates.items()}

    return train


TRAINER = """
import json, sys
from pathlib import Path
flags = sys.argv[1:]
value = lambda name: flags[len(flags) - 1 - flags[::-1].index(name) + 1]
run = Path(value("--run-dir"))
run.mkdir(parents=True, exist_ok=True)
rate = float(value("--train.lr"))
with (run / "lr").open("a") as file:
    file.write(value("--train.lr") + " ")
"""
ENDING = """
if loss is not None:
    row = {"step": 10, "split": "heldout", "image_loss": loss}
    (run / "metrics.jsonl").write_text(json.dumps(row) + chr(10))
if code >= 0:
    state = "failed" if code else "done"
    (run / "status.json").write_text(json.dumps({"state": state, "code": code}))
sys.exit(abs(code))
"""


def test_runs_take_their_rates_in_the_same_call_and_a_second_one_does_nothing(trained, tmp_path):
    status, rates = trained("abs(rate - (3e-4 if 'pretrained' in run.name else 1e-4)), 0")
    assert status == 0
    assert rates["pretrained-seed0"] == rates["pretrained-seed1"] == ["0.0003"]
    assert rates["random-seed0"] == rates["random-seed1"] == ["0.0001"]
    assert trained("1.0, 0") == (0, rates)


def test_a_value_more_is_tried_and_refused_only_where_it_is_chosen(trained, study, tmp_path):
    trained("abs(rate - 3e-4), 0")
    study.tuning.values.append(3e-3)
    status, rates = trained("abs(rate - 3e-4), 0")
    assert status == 0 and rates["tune-random-0.003"] == ["0.003"] and rates["random-seed0"] == ["0.0003"]
    study.tuning.values.append(1e-2)
    with pytest.raises(UserError, match=r"pretrained-seed0 was done with another command .*0\.0003 0\.01"):
        trained("(-1.0 if rate == 1e-2 else 1.0), 0")


def test_an_arm_whose_trial_is_gone_is_trained_at_no_rate_that_nobody_chose(trained, tmp_path, capsys):
    trained("(rate, 0) if 'tune' in run.name else (None, -9)")
    shutil.rmtree(tmp_path / "out" / "runs" / "tune-random-0.001")
    status, rates = trained("rate, 0")
    assert status == 3 and "7.0" not in rates["random-seed0"]
    assert "random-seed0: failed; the folder of a trial of random is gone" in capsys.readouterr().out


def test_a_rate_that_diverges_is_an_answer(trained):
    """Status 4: it is not tried again, and the arm's runs take the best of the others."""
    status, rates = trained("(None, 4) if rate == 1e-3 else (rate, 0)")
    assert status == 0
    assert rates["random-seed0"] == ["0.0001"]
    assert rates["tune-random-0.001"] == ["0.001"]


def test_runs_whose_trial_was_killed_wait_for_a_call_in_which_it_is_not(trained):
    """Else its second try would be followed by runs at the rate that is written in the study's settings."""
    status, rates = trained("(None, -9) if rate == 3e-4 else (rate, 0)")
    assert status == 9 and not any("seed" in name for name in rates)
    assert rates["tune-random-0.0003"] == ["0.0003"]  # once in a call
    status, rates = trained("rate - 1, 0")
    assert status == 0 and rates["random-seed0"] == ["0.0003"]


def test_runs_of_an_arm_without_a_loss_are_refused(trained, capsys):
    status, rates = trained("(None, 4) if 'random' in run.name else (rate, 0)")
    assert status == 3 and rates["pretrained-seed0"] == ["0.0001"]
    assert not any(name.startswith("random-seed") for name in rates)
    said = "random-seed0: failed; no trial of random ended with a finite held-out image_loss"
    assert said in capsys.readouterr().out
