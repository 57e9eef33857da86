import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import processes
import pytest

from t2i.errors import CheckpointError, Stopped, UserError
from t2i.study.jobs import (
    Job,
    Record,
    changed_words,
    jobs_of,
    read_record,
    read_study,
    run_config,
    write_record,
)
from t2i.study.runner import STOPPED, exit_status, gpus_to_share, local_workers, submit, work

ROOT = Path(__file__).parents[2]

STUDY = """
title: Tiny
question: Does it help?
seeds: [0, 1]
settings: {data: {seq_len: 90}, train: {max_steps: 3}}
steps:
  - {name: first, command: step.py, flags: {out: "{out}/made"}}
  - {name: second, command: step.py, flags: {model: "{out}/made"}}
arms:
  pretrained: {model: {init: "{out}/language-model"}}
  random: {}
measures:
  - {name: near, command: eval/nearest.py, arms: [pretrained], seeds: [1], flags: {out: "{run}/near.json"}}
"""


WAITING = """
title: Tiny
question: Does it help?
seeds: [0]
settings: {data: {shards: "{out}/pictures"}}
tuning: {seed: 100, values: [1.0e-3, 2.0e-3]}
steps:
  - {name: pictures, needs: [], command: launchers/prepare.py, flags: {source: openmoji, out: "{out}/pictures"}}
  - {name: text, needs: [], command: launchers/prepare.py, flags: {source: "text:docstrings", out: "{out}/text"}}
  - {name: model, needs: [text], command: launchers/train.py, flags: {run_dir: "{out}/model"}}
  - {name: shown, needs: [model], command: launchers/sample.py, flags: {out: "{out}/shown"}}
arms:
  pretrained: {model: {init: "{out}/model/checkpoints/step_000010"}}
  random: {}
measures:
  - {name: forgetting, command: eval/forgetting.py, flags: {text: "{out}/text"}}
"""


def written(tmp_path, text=STUDY):
    (tmp_path / "study.yaml").write_text(text)
    return tmp_path / "study.yaml"


def test_arms_whose_losses_are_different_quantities_are_refused(tmp_path):
    mixed = STUDY.replace("random: {}", "random: {train: {image_vocab_only: true}}")
    with pytest.raises(UserError, match="set in random alone"):
        read_study(written(tmp_path, mixed))
    both = STUDY.replace("max_steps: 3", "max_steps: 3, image_vocab_only: true")
    assert run_config(
        read_study(written(tmp_path, both)), arm="random", seed=0, out=tmp_path
    ).train.image_vocab_only


def needs_of(study, out=Path("o")):
    return {job.name: set(job.needs) for job in jobs_of(study, out=out)}


def test_another_deepspeed_json_is_that_of_runs_and_of_steps_with_the_studys_own(tmp_path):
    text = WAITING.replace("seeds: [0]", "seeds: [0]\nds_config: zero2_bf16_cpu.json").replace(
        '{run_dir: "{out}/model"}', '{run_dir: "{out}/model", ds_config: zero2_bf16_cpu.json}'
    )
    own = "{name: other, needs: [], command: launchers/train.py, flags: {run_dir: x, ds_config: zero2.json}}"
    written(tmp_path, text.replace("arms:", f"  - {own}\narms:"))
    (tmp_path / "on_it.yaml").write_text("base: study.yaml\ntitle: O\nquestion: Q\narms: {}\n")
    for file in ("study.yaml", "on_it.yaml"):
        study = read_study(tmp_path / file, ds_config="zero2_fp32.json")
        jobs = {job.name: job.command for job in jobs_of(study, out=Path("o"))}
        given = {
            name: command[command.index("--ds_config") + 1] if "--ds_config" in command else ""
            for name, command in jobs.items()
        }
        assert (given["model"], given["other"], given["text"]) == ("zero2_fp32.json", "zero2.json", "")
        if file == "study.yaml":
            assert given["random-seed0"] == given["tune-random-0.001"] == "zero2_fp32.json"
    with pytest.raises(UserError, match="ds_config is nowhere.json, which is neither here"):
        read_study(tmp_path / "study.yaml", ds_config="nowhere.json")


