"""Settings: what stands on their fields is what is checked, compared, shown and written down."""

import math
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

import processes
import pytest
import yaml
from annotated_types import Ge

from t2i.cli import parse, read_flags
from t2i.config import (
    AlignConfig,
    ControlInit,
    DataConfig,
    Gpu,
    Mode,
    ModelConfig,
    NormType,
    PlanConfig,
    PrepareConfig,
    RunConfig,
    SampleConfig,
    SourceConfig,
    TokenizerConfig,
    Trainable,
    TrainConfig,
    renamed,
)
from t2i.config.__main__ import PARTS, RUN_PARTS, page
from t2i.config.renamed import RENAMED, with_new_flags, with_new_keys
from t2i.cost.devices import GPUS
from t2i.errors import UserError
from t2i.model.control_init import CONTROLS
from t2i.model.open_lm.configuration_open_lm import NORM_TYPES
from t2i.model.trainable import RECIPES
from t2i.runs.metrics_log import append_metrics
from t2i.runs.run_folder import RESOLVED, open_run, plain, read_settings, record_run
from t2i.settings import changed_settings, expected, hints_of, key_of
from t2i.study.jobs import Job, jobs_of, read_study, run_config
from t2i.study.runner import work
from t2i.tokens.sequence import NUM_MARKERS

ROOT = Path(__file__).parents[1]
OLD_FOLDER = Path(__file__).parent / "runs" / "resolved_0_1_0.yaml"
"""resolved.yaml as release 0.1.0 wrote it, with every old name at another value than its default."""

GROUPS = {
    DataConfig: "data",
    ModelConfig: "model",
    TrainConfig: "train",
    AlignConfig: "align",
    PlanConfig: "",
    PrepareConfig: "",
    SampleConfig: "",
    SourceConfig: "",
    TokenizerConfig: "",
}
NUMBERS = [
    (kind, name) for kind in GROUPS for name, hint in hints_of(kind).items() if "number" in expected(hint)
]
TRIED = (-1, 0, 1, 0.5, math.nan, math.inf, -math.inf, 1e12, 10**20, -(10**20), True, "3")


@pytest.fixture(autouse=True)
def first_warning():
    """Forget what this process has warned of already."""
    renamed._warn.cache_clear()


def old_names(caplog):
    return [record.args[0] for record in caplog.records if record.name == "t2i.config.renamed"]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda one: getattr(one, "__name__", one))
def test_a_number_is_taken_or_refused_by_its_full_key(kind, name):
    taken = []
    for number in TRIED:
        value = (number,) if name == "channels" else number
        try:
            kind(**{name: value})
        except UserError as error:
            assert str(error).startswith(f"{key_of(name, group=GROUPS[kind])} is {value!r}"), error
        else:
            taken.append(number)
    # Nothing that is no finite number, or no number at all, gets through.
    assert not [one for one in taken if one is True or one == "3" or not -math.inf < one < math.inf]
    is_whole = "whole" in expected(hints_of(kind)[name])
    assert not is_whole or all(isinstance(one, int) and abs(one) < 2**63 for one in taken)


def test_every_number_has_a_range():
    free = [
        (kind.__name__, name)
        for kind, name in NUMBERS
        if not any(s in expected(hints_of(kind)[name]) for s in (">", "from"))
    ]
    assert free == [("SourceConfig", "min_score")]  # a score may be any number


