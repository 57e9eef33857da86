"""Each arm at its own best learning rate: trials on a seed that is left out, and runs that take what they chose."""

import pytest
from made_runs import Made
from matplotlib import pyplot

from t2i.errors import UserError
from t2i.report.sections.registry import make_section
from t2i.study.cost import run_costs
from t2i.study.jobs import first_jobs, jobs_of, read_study
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


def write_trials(out, arm, losses, *, state="done"):
    """Write an arm's trials by hand, with these held-out losses at the end; None for one that failed."""
    made = Made(out, **{arm: [0]})
    for value, loss in zip((1e-4, 3e-4, 1e-3), losses, strict=True):
        heldout = [] if loss is None else [{"image_loss": 9.0}, {"image_loss": loss}]
        made.run(arm, 0, heldout=heldout, state="failed" if loss is None else state)
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
    assert [job.name for job in first_jobs(study, list(jobs.values()))] == trials
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
        (("{max_steps: 10}", "{max_step: 10}"), "tuning has the setting train.max_step"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused_before_anything_runs(tmp_path, change, sentence):
    (tmp_path / "study.yaml").write_text(STUDY.replace(*change))
    with pytest.raises(UserError, match=sentence):
        read_study(tmp_path / "study.yaml")


def test_the_command_lists_its_runs_again_after_the_trials(study, tmp_path, monkeypatch):
    """Run the command's own order with a trainer that writes down its flags and a loss that the rate decides."""
    from t2i.commands.study import work_through

    script = tmp_path / "toy.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "flags = sys.argv[1:]\nvalue = lambda name: flags[len(flags) - 1 - flags[::-1].index(name) + 1]\n"
        "run = Path(value('--run-dir'))\n(run / 'checkpoints').mkdir(parents=True)\n"
        "loss = abs(float(value('--train.lr')) - (3e-4 if 'pretrained' in run.name else 1e-4))\n"
        "row = {'step': 10, 'split': 'heldout', 'image_loss': loss}\n"
        "(run / 'metrics.jsonl').write_text(json.dumps(row) + chr(10))\n"
        "(run / 'lr').write_text(value('--train.lr'))\n"
        "status = {'state': 'done', 'code': 0, 'step': 10, 'reason': '', 'next': ''}\n"
        "(run / 'status.json').write_text(json.dumps(status))\n"
    )
    monkeypatch.setattr("t2i.study.runner.find_shipped", lambda path: script)
    assert work_through(study, jobs_of(study, out=tmp_path / "out"), out=tmp_path / "out") == 0
    rates = {path.parent.name: path.read_text() for path in (tmp_path / "out" / "runs").glob("*/lr")}
    assert rates["pretrained-seed0"] == rates["pretrained-seed1"] == "0.0003"
    assert rates["random-seed0"] == rates["random-seed1"] == "0.0001"
    # A second call does nothing again, and takes no finished run for one of another command.
    before = sorted((tmp_path / "out" / "jobs").iterdir())
    assert work_through(study, jobs_of(study, out=tmp_path / "out"), out=tmp_path / "out") == 0
    assert sorted((tmp_path / "out" / "jobs").iterdir()) == before
