"""A study's YAML as jobs: every run and step with its command and what it waits for."""

from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from t2i.cli import flags_of_mapping
from t2i.config import RunConfig
from t2i.errors import UserError
from t2i.files import read_yaml
from t2i.study.spec import TRAIN, Measure, Step, Study, check_keys, nearest_name

INHERITED = ("seeds", "ds_config", "launch", "settings", "assumed", "steps")
"""Keys that a study takes from its base."""


@dataclass(frozen=True)
class Job:
    """One process of a study."""

    name: str
    command: list[str]
    """Script and flags; work.py puts the interpreter or launcher before them."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    run_dir: Path | None = None
    """Of a training run; None for others."""


def read_study(file: Path) -> Study:
    """Read a study file and check every arm's settings.

    Raises:
        UserError: no YAML, an unknown key, or settings that a run does not have.
    """
    values = read_yaml(file, name=str(file))
    base = _read_base(values, file)
    values = _with_base(values, base, file)
    values["steps"] = [_made(Step, one, file) for one in values.get("steps", [])]
    values["measures"] = [_made(Measure, one, file) for one in values.get("measures", [])]
    study: Study = _made(Study, {**values, "file": file}, file)
    _check_steps(study)
    for name, settings in {"settings": study.settings, **study.arms}.items():
        check_keys(settings, where=f"{study.file}: {name}")
    _check_losses(study)
    _known_arms(study, list(study.arm_seeds), where="arm_seeds")
    if base:
        _check_shared(study, base)
    for measure in study.measures:
        _known_arms(study, measure.arms, where=f"measures: {measure.name}")
    for section in study.report:
        pairs = section.get("pairs", [])
        named = pairs.values() if isinstance(pairs, dict) else pairs
        arms = [*section.get("arms", []), *chain.from_iterable(named)]
        _known_arms(study, arms, where=f"report: {section.get('section')}")
    return study


def jobs_of(study: Study, *, out: Path) -> list[Job]:
    """List a study's processes in the order of one worker."""
    jobs: list[Job] = []
    for step in study.steps:
        command = [step.command, *flags_of_mapping(filled(step.flags, out=out))]
        before = tuple(job.name for job in jobs)
        jobs.append(Job(step.name, command, needs=before if step.needs is None else tuple(step.needs)))
    needs = tuple(job.name for job in jobs)
    jobs += [_run_job(study, arm, seed, out=out, needs=needs) for arm, seed in study.runs()]
    for measure in study.measures:
        for arm in measure.arms or study.arms:
            for seed in measure.seeds or study.seeds_of(arm):
                name = run_name(arm, seed)
                words = filled({"flags": measure.flags}, out=out, run=run_dir(out, arm, seed))["flags"]
                measured = run_dir(out, arm, seed) / measure.at
                command = [measure.command, str(measured), *flags_of_mapping(words)]
                jobs.append(Job(f"{measure.name}-{name}", command, needs=(name,)))
    return jobs


def run_name(arm: str, seed: int) -> str:
    """Name one run."""
    return f"{arm}-seed{seed}"


def run_dir(out: Path, arm: str, seed: int) -> Path:
    """Return the folder of one run."""
    return out / "runs" / run_name(arm, seed)


def run_config(study: Study, *, arm: str, seed: int, out: Path) -> RunConfig:
    """Read one run's settings as the training command will.

    Raises:
        UserError: a key or a value that a run does not have; tyro has said which.
    """
    try:
        return tyro.cli(RunConfig, args=_run_flags(study, arm, seed, out=out))
    except SystemExit as error:
        raise UserError(f"{study.file}: arm {arm} has settings that {TRAIN} does not take.") from error


def _run_job(study: Study, arm: str, seed: int, *, out: Path, needs: tuple[str, ...]) -> Job:
    flags = _run_flags(study, arm, seed, out=out)
    command = [TRAIN, "--ds_config", study.ds_config, *flags]
    return Job(run_name(arm, seed), command, needs=needs, run_dir=run_dir(out, arm, seed))


