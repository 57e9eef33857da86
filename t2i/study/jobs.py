"""The jobs of a study: processes with their commands, what they wait for, and how they ended."""

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from t2i.cli import flags_of_mapping, read_flags
from t2i.config import RunConfig
from t2i.errors import NumericalError, UserError
from t2i.files import read_optional_json, write_json
from t2i.shipped import find_shipped, in_checkout
from t2i.study.spec import TRAIN, Setting, Settings, Step, Study, read_spec, with_ds_config
from t2i.study.tuning import (
    check_tuning,
    trial_dir,
    trial_name,
    trials,
    tuned_flags,
    tuning_of,
    untuned_reason,
)

NAME = re.compile(r"\w[\w.+-]*")
OUTPUTS = ("out", "run_dir")
"""Flags of steps that name what they make."""


@dataclass(frozen=True)
class Job:
    """One process of a study."""

    name: str
    command: list[str]
    """Script and flags; the runner puts the interpreter or launcher before them."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done first."""
    run_dir: Path | None = None
    """The run folder of a job that trains; None for other jobs."""
    done_codes: tuple[int, ...] = (0,)
    """Exit statuses with which it is done."""
    refusal: str = ""
    """Why it cannot be run once its needs are met, nor its command be known; empty if it can."""


@dataclass(frozen=True)
class Record:
    """How a job ended."""

    state: str = "open"
    """open, done, failed or skipped."""
    code: int | None = None
    """Exit status; None where no process was started."""
    seconds: float | None = None
    """Time that all its processes took, those that were stopped or failed too; None where there was none."""
    command: tuple[str, ...] = ()
    reason: str = ""
    """Why it was skipped, or could not be run."""
    attempt: str = ""
    """Random name of this try, by which others see that there was one; empty for an open job."""
    time: float | None = None
    """When this was written, in seconds since 1970, for people alone; None for an open job."""


def read_study(file: Path, *, ds_config: str = "") -> Study:
    """Read a study file and check everything before anything runs.

    Args:
        ds_config: DeepSpeed's JSON in place of the file's own; empty for that.

    Raises:
        UserError: what read_spec refuses, settings that a run does not know, or jobs that contradict each other.
    """
    study = read_spec(file)
    if ds_config:
        study = with_ds_config(study, ds_config)
    check_tuning(study)
    if study.base:
        _check_losses(study.base)
    _check_losses(study)
    _check_jobs(study)
    if study.base:
        _check_shared(study, study.base)
    return study


def jobs_of(study: Study, *, out: Path) -> list[Job]:
    """List a study's jobs in the order that one worker does them: steps, trials, runs, measures.

    Runs take the values that the trials have chosen by now.
    """
    jobs: list[Job] = []
    for step in study.steps:
        command = [*_words(step.command), *flags_of_mapping(filled(step.flags, out=out))]
        # Without `needs` a step waits for all before it: right for a list read from top to bottom, if not the quickest.
        before = tuple(job.name for job in jobs)
        needed = before if step.needs is None else tuple(step.needs)
        trains = step_config(step, out=out).run_dir if step.command == TRAIN else None
        jobs.append(Job(step.name, command, needs=needed, run_dir=trains))
    made = {step.name: _made_within(step, out) for step in study.steps}
    jobs += [_trial_job(study, arm, value, out=out, made=made) for arm, value in trials(study)]
    jobs += [_run_job(study, arm, seed, out=out, made=made) for arm, seed in study.runs()]
    for measure in study.measures:
        for arm in measure.arms or study.arms:
            for seed in measure.seeds or study.seeds_of(arm):
                name, run = run_name(arm, seed), run_dir(out, arm, seed)
                flags = flags_of_mapping(filled(measure.flags, out=out, run=run))
                command = [*_words(measure.command), str(run / measure.at), *flags]
                needs = (name, *_steps_named(command, made))
                jobs.append(Job(f"{measure.name}-{name}", command, needs=needs))
    return jobs


def _words(command: str) -> list[str]:
    """Split a script from its word; an empty command stays one, so that it is missed by name."""
    return command.split() or [command]


def changed_words(command: list[str], before: list[str]) -> str:
    """List the words in which two commands differ; empty if they say the same."""
    if command == before or _said(command) == _said(before):
        return ""
    # In order: two settings may have exchanged their values, and then both commands have the same words.
    places = SequenceMatcher(None, before, command, autojunk=False).get_opcodes()
    return " ".join(
        word
        for kind, *there, first, last in places
        if kind != "equal"
        for word in (*before[slice(*there)], *command[first:last])
    )


def _said(command: list[str]) -> dict[str, list[str]]:
    """Group a command's words by flag, whatever order flags stand in and however a place is spelled."""
    found: dict[str, list[str]] = {"": []}
    key = ""
    for word in command:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            key = flag.replace("--no-", "--").replace(".no-", ".")
            found[key] = [flag, *([_place(value)] if equals else [])]  # the last of two equal flags counts
        else:
            found[key].append(_place(word))
    return found