def test_numbers_that_no_run_can_have_are_refused_together():
    with pytest.raises(UserError) as refusal:
        TrainConfig(lr=math.nan, beta2=1.0, log_every=0, keep_last=2.5)
    assert str(refusal.value) == (
        "train.lr is nan; expected a number >= 0."
        " train.beta2 is 1.0; expected a number >= 0 and < 1."
        " train.log_every is 0; expected a whole number >= 1."
        " train.keep_last is 2.5; expected a whole number >= 1."
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainConfig(lr=-1), r"^train\.lr is -1; expected a number >= 0\.$"),
        (lambda: TrainConfig(seed=10**20), r"^train\.seed is 1(0){20}; expected a whole number >= 0 and < 2\^63\.$"),
        (lambda: ModelConfig(trainable="half"), "model.trainable is 'half'; expected one of all, embeddings, norms"),
        (lambda: ModelConfig(new_embeddings="rows.npy"), "captions or the path of a .safetensors file"),
        (lambda: ModelConfig(lora_rank=2, trainable="norms"), "expected all with model.lora_rank 2"),
        (lambda: ModelConfig(control_init="moments"), "model.control_init is moments, but model.init is random"),
        (lambda: DataConfig(mode="images"), "data.mode is 'images'; expected one of text-to-image, image-only"),
        (lambda: DataConfig(replay_ratio=1.0), "data.replay_ratio is 1.0; expected a number >= 0 and < 1"),
        (lambda: DataConfig(replay_ratio=0.5), "data.replay_shards None; one needs the other"),
        (lambda: DataConfig(cache_limit="1gb"), "expected None while data.remote is empty"),
        (lambda: TokenizerConfig(channels=(32, 33)), r"--channels is \(32, 33\); expected .* a multiple of 32"),
        (lambda: SourceConfig(min_score=1.0), "--score-key names no column"),
        (lambda: SampleConfig(window=0), "--window is 0; expected a whole number from 1 to 64 or auto"),
        (lambda: SampleConfig(window="all"), "--window is 'all'; expected a whole number from 1 to 64 or auto"),
        (lambda: PlanConfig(gpu="tpu"), "--gpu is 'tpu'; expected one of a100-40gb"),
    ],
)  # fmt: skip
def test_a_refusal_says_key_value_and_what_was_expected(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_run_begun_under_a_former_default_resumes_under_todays():
    wanted = plain(ModelConfig())
    assert changed_settings({**wanted, "new_embeddings": "random"}, wanted, kind=ModelConfig) == []
    assert changed_settings({**wanted, "new_embeddings": "mean"}, wanted, kind=ModelConfig)
    asked = plain(ModelConfig(new_embeddings="own"))
    assert changed_settings({**wanted, "new_embeddings": "random"}, asked, kind=ModelConfig)


def test_choices_are_those_of_the_code_that_acts_on_them():
    assert set(get_args(Trainable)) == set(RECIPES)
    assert set(get_args(ControlInit)) - {"none", "fresh"} == set(CONTROLS)
    assert get_args(NormType) == NORM_TYPES
    assert set(get_args(Mode)) == set(NUM_MARKERS)
    assert set(get_args(Gpu)) - {"cpu"} == set(GPUS)


@dataclass(frozen=True)
class Command(RunConfig):
    config: Path | None = None
    amount: Annotated[int, Ge(2)] = 2
    """How many."""


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return parse(Command, description="")


def test_a_command_line_is_refused_with_the_key_as_it_is_typed(monkeypatch):
    with pytest.raises(UserError, match=r"^--amount is 1; expected a whole number >= 2\.$"):
        parsed(monkeypatch, "--amount", "1")
    with pytest.raises(UserError, match=r"^train\.lr is -1\.0; expected a number >= 0\.$"):
        parsed(monkeypatch, "--train.lr", "-1")


def test_help_shows_text_range_and_default(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--train.beta1 FLOAT Adam's decay rate of the first moment. (>= 0 and < 1) (default: 0.9)" in shown
    assert "--amount INT How many. (>= 2) (default: 2)" in shown
    assert (
        "Optimization: AdamW or Muon, with a linear warm-up and a cosine schedule." in shown
    )  # the text of the group


def test_the_page_of_settings_is_fresh():
    hint = "python -m t2i.config > docs/settings.md"
    assert (ROOT / "docs" / "settings.md").read_text() == page(), f"out of date; {hint}"


def test_the_page_has_every_setting_with_its_resume_rule():
    text = page()
    for _, group, kind in PARTS:
        for one in fields(kind):
            if not is_dataclass(one.type):
                assert f"| `{key_of(one.name, group=group)}` |" in text
    assert (
        "| `train.log_every` | `1` | a whole number >= 1 | yes | Steps between rows of metrics.jsonl. The last step and"
        " those that are measured have a row in any case. |" in text
    )
    assert "| `data.subsample_every` | `1` | a whole number >= 1 | no |" in text
    assert set(GROUPS) == {kind for _, _, kind in PARTS} - {RunConfig}
    assert {RunConfig, *(type(getattr(RunConfig(), group)) for group in ("data", "model", "train"))} == set(
        RUN_PARTS
    )


FREE = {
    "run_dir", "data.num_workers", "data.cache_limit", "model.gradient_checkpointing", "model.trust_remote_code",
    "train.max_steps", "train.log_every", "train.save_every", "train.keep_last", "train.keep_every",
    "train.deterministic", "train.compile", "train.spike", "train.spike_score", "train.hang_timeout_seconds",
    "train.sample_every", "train.sample_prompts", "train.report_to",
    "train.eval_every", "train.eval_images", "train.eval_text",
}  # fmt: skip
"""What a resumed run may change: written out, for no rule would notice if one more became free."""


def test_a_resume_compares_every_setting_but_those_that_may_change():
    there = plain(RunConfig())
    compared = set()
    for key in [
        *(f"{group}.{name}" for group in ("data", "model", "train") for name in there[group]),
        "run_dir",
    ]:
        group, _, name = key.rpartition(".")
        here = {**there, group: {**there[group], name: "other"}} if group else {**there, name: "other"}
        if found := changed_settings(there, here, kind=RunConfig):
            assert found == [f"{key} is {there[group][name]} there, other here"]
            compared.add(key)
        else:
            assert key in FREE
    assert not compared & FREE


def test_a_run_that_names_its_model_without_hf_resumes_with_it():
    there, here = plain(RunConfig()), plain(RunConfig())
    there["model"]["init"], here["model"]["init"] = "somebody/something", "hf:somebody/something"
    assert not changed_settings(there, here, kind=RunConfig)
    assert changed_settings(here, there, kind=RunConfig)


def test_a_folder_from_before_a_setting_existed_has_its_default():
    there = plain(RunConfig())
    here = plain(RunConfig())
    del there["train"]["z_loss"]
    assert not changed_settings(there, here, kind=RunConfig)
    here["train"]["z_loss"] = 0.1
    assert changed_settings(there, here, kind=RunConfig) == ["train.z_loss is 0.0 there, 0.1 here"]
    there["train"]["momentum"] = 0.9  # none that this release knows
    assert "train.momentum is 0.9 there, None here" in changed_settings(there, here, kind=RunConfig)


def test_the_table_of_old_names_leads_to_settings_and_hides_none():
    known = {
        f"{group}.{name}" if group in ("data", "model", "train") else name
        for kind, group in GROUPS.items()
        for name in hints_of(kind)
    } | {"num_images"}  # of launchers/tokenizer.py evaluate
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["--data.keep-every", "4"], ["--data.subsample_every", "4"]),
        (["--data.keep_every=4"], ["--data.subsample_every=4"]),
        (["--train.no-image-rows-only"], ["--train.no-image_vocab_only"]),
        (["--num-pictures", "9"], ["--num_images", "9"]),
        (["--train.keep-every", "4", "data.keep_every"], ["--train.keep-every", "4", "data.keep_every"]),
    ],
)
def test_old_flags_are_read_in_every_spelling(words, now):
    assert with_new_flags(words) == now