def _run_flags(study: Study, arm: str, seed: int, *, out: Path) -> list[str]:
    """Write settings as flags: those of all runs, then the arm's, then the seed; arms differ in nothing else."""
    flags = flags_of_mapping(filled(study.settings, out=out)) + flags_of_mapping(
        filled(study.arms[arm], out=out)
    )
    return ["--run-dir", str(run_dir(out, arm, seed)), *flags, "--train.seed", str(seed)]


def filled(values: Any, *, out: Path, run: Path | None = None) -> Any:
    """Put folders into the strings of nested values."""
    if isinstance(values, dict):
        return {key: filled(value, out=out, run=run) for key, value in values.items()}
    if isinstance(values, list):
        return [filled(value, out=out, run=run) for value in values]
    if isinstance(values, str):
        return values.replace("{out}", str(out)).replace("{run}", str(run))
    return values


def _read_base(values: dict[str, Any], file: Path) -> Study | None:
    """Read the study that `base` names, another file beside it."""
    name = values.pop("base", None)
    if name is None:
        return None
    if not (file.parent / str(name)).is_file():
        raise UserError(f"{file}: base is {name}, which is not beside it.")
    base = read_study(file.parent / str(name))
    if base.base:
        raise UserError(f"{file}: base is {name}, which has a base itself; name that one.")
    return base


def _with_base(values: dict[str, Any], base: Study | None, file: Path) -> dict[str, Any]:
    """Take from its base what a study does not say of runs and steps; a step that is a name alone is the base's."""
    if base is None:
        return values
    known = {step.name: vars(step) for step in base.steps}
    steps = list(known) if values.get("steps") is None else values["steps"]
    if missing := [one for one in steps if isinstance(one, str) and one not in known]:
        right = nearest_name(missing[0], list(known))
        raise UserError(f"{file}: steps has {missing[0]}, which is no step of {base.file.name}; {right}.")
    values["steps"] = [known[one] if isinstance(one, str) else one for one in steps]
    return {key: getattr(base, key) for key in INHERITED} | values | {"base": base.file}


def _made(kind: Any, values: Any, file: Path) -> Any:
    known = {one.name for one in fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{file}: a {kind.__name__.lower()} is {values!r}; wanted are names with values.")
    unknown = sorted(set(values) - known)
    if unknown:
        right = nearest_name(unknown[0], sorted(known))
        raise UserError(f"{file}: unknown key {unknown[0]} of a {kind.__name__.lower()}; {right}.")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{file}: a {kind.__name__.lower()} is incomplete: {error}.") from error


def _check_losses(study: Study) -> None:
    """Read every arm's settings, and refuse arms whose image losses are different quantities.

    Raises:
        UserError: settings that a run does not have, or train.image_rows_only in some arms and not in others.
    """
    configs = {name: run_config(study, arm=name, seed=0, out=Path("out")) for name in study.arms}
    restricted = [name for name, config in configs.items() if config.train.image_rows_only]
    if restricted and len(restricted) < len(configs):
        raise UserError(
            f"{study.file}: train.image_rows_only is set in {', '.join(restricted)} alone; its image losses do not"
            " compare with those over all rows. Set it for all arms, or make two studies."
        )


def _check_shared(study: Study, base: Study) -> None:
    """Refuse a job that has the name of one of the base's but another command: they share a folder."""
    out = Path("out")
    theirs = {job.name: job.command for job in jobs_of(base, out=out)}
    for job in jobs_of(study, out=out):
        changed = sorted(set(job.command) ^ set(theirs.get(job.name, job.command)))
        if changed:
            raise UserError(
                f"{study.file}: {job.name} is another job in its base {base.file.name}, and both work in one folder"
                f" (differs in {' '.join(changed)}). Give the arm, step or measure a name of its own."
            )


def _check_steps(study: Study) -> None:
    before: list[str] = []
    for step in study.steps:
        for name in step.needs or []:
            if name not in before:
                raise UserError(f"{study.file}: step {step.name} needs {name}, which is no step before it.")
        before.append(step.name)


def _known_arms(study: Study, arms: list[str], *, where: str) -> None:
    unknown = sorted(set(arms) - set(study.arms))
    if unknown:
        right = nearest_name(unknown[0], list(study.arms))
        raise UserError(f"{study.file}: {where} names arm {unknown[0]}; {right}.")