def _place(word: str) -> str:
    """Spell a word that may name a file or a folder, also behind a prefix as in text:PATH, in one way."""
    parts = (str(in_checkout(Path(part))) if part else part for part in word.split(":"))
    return ":".join(os.path.realpath(part) if "/" in part else part for part in parts)


def run_name(arm: str, seed: int) -> str:
    """Name one run."""
    return f"{arm}-seed{seed}"


def run_dir(out: Path, arm: str, seed: int) -> Path:
    """Return the folder of one run."""
    return out / "runs" / run_name(arm, seed)


def run_config(study: Study, *, arm: str, seed: int, out: Path) -> RunConfig:
    """Read one run's settings as the training command will.

    Raises:
        UserError: a key or a value that a run does not take; tyro has printed which.
    """
    return _parsed(_run_flags(study, arm, seed, out=out), where=f"{study.file}: arm {arm}")


def trial_config(study: Study, *, arm: str, value: float, out: Path) -> RunConfig:
    """Read one trial's settings as the training command will."""
    return _parsed(_trial_flags(study, arm, value, out=out), where=f"{study.file}: trials of {arm}")


def step_config(step: Step, *, out: Path) -> RunConfig:
    """Read the settings of a step that trains, as the training command will.

    Raises:
        UserError: a key or a value that a run does not take; tyro has printed which.
    """
    # --ds_config is the launcher's, not one of a run's settings.
    flags = {key: value for key, value in filled(step.flags, out=out).items() if key != "ds_config"}
    return _parsed(flags_of_mapping(flags), where=f"step {step.name}")


def filled(flags: Settings, *, out: Path, run: Path | None = None) -> Settings:
    """Replace `{out}` in the strings of nested values, and `{run}` where there is one, in measures."""
    return {key: _filled(value, out=out, run=run) for key, value in flags.items()}


def read_record(out: Path, name: str) -> Record:
    """Read a job's record; its state is open if there is none."""
    values = read_optional_json(_record_file(out, name))
    known = {key: value for key, value in values.items() if key in Record.__dataclass_fields__}
    return Record(**{**known, "command": tuple(values.get("command", ()))}) if values else Record()


def write_record(out: Path, name: str, record: Record) -> None:
    """Write a job's record, without the fields that do not apply."""
    # A record is a file per job, written whole: workers on other machines read it without any lock.
    values = {key: value for key, value in vars(record).items() if value not in (None, "", ())}
    write_json(_record_file(out, name), values)


def _record_file(out: Path, name: str) -> Path:
    return out / "jobs" / f"{name}.json"


def outputs_of(step: Step, *, out: Path) -> list[Path]:
    """List the folders that a step says it makes."""
    flags = filled(step.flags, out=out)
    return [Path(str(flags[name])) for name in OUTPUTS if name in flags]


def _made_within(step: Step, out: Path) -> list[Path]:
    """List the folders that a step makes within the study's."""
    return [path.resolve() for path in outputs_of(step, out=out) if out in path.parents]


def _steps_named(command: list[str], made: dict[str, list[Path]]) -> tuple[str, ...]:
    """List the steps whose folders a command names, and those that make nothing within the study's folder.

    A word names a folder that it is, or that is within or around it, also behind a prefix: `text:PATH`.
    """
    named = {Path(one).resolve() for word in command for one in (word, *re.split("[:=,]", word)) if one}
    around = named.union(*(one.parents for one in named))

    def is_named(folder: Path) -> bool:
        return folder in around or not named.isdisjoint(folder.parents)

    # What is made elsewhere may be a setting's default, or in a file that a setting names.
    return tuple(step for step, folders in made.items() if not folders or any(map(is_named, folders)))


def _run_job(study: Study, arm: str, seed: int, *, out: Path, made: dict[str, list[Path]]) -> Job:
    flags = _run_flags(study, arm, seed, out=out)
    command = [TRAIN, "--ds_config", study.ds_config, *flags]
    needs = _steps_named(command, made)
    needs += tuple(trial_name(one, value) for one, value in trials(study) if one == arm)
    refusal = untuned_reason(study, arm=arm, out=out)
    return Job(run_name(arm, seed), command, needs=needs, run_dir=run_dir(out, arm, seed), refusal=refusal)


def _trial_job(study: Study, arm: str, value: float, *, out: Path, made: dict[str, list[Path]]) -> Job:
    command = [TRAIN, "--ds_config", study.ds_config, *_trial_flags(study, arm, value, out=out)]
    # A loss that is not finite is a trial's answer, which a second try would give again.
    codes = (0, NumericalError.exit_code)
    name, folder = trial_name(arm, value), trial_dir(out, arm, value)
    needs = _steps_named(command, made)
    return Job(name, command, needs=needs, run_dir=folder, done_codes=codes)