def test_both_names_of_a_shipped_file_are_one_file(tmp_path, monkeypatch):
    bare, whole = (
        ["train.py", "--ds_config", "zero2.json", ""],
        ["train.py", "--ds_config", "ds_configs/zero2.json", ""],
    )
    assert changed_words(bare, whole) == changed_words(whole, bare) == ""
    assert changed_words(bare, ["train.py", "--ds_config", "zero2_fp32.json", ""])
    assert changed_words(["x.py", "--prompts", "a" * 9000], ["x.py", "--prompts", "b" * 9000])
    text = WAITING.replace("seeds: [0]", "seeds: [0]\nds_config: ds_configs/zero2.json").replace(
        '{run_dir: "{out}/model"}', '{run_dir: "{out}/model", ds_config: zero2.json}'
    )
    study = read_study(written(tmp_path, text), ds_config="zero2_fp32.json")
    assert {step.name: step.flags.get("ds_config") for step in study.steps}["model"] == "zero2_fp32.json"
    monkeypatch.chdir(tmp_path)
    Path("zero2.json").write_text("{}")  # a file of the user's own comes first
    assert changed_words(bare, whole)


def test_a_command_is_the_same_in_another_order_and_by_another_name_of_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    own = [
        "x.py",
        f"{tmp_path}/a",
        "--lr",
        "0.1",
        "--data.shards",
        f"{tmp_path}/b",
        "--source",
        f"text:{tmp_path}/c",
    ]
    other = [
        "x.py",
        f"{tmp_path}/link/a",
        "--source",
        f"text:{tmp_path}/link/c",
        "--data.shards",
        f"{tmp_path}/./b",
    ]
    assert changed_words(own, [*other, "--lr", "9", "--lr=0.1"]) == ""  # the last of two counts
    assert changed_words(own, [*other, "--lr", "0.1", "--lr", "9"])
    assert changed_words(["x.py", "--compile"], ["x.py", "--no-compile"])
    assert changed_words(["x.py", "--no-compile", "--compile"], ["x.py", "--compile"]) == ""
    assert changed_words(["x.py", "a", "b"], ["x.py", "b", "a"])


def test_a_study_on_another_trains_that_ones_steps_by_the_json_that_is_given(tmp_path):
    text = WAITING.replace('{run_dir: "{out}/model"}', '{run_dir: "{out}/model", ds_config: zero2.json}')
    written(tmp_path, text.replace("seeds: [0]", "seeds: [0]\nds_config: zero2.json"))
    own = "base: study.yaml\ntitle: O\nquestion: Q\narms: {}\nds_config: zero2_bf16_cpu.json\n"
    (tmp_path / "on_it.yaml").write_text(own)
    study = read_study(tmp_path / "on_it.yaml", ds_config="zero2_fp32.json")
    assert {step.name: step.flags.get("ds_config") for step in study.steps}["model"] == "zero2_fp32.json"


def test_a_job_waits_for_the_steps_whose_folders_it_names(tmp_path):
    needs = needs_of(read_study(written(tmp_path, WAITING)))
    assert needs["tune-random-0.001"] == {"pictures"}
    assert needs["random-seed0"] == {"pictures", "tune-random-0.001", "tune-random-0.002"}
    assert needs["tune-pretrained-0.001"] == {"pictures", "model"}
    assert needs["pretrained-seed0"] >= {"pictures", "model"}
    assert needs["forgetting-random-seed0"] == {"random-seed0", "text"}


@pytest.mark.parametrize(
    "made", ["{}", '{out: "{out}"}', "{out: data/openmoji64}"], ids=["unknown", "all", "elsewhere"]
)
def test_a_job_waits_for_steps_that_make_what_it_may_use_without_naming_it(tmp_path, made):
    text = WAITING.replace('{out: "{out}/shown"}', made)
    assert "shown" in needs_of(read_study(written(tmp_path, text)))["random-seed0"]


def test_a_name_that_goes_on_is_another_folder(tmp_path):
    text = WAITING.replace('run_dir: "{out}/model"', 'run_dir: "{out}/mod"').replace(
        "settings: {", 'settings: {train: {eval_text: ""}, '
    )
    assert "model" not in needs_of(read_study(written(tmp_path, text)))["pretrained-seed0"]


@pytest.mark.parametrize(
    "word", ["{out}//model", "{out}/x/../model", "text:{out}/model", "a=1,b={out}/model/x"]
)
def test_a_folder_is_known_however_it_is_written(tmp_path, word):
    text = WAITING.replace("{out}/model/checkpoints/step_000010", word)
    assert "model" in needs_of(read_study(written(tmp_path, text)))["pretrained-seed0"]


