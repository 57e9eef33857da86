"""A study asks for what it needs before anything runs."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from t2i.commands import study as command
from t2i.errors import UserError
from t2i.study.cost import run_costs
from t2i.study.inputs import missing_inputs
from t2i.study.job_flags import check_job_flags
from t2i.study.jobs import Record, jobs_of, read_study, write_record


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The shipped study of one's own model and shards, in a folder that has neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((ROOT / "launchers/studies/own.yaml").read_text())
    return tmp_path / "mine.yaml"


def test_a_model_and_shards_that_are_not_there_are_said_before_anything_runs(own, monkeypatch, capsys):
    said = "model.init is models/mine .*not here, and no step makes it; data.shards is data/mine "
    monkeypatch.setattr("sys.argv", ["study.py", "mine.yaml"])
    with pytest.raises(UserError, match=said):
        command.main()
    assert not Path("runs").exists()
    monkeypatch.setattr("sys.argv", ["study.py", "mine.yaml", "--plan", "--gpu", "h100-80gb", "--price", "3"])
    command.main()
    printed = capsys.readouterr().out
    assert "models/mine" in printed and "`assumed` state" in printed and " dollars" in printed
    for name in ("models", "data"):
        (own.parent / name / "mine").mkdir(parents=True)
    assert missing_inputs(read_study(own), out=Path("runs/mine")) == []


def test_what_a_step_makes_or_the_hub_has_is_not_missed(own):
    study = yaml.safe_load(own.read_text())
    study["settings"] |= {
        "model": {"init": "{out}/made/checkpoints/best"},
        "data": {"shards": "elsewhere/shards", "seq_len": 320},
    }
    study["arms"] = {
        "pretrained": {},
        "random": {"model": {"init": "hf:somebody/something"}},
        "demo": {"model": {"init": "demo"}},
    }
    study["steps"] = [
        {
            "name": "shards",
            "command": "launchers/prepare.py",
            "flags": {"source": "openmoji", "out": "elsewhere"},
        },
        {"name": "model", "command": "launchers/train.py", "flags": {"run_dir": "{out}/made"}},
    ]
    own.write_text(yaml.safe_dump(study))
    assert missing_inputs(read_study(own), out=Path("runs/mine")) == []
    study["steps"].pop()
    own.write_text(yaml.safe_dump(study))
    (missing,) = missing_inputs(read_study(own), out=Path("runs/mine"))
    assert missing.startswith("model.init is runs/mine/made/checkpoints/best (in tune-pretrained-0.0003)")


@pytest.fixture(
    scope="module",
    params=sorted((ROOT / "launchers" / "studies").glob("*.yaml")),
    ids=lambda file: file.stem,
)
def shipped(request):
    """A study that comes with t2i, read once for all that is asked of it."""
    return read_study(request.param)


def test_the_studies_that_ship_have_flags_that_their_commands_take(shipped):
    check_job_flags(shipped, jobs_of(shipped, out=Path("out")))


def test_every_study_that_comes_with_t2i_has_a_price_before_any_of_its_steps_is_made(
    shipped, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    costs = run_costs(shipped, out=Path("out"))
    assert len(costs) >= len(shipped.arms) and all(one.flops > 0 for one in costs)


def test_what_measures_and_steps_read_is_asked_for_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = missing_inputs(read_study(ROOT / "launchers/studies/paper.yaml"), out=Path("out"))
    said = [one.partition(" (in")[0] for one in missing]
    assert said == [
        "model.init is models/open_lm_1b",
        "data.shards is data/pairs256",
        "model is models/open_lm_1b",
        "text is data/text",
        "captions is data/pairs256",
        "reference is models/open_lm_1b",
        "coco is data/coco",
    ]
    for place in ("models/open_lm_1b", "data/pairs256", "data/text"):
        Path(place).mkdir(parents=True)
    (missing,) = missing_inputs(read_study(ROOT / "launchers/studies/paper.yaml"), out=Path("out"))
    assert missing.startswith("coco is data/coco (in coco-pretrained-seed0), which is not here")


def test_sources_of_t2i_and_the_hub_and_what_jobs_make_are_not_missed(own):
    study = yaml.safe_load(own.read_text())
    flags = {
        "made": {"source": "text:shuffled:{out}/shards/notes.txt", "text_tokenizer": "hf:somebody/something"},
        "code": {"source": "text:code:torch", "captions": "all", "image-tokenizer": "{out}/shards/tokenizer"},
        "pattern": {"source": "cc3m/{00..31}.tar"},
        "icons": {"source": "iconify:data/icons"},
        "remote": {"data": {"shards": "cache/shards", "remote": "s3://bucket/shards"}, "model": "demo"},
        "dotted": {"data.shards": "cache/shards", "data.remote": "s3://bucket/shards"},
        "embedded": {"data": {"shards": "data/openmoji64"}, "heldout_shards": "data/openmoji64"},
    }
    study["steps"] = [
        {"name": "shards", "command": "launchers/prepare.py", "flags": {"out": "{out}/shards"}},
        *({"name": name, "command": "launchers/prepare.py", "flags": one} for name, one in flags.items()),
        # What a command of one's own means by its flags is its own.
        {
            "name": "own",
            "command": "scripts/fetch.py",
            "flags": {"model": "somebody/something", "text": "hello"},
        },
    ]
    study["measures"] = [
        {
            "name": "kept",
            "command": "eval/forgetting.py",
            "flags": {
                "text": "docstrings",
                "reference": "{run}/checkpoints/step_000001",
                "captions": "images",
            },
        }
    ]
    study["report"] = []
    own.write_text(yaml.safe_dump(study))
    said = [one.partition(" (in")[0] for one in missing_inputs(read_study(own), out=Path("runs/mine"))]
    assert said == [
        "model.init is models/mine",
        "data.shards is data/mine",
        "source is data/icons",
        "captions is images",
    ]


def test_what_finished_runs_needed_may_be_gone(own):
    study = read_study(own)
    Path("runs/mine/jobs").mkdir(parents=True)
    for job in jobs_of(study, out=Path("runs/mine")):
        write_record(Path("runs/mine"), job.name, Record("done", command=tuple(job.command)))
    assert missing_inputs(study, out=Path("runs/mine")) == []


def test_a_start_that_is_named_by_its_checkpoint_has_the_size_that_its_step_gives_it(own):
    study = yaml.safe_load(own.read_text())
    data = {"shards": "{out}/shards", "seq_len": 320}
    flags = {
        "run_dir": "{out}/made",
        "data": data,
        "model": {"hidden_size": 96, "num_layers": 2, "num_heads": 2},
    }
    study["steps"] = [{"name": "model", "command": "launchers/train.py", "flags": flags}]
    arms = {"by_run": "{out}/made", "by_step": "{out}/made/checkpoints/step_000500"}
    study["arms"] = {arm: {"model": {"init": init}} for arm, init in arms.items()}
    study["settings"].pop("model", None)
    study["report"] = []
    own.write_text(yaml.safe_dump(study))
    flops = {cost.name: cost.flops for cost in run_costs(read_study(own), out=Path("runs/mine"))}
    seed = study["seeds"][0]
    assert flops[f"by_run-seed{seed}"] == flops[f"by_step-seed{seed}"]