def _trial_flags(study: Study, arm: str, value: float, *, out: Path) -> list[str]:
    """Write a trial's settings as flags: those of all runs, the arm's, the tuning's, then what it tries."""
    tuning = tuning_of(study)
    settings = (study.settings, study.arms[arm], tuning.settings)
    flags = [flag for one in settings for flag in flags_of_mapping(filled(one, out=out))]
    tried = [f"--{tuning.key.replace('_', '-')}", f"{value:g}", "--train.seed", str(tuning.seed)]
    return ["--run-dir", str(trial_dir(out, arm, value)), *flags, *tried]


def _run_flags(study: Study, arm: str, seed: int, *, out: Path) -> list[str]:
    """Write settings as flags: those of all runs, then the arm's, then the seed."""
    shared, own = (
        flags_of_mapping(filled(settings, out=out)) for settings in (study.settings, study.arms[arm])
    )
    # The last of two equal flags wins, so the arm's settings override the shared ones. The seed comes last: arms of
    # one seed then share data order and start, which is what pairs them.
    own += tuned_flags(study, arm=arm, out=out)
    return ["--run-dir", str(run_dir(out, arm, seed)), *shared, *own, "--train.seed", str(seed)]


def _parsed(flags: list[str], *, where: str) -> RunConfig:
    try:
        return _read_run(tuple(flags))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except SystemExit as error:  # tyro has printed which flag, and exits as if this were the training command
        raise UserError(f"{where} has settings that {TRAIN} does not take.") from error


@functools.cache  # a study asks for each run's settings several times, and tyro takes 0.1 seconds for one answer
def _read_run(flags: tuple[str, ...]) -> RunConfig:
    return read_flags(RunConfig, flags)


def _filled(value: Setting, *, out: Path, run: Path | None) -> Setting:
    if isinstance(value, dict):
        return filled(value, out=out, run=run)
    if isinstance(value, list):
        return [_filled(one, out=out, run=run) for one in value]
    if isinstance(value, str):
        value = value.replace("{out}", str(out))
        return value if run is None else value.replace("{run}", str(run))
    return value


def _check_losses(study: Study) -> None:
    """Read every arm's settings, and refuse arms whose image losses are different quantities.

    Raises:
        UserError: settings that a run does not have, or train.image_vocab_only in some arms and not in others.
    """
    configs = {name: run_config(study, arm=name, seed=0, out=Path("out")) for name in study.arms}
    restricted = [name for name, config in configs.items() if config.train.image_vocab_only]
    # A softmax over image codes alone does not pay for excluding words, so its loss is lower without being better.
    if restricted and len(restricted) < len(configs):
        raise UserError(
            f"{study.file}: train.image_vocab_only is set in {', '.join(restricted)} alone; its image losses do not"
            " compare with those over the whole vocabulary. Set it for all arms, or make two studies."
        )


def _check_jobs(study: Study) -> None:
    """Refuse jobs that could not run: by their names, what they need, and the values that trials try."""
    jobs = jobs_of(study, out=Path("out"))
    counts = Counter(job.name for job in jobs)
    for job in jobs:
        # Each job has a record, a lock and a log.
        if not NAME.fullmatch(job.name):
            raise UserError(
                f"{study.file}: {job.name!r} is no name of a job; expected letters, digits, ., _, + and -."
            )
        if counts[job.name] > 1:
            raise UserError(
                f"{study.file} has {counts[job.name]} jobs named {job.name}; give each arm, step and measure a name of"
                " its own."
            )
        if missing := [name for name in job.needs if name not in counts]:
            raise UserError(f"{study.file}: {job.name} needs {missing[0]}, which is no job of this study.")
    for arm, value in trials(study):
        mode = trial_config(study, arm=arm, value=value, out=Path("out")).data.mode
        loss = tuning_of(study).loss
        if (mode, loss) in (("text-only", "image_loss"), ("image-only", "text_loss")):
            raise UserError(
                f"{study.file}: tuning.loss is {loss}, of which arm {arm} has none: its data.mode is {mode}."
            )
    if not find_shipped(Path(study.ds_config)).is_file():
        raise UserError(
            f"{study.file}: ds_config is {study.ds_config}, which is neither here nor shipped with t2i."
        )


def _check_shared(study: Study, base: Study) -> None:
    """Refuse a job with the name of a base's job but another command, as both share a folder."""
    out = Path("out")  # any folder: the same one stands in both commands
    theirs = {job.name: job.command for job in jobs_of(base, out=out)}
    for job in jobs_of(study, out=out):
        if changed := changed_words(job.command, theirs.get(job.name, job.command)):
            raise UserError(
                f"{study.file}: {job.name} is another job in its base {base.file.name}, and both work in one folder"
                f" (differs in {changed}). Give the arm, step or measure a name of its own."
            )