def test_a_folder_around_what_a_step_makes_names_it(tmp_path):
    text = WAITING.replace('"{out}/model/checkpoints/step_000010"', '"{out}/model"')
    text = text.replace('run_dir: "{out}/model"', 'run_dir: "{out}/model/part"')
    assert "model" in needs_of(read_study(written(tmp_path, text)))["pretrained-seed0"]


def test_arms_differ_in_their_own_settings_alone_and_come_seed_by_seed(tmp_path):
    study = read_study(written(tmp_path))
    jobs = jobs_of(study, out=Path("o"))
    assert [job.name for job in jobs] == [
        "first", "second",
        "pretrained-seed0", "random-seed0", "pretrained-seed1", "random-seed1",
        "near-pretrained-seed1",
    ]  # fmt: skip
    assert jobs[0].command == ["step.py", "--out", "o/made"]
    assert [job.needs for job in jobs[:3]] == [(), ("first",), ("second",)]
    assert jobs[-1].command == [
        "eval/nearest.py",
        "o/runs/pretrained-seed1",
        "--out",
        "o/runs/pretrained-seed1/near.json",
    ]
    assert jobs[-1].needs == ("pretrained-seed1", "second")
    configs = [run_config(study, arm=arm, seed=1, out=Path("o")) for arm in study.arms]
    assert configs[0].model.init == "o/language-model"
    assert configs[0].train.seed == 1
    assert replace(configs[0], run_dir=configs[1].run_dir, model=configs[1].model) == configs[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seeds: [0, 1]", "arm_seeds: {another: [0]}"), "arm_seeds names arm another"),
        (("title: Tiny", "title: Tiny\nseed: 3"), "unknown key seed of a study; perhaps seeds was meant"),
        (
            ("arms: [pretrained]", "arm: [pretrained], zebra: 1"),
            "unknown key arm of measure 1; perhaps arms was meant. Unknown too: zebra",
        ),
        (
            ("arms: [pretrained]", "arms: [pretraind]"),
            "measures: near names arm pretraind; perhaps pretrained was meant",
        ),
        (
            ("title: Tiny", "title: Tiny\nbase: none.yaml"),
            "base is none.yaml, which is not in the same folder",
        ),
        (
            ("random: {}", "random: {model: {initial: random}}"),
            "random has the setting model.initial, .* perhaps model.init was meant",
        ),
        (
            ("seq_len: 90", "seq_len: long"),
            "arm pretrained: data.seq_len is 'long'; expected a whole number from 1 to 1,000,000",
        ),
        (
            ("seq_len: 90", "seq_len: [90, 91]"),
            r"settings: data.seq_len is \[90, 91\]; expected a whole number from 1 to 1,000,000",
        ),
        (("random: {}", "random: {model: {init: }}"), "random: model.init is empty; expected a text"),
        (("random: {}", "random: {train: }"), "random: train is empty; expected settings of its own"),
        (("{name: first, command: step.py", "{command: step.py"), "step 1 is incomplete"),
        (("  - {name: first", "  - first\n  - {name: more"), "step 1 is 'first'; expected"),
        (
            ("{name: first,", "{name: first, needs: [second],"),
            "step first needs second, which is no step before it",
        ),
        (
            ("max_steps: 3", "max_step: 3"),
            "settings has the setting train.max_step, .* perhaps train.max_steps was meant",
        ),
        (("question: Does it help?", "question: [: ?"), "is not YAML"),
        (("seeds: [0, 1]", "seeds: 2"), "study.yaml: seeds is 2; expected a list"),
        (("seeds: [0, 1]", "seeds: [1, 1, 0]"), "arm pretrained has the seeds .* expected each once"),
        (("seeds: [0, 1]", "seeds: [true]"), r"seeds\[0\] is True; expected a whole number"),
        (("random: {}", "random:"), "arms.random is None; expected names with values"),
        (("random: {}", "no: {}"), "the name False in arms is False; expected a text"),
        (("random: {}", "random: {}\n  random: {}"), "is not YAML: it has the key random twice"),
        (("random: {}", "a/b: {}"), "'a/b-seed0' is no name of a job"),
        (("name: second", "name: first"), "has 2 jobs named first"),
        (("title: Tiny", "title: Tiny\nlaunch: deepspeed"), "launch is 'deepspeed'; expected a list"),
        (("title: Tiny", "title: Tiny\nmeasures:"), "it has the key measures twice"),
        (("title: Tiny", "title: Tiny\nreport:"), "report is None; expected a list"),
        (
            ("title: Tiny", "title: Tiny\nreport: [{section: [ends]}]"),
            "a section: section is .* expected a text",
        ),
        (
            ("title: Tiny", "title: Tiny\nds_config: mine.json"),
            "ds_config is mine.json, which is neither here nor",
        ),
        (
            ("title: Tiny", "title: Tiny\nassumed: {num_pair: 3}"),
            "assumed has the setting num_pair.* num_pairs",
        ),
        (("seeds: [1]", "seeds: [7]"), "near-pretrained-seed7 needs pretrained-seed7, which is no job"),
        (("title: Tiny", "title: Tiny\nbase: study.yaml"), "base is study.yaml, which has a base itself"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read_study(written(tmp_path, STUDY.replace(*change)))


def test_a_study_takes_from_its_base_what_it_does_not_say(tmp_path):
    base = read_study(written(tmp_path))
    other = tmp_path / "other.yaml"
    other.write_text("base: study.yaml\ntitle: Other\nquestion: And this?\nseeds: [4]\narms: {only: {}}\n")
    study = read_study(other)
    assert (study.settings, study.steps) == (base.settings, base.steps)
    assert (study.title, study.seeds, list(study.arms), study.measures) == ("Other", [4], ["only"], [])
    third = tmp_path / "third.yaml"
    third.write_text(other.read_text().replace("study.yaml", "other.yaml"))
    with pytest.raises(UserError, match="base is other.yaml, which has a base itself"):
        read_study(third)


def test_what_a_study_names_as_its_base_does_is_the_same_job(tmp_path):
    base = read_study(written(tmp_path))
    other = tmp_path / "other.yaml"
    steps = "steps: [first, {name: own, command: step.py, needs: [first]}]"
    other.write_text(
        f"base: study.yaml\ntitle: O\nquestion: Q?\n{steps}\narms: {{random: {{}}, more: {{}}}}\n"
    )
    study = read_study(other)
    out = study.default_out()
    assert (out, study.report_dir(out)) == (Path("runs/study"), Path("runs/study/other"))
    assert (base.default_out(), base.report_dir(out)) == (out, out)
    jobs, before = jobs_of(study, out=out), jobs_of(base, out=out)
    shared = [job.name for job in jobs if job.command in [one.command for one in before]]
    assert shared == ["first", "random-seed0", "random-seed1"]
    assert {job.name: job.needs for job in jobs}["own"] == ("first",)
    other.write_text(other.read_text().replace("[first, {", "[frist, {"))
    with pytest.raises(
        UserError, match="steps has frist, which is no step of study.yaml; perhaps first was meant"
    ):
        read_study(other)


@pytest.mark.parametrize(
    ("base", "more", "sentence"),
    [
        (STUDY, "settings: {train: {max_steps: 4}}", "random-seed0 is another job in its base.* name of its own"),
        (STUDY, "steps: [{name: first, command: other.py}]", "first is another job in its base study.yaml"),
        (
            STUDY.replace("random: {}", "random: {train: {lr: 0.5, min_lr_ratio: 0.25}}"),
            "arms: {random: {train: {lr: 0.25, min_lr_ratio: 0.5}}}",
            "random-seed0 is another job .*differs in 0.25 --train.min_lr_ratio",
        ),
        (STUDY.replace("{name: first, ", "{"), "", "study.yaml: step 1 is incomplete"),
    ],
)  # fmt: skip
def test_a_study_and_its_base_agree_on_what_they_share(tmp_path, base, more, sentence):
    written(tmp_path, base)
    other = tmp_path / "other.yaml"
    arms = "" if "arms:" in more else "arms: {random: {}}"
    other.write_text(f"base: study.yaml\ntitle: O\nquestion: Q?\n{arms}\n{more}\n")
    with pytest.raises(UserError, match=sentence):
        read_study(other)


SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$(dirname "$0")/words"
echo "Submitted batch job 7"
"""


def test_workers_on_slurm_are_one_array_job(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    command = ["python", "launchers/study.py", "a b.yaml"]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        submit(command, count=3, options=[], out=tmp_path / "out")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = submit(command, count=3, options=["--gres=gpu:8"], out=tmp_path / "out")
    assert said == "Submitted batch job 7"
    words = (tmp_path / "words").read_text().splitlines()
    assert words[0] == "--array=0-2"
    assert "--gres=gpu:8" in words
    assert words[-1] == "--wrap=exec python launchers/study.py 'a b.yaml'"


def test_more_workers_here_are_waited_for_or_stopped(tmp_path):
    sleeper = [sys.executable, "-c", "import sys, time; time.sleep(float(sys.argv[1]))"]
    began = time.monotonic()
    with local_workers([*sleeper, "0.5"], count=2):
        pass
    assert time.monotonic() - began > 0.5
    began = time.monotonic()
    with pytest.raises(KeyError), local_workers([*sleeper, "60"], count=2):
        raise KeyError
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("named", "seen"), [("0,1", ["0", "1", "0"]), ("GPU-a,GPU-b,2", ["GPU-a", "GPU-b", "2"])]
)
def test_workers_here_share_the_gpus_out(named, seen, toy, tmp_path, monkeypatch):
    """Each would take the first one that it sees."""
    _, study, _ = toy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    write = "import os, sys; open(os.path.join(sys.argv[1], str(os.getpid())), 'w').write(os.environ[sys.argv[2]])"
    with local_workers(
        [sys.executable, "-c", write, str(tmp_path), "CUDA_VISIBLE_DEVICES"],
        count=2,
        gpus=gpus_to_share(study),
    ):
        own = os.environ["CUDA_VISIBLE_DEVICES"]
    others = [path.read_text() for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert own == seen[0] and sorted(others) == sorted(seen[1:])


def test_gpus_are_those_that_are_there_and_a_launcher_takes_its_own(toy, monkeypatch):
    _, study, _ = toy
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert gpus_to_share(study) == ["0", "1", "2"]
    assert gpus_to_share(replace(study, launch=["deepspeed"])) == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpus_to_share(study) == []


SCRIPT = """
import sys, time
from pathlib import Path
folder, name, seconds, code = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
with (folder / "calls").open("a") as file:
    file.write(name + "\\n")
time.sleep(seconds)
sys.exit(code)
"""


@pytest.fixture
def toy(tmp_path):
    """Jobs that note their calls, and the study they belong to."""
    (tmp_path / "toy.py").write_text(SCRIPT)

    def job(name, *, seconds=0.0, code=0, needs=()):
        return Job(
            name, [str(tmp_path / "toy.py"), str(tmp_path), name, str(seconds), str(code)], needs=needs
        )

    study = read_study(written(tmp_path))
    return job, study, tmp_path


def calls(folder):
    return (folder / "calls").read_text().split()


def test_a_run_that_is_done_keeps_no_state_of_its_optimizer(toy, monkeypatch):
    job, study, folder = toy
    dropped = []
    monkeypatch.setattr("t2i.study.runner.drop_engine_state", dropped.append)
    jobs = [replace(job(name, code=code), run_dir=folder / name) for name, code in (("a", 0), ("bad", 4))]
    work(lambda: [*jobs, job("measure")], study=study, out=folder / "out")
    assert dropped == [folder / "a"]  # one that failed may resume
    # A worker may have been killed after the record: a job that is done is looked at again.
    work(lambda: jobs[:1], study=study, out=folder / "out")
    assert dropped == [folder / "a"] * 2


def test_a_failure_stops_only_what_needs_it_and_done_jobs_are_not_repeated(toy):
    job, study, folder = toy
    jobs = [job("a"), job("bad", code=4), job("c", needs=("a",)), job("d", needs=("bad",))]
    records = work(lambda: jobs, study=study, out=folder / "out")
    assert {name: record.state for name, record in records.items()} == {
        "a": "done", "bad": "failed", "c": "done", "d": "skipped",
    }  # fmt: skip
    assert records["bad"].code == 4
    mended = [jobs[0], job("bad"), *jobs[2:]]
    assert {record.state for record in work(lambda: mended, study=study, out=folder / "out").values()} == {
        "done"
    }
    assert calls(folder) == ["a", "bad", "c", "bad", "d"]
    with pytest.raises(UserError, match="a was done with another command"):
        work(lambda: [job("a", seconds=0.1)], study=study, out=folder / "out")


def test_a_run_that_could_not_say_its_end_is_not_done(toy, monkeypatch):
    """Reports would not know it, and its optimizer's state is what it resumes from."""
    job, study, folder = toy
    dropped = []
    monkeypatch.setattr("t2i.study.runner.drop_engine_state", dropped.append)
    run = replace(job("a"), run_dir=folder / "a")
    (folder / "a").mkdir()
    for state in ("running", "done"):
        (folder / "a" / "status.json").write_text(json.dumps({"state": state}))
        assert work(lambda: [run], study=study, out=folder / "out")["a"].state == (
            "done" if state == "done" else "failed"
        )
    assert dropped == [folder / "a"] and calls(folder) == ["a", "a"]


def test_the_time_of_a_job_is_that_of_all_its_processes(toy):
    """A stop at step 900 of 1,000, and a resume: both were paid for."""
    job, study, folder = toy
    stopped = job("a", seconds=0.5, code=STOPPED)
    with pytest.raises(Stopped, match="Stopped at a; run the same command to resume"):
        work(lambda: [stopped], study=study, out=folder / "out")
    record = read_record(folder / "out", "a")
    assert record.state == "open" and record.seconds >= 0.5
    resumed = work(lambda: [job("a")], study=study, out=folder / "out")["a"]
    assert resumed.state == "done" and resumed.seconds > record.seconds
    assert calls(folder) == ["a", "a"]


SKIPS_ANOTHER = """
import sys
from pathlib import Path
from t2i.study.jobs import Record, write_record
folder = Path(sys.argv[1])
write_record(folder / "out", "run", Record("skipped", reason="needs step, which is not done", attempt="of another"))
"""


def test_a_job_that_another_worker_skipped_is_run_once_its_need_is_done(toy):
    """The other worker has seen the step fail before this one tried it again."""
    job, study, folder = toy
    jobs = [job("step", code=4), job("run", needs=("step",)), job("measure", needs=("run",))]
    work(lambda: jobs[:1], study=study, out=folder / "out")
    (folder / "mended.py").write_text(SKIPS_ANOTHER)
    jobs[0] = Job("step", [str(folder / "mended.py"), str(folder)])
    records = work(lambda: jobs, study=study, out=folder / "out")
    assert {record.state for record in records.values()} == {"done"}
    assert calls(folder) == ["step", "run", "measure"]


def test_a_job_that_another_worker_failed_meanwhile_is_not_tried_again(toy):
    job, study, folder = toy
    listings = []

    def listed():
        listings.append(job("bad", code=4))
        if len(listings) == 2:  # after the records were read
            write_record(folder / "out", "bad", Record("failed", code=4, attempt="of another"))
        return listings[-1:]

    assert work(listed, study=study, out=folder / "out")["bad"].attempt == "of another"
    assert not (folder / "calls").exists()


def test_a_command_may_name_one_of_a_scripts_words(tmp_path):
    text = STUDY.replace(
        "{name: first, command: step.py,", "{name: first, command: launchers/tokenizer.py train,"
    )
    first = jobs_of(read_study(written(tmp_path, text)), out=Path("o"))[0]
    assert first.command == ["launchers/tokenizer.py", "train", "--out", "o/made"]


def test_a_script_that_does_not_exist_is_missed_before_anything_runs(toy):
    job, study, folder = toy
    for script in ("eval/nearer.py", ""):
        jobs = [job("a"), Job("near", [script], needs=("a",))]
        with pytest.raises(UserError, match=f"near calls {script}, which is neither here nor shipped"):
            work(lambda jobs=jobs: jobs, study=study, out=folder / "out")
    assert not (folder / "calls").exists()


def test_two_workers_never_take_one_job(toy):
    job, study, folder = toy
    jobs = [job(f"j{index}", seconds=0.15) for index in range(6)]
    # Locks belong to open files, so two threads exclude each other as two processes do; signals are the main thread's.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("t2i.study.runner.WAIT_SECONDS", 0.02)
        patched.setattr(signal, "signal", lambda number, handler: None)
        workers = [
            threading.Thread(
                target=work, args=(lambda: jobs,), kwargs={"study": study, "out": folder / "out"}
            )
            for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert sorted(calls(folder)) == [f"j{index}" for index in range(6)]


WORKER = """
import sys
from pathlib import Path
from t2i.errors import run_command
from t2i.study import runner
from t2i.study.jobs import Job, read_study
runner.WAIT_SECONDS = 0.05
folder = Path(sys.argv[1])
def job(name, seconds):
    return Job(name, [str(folder / "toy.py"), str(folder), name, seconds, "0"])
jobs = [job("a", "0"), job("slow", "1.5"), job("c", "0")]
run_command(lambda: runner.work(lambda: jobs, study=read_study(folder / "study.yaml"), out=folder / "out"))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_grid_goes_on(toy, number, code):
    _, _, folder = toy
    command = [sys.executable, "-c", WORKER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = processes.start(command, env=environment, stderr=subprocess.DEVNULL)
    while not (folder / "calls").exists() or "slow" not in calls(folder):
        assert killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, number)
    assert killed.wait() == code
    began = time.monotonic()
    done = processes.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(calls(folder)) == ["a", "c", "slow", "slow"]
    assert time.monotonic() - began > 1.5
    assert json.loads((folder / "out" / "jobs" / "slow.json").read_text())["state"] == "done"


ENDS_ON_A_SIGNAL = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_job_that_ends_well_on_a_signal_is_done_and_the_worker_stops(toy):
    job, study, folder = toy
    (folder / "toy.py").write_text(ENDS_ON_A_SIGNAL)
    with pytest.raises(Stopped, match="Stopped at a"):
        work(lambda: [job("a"), job("b")], study=study, out=folder / "out")
    assert [read_record(folder / "out", name).state for name in ("a", "b")] == ["done", "open"]


def test_workers_begin_wherever_the_command_was_typed(tmp_path, monkeypatch, call):
    (tmp_path / "toy.py").write_text(f"open('{tmp_path}/calls', 'a').write('call\\n')")
    step = f'{{name: a, command: "{tmp_path}/toy.py", flags: {{}}}}'
    (tmp_path / "one.yaml").write_text(f"title: T\nquestion: Q\narms: {{}}\nsteps: [{step}]\n")
    started = []
    monkeypatch.setattr(
        "t2i.study.runner.local_workers", lambda command, **_: started.append(command) or nullcontext()
    )
    monkeypatch.chdir(tmp_path)
    assert call(ROOT / "launchers/study.py", "one.yaml", "--workers", 2) == 0
    assert started == [
        [sys.executable, str(ROOT / "launchers/study.py"), "one.yaml", "--out", "runs/one", "--jobs-only"]
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--sbatch=--comment=it's mine"],
            '--sbatch is "--comment=it\'s mine", which a shell could not read',
        ),
        (
            ["--launcher", "slurm", "--jobs-only"],
            "--jobs-only is for a worker, and --launcher slurm starts workers",
        ),
    ],
)
def test_flags_for_slurm_that_cannot_work_are_refused(words, sentence, call, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call("launchers/study.py", "launchers/studies/smoke.yaml", *words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            "{name: score, command: eval/coco_fid.py, flags: {num_smaples: 200}}",
            "score-a-seed0: There is no flag --num_smaples",
        ),
        (
            "{name: score, command: eval/coco_fid.py, flags: {num_samples: -1}}",
            "score-a-seed0: --num-samples is -1",
        ),
        (
            "{name: near, command: eval/nearest.py, flags: {out: '{runn}/x.json'}}",
            "has {runn} in {runn}/x.json; perhaps {run}",
        ),
        (
            "{name: text, command: eval/forgetting.py}",
            "text-a-seed0 lacks a flag that eval/forgetting.py needs",
        ),
    ],
)
def test_flags_of_measures_are_read_before_anything_runs(
    entry, sentence, tmp_path, call, monkeypatch, capsys
):
    """Their turn comes after all training."""
    monkeypatch.setattr("t2i.study.runner.work", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "one.yaml").write_text(f"title: T\nquestion: Q\narms: {{a: {{}}}}\nmeasures: [{entry}]\n")
    assert call("launchers/study.py", tmp_path / "one.yaml", "--out", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_arm_without_seeds_is_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("title: T\nquestion: Q\narms: {a: {}}\nseeds: []\n")
    with pytest.raises(UserError, match="arm a has no seeds; expected at least one"):
        read_study(tmp_path / "one.yaml")


def test_a_report_is_written_and_nothing_submitted_where_a_line_for_slurm_is_typed_again(
    tmp_path, call, monkeypatch, capfd
):
    monkeypatch.setattr("t2i.study.runner.submit", lambda *_, **__: pytest.fail("submitted"))
    (tmp_path / "one.yaml").write_text("title: T\nquestion: Q\narms: {}\n")
    words = [tmp_path / "one.yaml", "--out", tmp_path / "out", "--launcher", "slurm", "--report"]
    assert call("launchers/study.py", *words) == 0
    assert "in a browser" in capfd.readouterr().out


def test_a_worker_that_ends_badly_is_said(caplog):
    with local_workers([sys.executable, "-c", "raise SystemExit(2)"], count=1):
        pass
    assert "a worker beside this one ended with status 2" in caplog.text


def test_the_command_shares_a_bases_work_and_writes_each_studys_report(call, tmp_path, monkeypatch, capfd):
    """With two workers, of which one alone writes a report."""
    (tmp_path / "toy.py").write_text(f"open('{tmp_path}/calls', 'a').write('call\\n')")
    steps = [f'{{name: {name}, command: "{tmp_path}/toy.py", flags: {{}}}}' for name in ("a", "b")]
    (tmp_path / "base.yaml").write_text(f"title: B\nquestion: Q\narms: {{}}\nsteps: [{', '.join(steps)}]\n")
    (tmp_path / "other.yaml").write_text("base: base.yaml\ntitle: O\nquestion: Q\narms: {}\nsteps: [a]\n")
    monkeypatch.chdir(ROOT)
    out = ["--out", tmp_path / "out"]
    assert call("launchers/study.py", tmp_path / "base.yaml", *out, "--workers", 2) == 0
    assert capfd.readouterr().out.count("in a browser") == 1
    assert call("launchers/study.py", tmp_path / "other.yaml", *out) == 0
    assert calls(tmp_path) == ["call"] * 2
    assert "<h1>O</h1>" in (tmp_path / "out" / "other" / "report.html").read_text()
    assert "<h1>B</h1>" in (tmp_path / "out" / "report.html").read_text()


def test_an_open_job_has_no_record(toy):
    _, _, folder = toy
    assert read_record(folder / "out", "a") == Record("open")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_waits_stops_on_a_signal_even_where_its_shell_ignores_ctrl_c(toy, number):
    _, _, folder = toy
    (folder / "out" / "locks").mkdir(parents=True)
    with (folder / "out" / "locks" / "slow").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another worker that has the last job
        worker = processes.start(
            [sys.executable, "-c", WORKER, str(folder)],
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_IGN
            ),  # as `nohup ... &` does in a script
            env=processes.environment(PYTHONPATH=str(ROOT)),
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (folder / "out" / "jobs" / "c.json").exists():
            assert worker.poll() is None
            time.sleep(0.05)
        worker.send_signal(number)
        _, said = worker.communicate(timeout=60)
    assert (worker.returncode, said.strip()[-40:]) == (75, "Stopped; run the same command to resume.")


def test_what_another_worker_did_with_another_command_is_no_result_of_this_study(toy, monkeypatch):
    job, study, folder = toy
    out, mine = folder / "out", job("a")

    def run(job, lock, *, before, study, out):
        write_record(out, "b", Record("done", code=0, command=("toy.py", "of another version")))
        return Record("done", code=0, command=tuple(job.command))

    monkeypatch.setattr("t2i.study.runner._run", run)
    with pytest.raises(UserError, match="b was done with another command"):
        work(lambda: [mine, job("b")], study=study, out=out)


def test_no_clock_decides_what_is_tried(toy, monkeypatch):
    job, study, folder = toy
    jobs = [job("bad", code=4), job("c", needs=("bad",))]
    for now in (2e9, 1e9, 5e8):  # the clock is set back before each call, and in the call it stands
        monkeypatch.setattr(time, "time", lambda now=now: now)
        records = work(lambda: jobs, study=study, out=folder / "out")
        assert {name: record.state for name, record in records.items()} == {"bad": "failed", "c": "skipped"}
    assert calls(folder) == ["bad"] * 3
    assert all(record.seconds is None or record.seconds >= 0 for record in records.values())


@pytest.mark.parametrize(
    ("codes", "status"), [([0, 0], 0), ([0, 4, 5], 4), ([-9, 4], 1), ([200], 1), ([None, 0], 0), ([], 0)]
)
def test_a_studys_exit_status_is_that_of_its_first_failure(codes, status):
    states = {None: "skipped", 0: "done"}
    assert exit_status(Record(states.get(code, "failed"), code=code) for code in codes) == status


def test_a_study_with_a_failed_job_says_so_by_its_exit_status(call, tmp_path, monkeypatch, capfd):
    (tmp_path / "toy.py").write_text("raise SystemExit(3)")
    step = f'{{name: a, command: "{tmp_path}/toy.py", flags: {{}}}}'
    (tmp_path / "x.yaml").write_text(f"title: B\nquestion: Q\narms: {{}}\nsteps: [{step}]\n")
    monkeypatch.chdir(ROOT)
    assert call("launchers/study.py", tmp_path / "x.yaml", "--out", tmp_path / "out") == 3
    assert "a: failed; see" in capfd.readouterr().out


def test_a_study_on_a_disk_without_locks_is_refused_with_the_path(toy, monkeypatch):
    job, study, folder = toy

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        CheckpointError, match=r"locks/a cannot be locked: No locks available.*choose an --out"
    ):
        work(lambda: [job("a")], study=study, out=folder / "out")