def test_old_keys_are_read_in_every_nesting():
    old = {"data": {"keep-every": 2, "seq_len": 9}, "model.learn": "norms", "text_rows": 7}
    now = {"data": {"subsample_every": 2, "seq_len": 9}, "model.trainable": "norms", "text_vocab_size": 7}
    assert with_new_keys(old) == now


def test_an_old_flag_works_and_is_warned_of_once(monkeypatch, caplog):
    config = parsed(monkeypatch, "--model.learn", "norms", "--data.keep-every", "3", "--data.keep_every", "2")
    assert (config.model.trainable, config.data.subsample_every) == ("norms", 2)
    assert old_names(caplog) == ["model.learn", "data.keep_every"]
    assert "model.learn is now model.trainable; the old name works up to release" in caplog.text


def test_other_ranks_leave_the_warning_to_the_first(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    assert parsed(monkeypatch, "--model.learn", "norms").model.trainable == "norms"
    assert not old_names(caplog)


def test_an_old_run_file_works_with_a_warning_and_the_command_line_wins(monkeypatch, caplog, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {keep_every: 2}\ntrain: {image_rows_only: false, l2_to_init: 0.5}\n")
    config = parsed(monkeypatch, "--config", str(file), "--train.l2-sp", "0.25")
    assert (config.data.subsample_every, config.train.image_vocab_only, config.train.l2_sp) == (
        2,
        False,
        0.25,
    )
    assert old_names(caplog) == ["data.keep_every", "train.image_rows_only", "train.l2_to_init"]


OLD_STUDY = """
title: Old
question: Is it read?
seeds: [0]
assumed: {text_rows: 512}
settings: {train: {eval_pictures: 8}}
steps:
  - {name: first, command: launchers/train.py, flags: {data: {keep_every: 2}}}
arms:
  few: {data: {keep_every: 4}}
  frozen: {model: {learn: norms}}
"""
NEW_STUDY = """
title: Old
question: Is it read?
seeds: [0]
assumed: {text_vocab_size: 512}
settings: {train: {eval_images: 8}}
steps:
  - {name: first, command: launchers/train.py, flags: {data: {subsample_every: 2}}}
arms:
  few: {data: {subsample_every: 4}}
  frozen: {model: {trainable: norms}}
"""


def study_of(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    return read_study(tmp_path / "study.yaml")


def test_an_old_study_is_the_same_study(tmp_path, caplog):
    old = study_of(tmp_path, OLD_STUDY)
    assert set(old_names(caplog)) == {"text_rows", "train.eval_pictures", "data.keep_every", "model.learn"}
    new = study_of(tmp_path, NEW_STUDY)
    assert old == new
    assert jobs_of(old, out=tmp_path) == jobs_of(new, out=tmp_path)
    config = run_config(old, arm="few", seed=0, out=tmp_path)
    assert (config.data.subsample_every, config.train.eval_images) == (4, 8)
    assert PlanConfig(**old.assumed).text_vocab_size == 512


def test_a_study_refuses_a_value_by_arm_and_key(tmp_path):
    with pytest.raises(
        UserError, match=r"study\.yaml: arm few: data\.subsample_every is 0; expected a whole number"
    ):
        study_of(tmp_path, NEW_STUDY.replace("subsample_every: 4", "subsample_every: 0"))


def test_a_job_that_was_done_with_old_flags_is_not_done_again(tmp_path):
    study = study_of(tmp_path, NEW_STUDY)
    (tmp_path / "jobs").mkdir()
    record = '{"state": "done", "command": ["x.py", "--data.keep_every", "2"]}'
    (tmp_path / "jobs" / "first.json").write_text(record)
    job = Job("first", ["x.py", "--data.subsample_every", "2"])
    assert work(lambda: [job], study=study, out=tmp_path)["first"].state == "done"
    with pytest.raises(UserError, match="first was done with another command"):
        work(
            lambda: [replace(job, command=["x.py", "--data.subsample_every", "3"])], study=study, out=tmp_path
        )


OF_OLD_FOLDER = RunConfig(
    data=DataConfig(subsample_every=2, replay_ratio=0.25, replay_shards=Path("data/text")),
    model=ModelConfig(
        init="runs/language-model", new_embeddings="mean", control_init="moments", trainable="norms"
    ),
    train=TrainConfig(new_embeddings_lr=0.003, l2_sp=0.5, image_vocab_only=True, eval_images=64),
)


def test_a_folder_of_the_last_release_resumes_and_has_the_new_names_then(tmp_path, caplog):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / RESOLVED).write_text(OLD_FOLDER.read_text())
    append_metrics(run_dir, {"step": 1})
    config = replace(OF_OLD_FOLDER, run_dir=run_dir)
    assert read_settings(run_dir)["data"]["subsample_every"] == 2  # as reports read it
    with pytest.raises(
        UserError, match=r"begun with other settings \(data\.subsample_every is 2 there, 3 here\)"
    ):
        open_run(replace(config, data=replace(config.data, subsample_every=3)), ds_config={})
    caplog.clear()
    open_run(config, ds_config={}).close()
    assert [one.getMessage() for one in caplog.records] == [
        f"{run_dir / RESOLVED} has old names of settings, which are read up to release {renamed.LAST_RELEASE}."
    ]
    record_run(config, ds_config={})  # once its checkpoint fits
    assert yaml.safe_load((run_dir / RESOLVED).read_text()) == plain(config)
    open_run(config, ds_config={}).close()
    assert len(caplog.records) == 1


def test_a_folder_of_the_last_release_can_be_given_as_a_run_file(monkeypatch, caplog):
    values = yaml.safe_load(OLD_FOLDER.read_text())
    words = [  # None cannot be told from a word in a run file, so unset keys are left out
        word
        for group in ("data", "model", "train")
        for key, value in values[group].items()
        if not isinstance(value, bool) and value is not None and value != ""
        for word in (f"--{group}.{key}", str(value))
    ]
    config = read_flags(RunConfig, [*words, "--train.image-rows-only"])
    assert replace(config, run_dir=OF_OLD_FOLDER.run_dir) == OF_OLD_FOLDER
    assert set(old_names(caplog)) == {old for old in RENAMED if "." in old}


def test_the_warning_reaches_the_terminal_beside_a_refusal():
    words = [sys.executable, "launchers/train.py", "--model.learn", "norms", "--train.lr", "-1"]
    done = processes.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"model.learn is now model.trainable; the old name works up to release {renamed.LAST_RELEASE}.",
        "train.lr is -1.0; expected a number >= 0.",
    ]
