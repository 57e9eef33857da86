"""A study as YAML: steps that are done once, arms times seeds of training runs, measures of each run.

`base: OTHER.yaml` takes runs' settings and steps from another study file, key by key, and works in that study's folder:
what both name alike is done once. A step that is a name alone is the base's. `{out}` in any string is the study's
folder, `{run}` in a measure the folder of the run that it measures.
"""

from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from t2i.cli import flags_of_mapping
from t2i.config import RunConfig
from t2i.errors import UserError
from t2i.files import read_yaml
from t2i.study.names import TRAIN, check_keys, nearest_name

INHERITED = ("seeds", "ds_config", "launch", "settings", "assumed", "steps")
"""Keys that a study takes from its base."""


@dataclass(frozen=True)
class Step:
    """A command that is run once, before all runs."""

    name: str
    command: str
    """Script, from the repository's root."""
    flags: dict[str, Any] = field(default_factory=dict)
    needs: list[str] | None = None
    """Steps that must be done before; None for all that are listed before."""


@dataclass(frozen=True)
class Measure:
    """A command that is run on finished runs."""

    name: str
    command: str
    flags: dict[str, Any] = field(default_factory=dict)
    at: str = ""
    """What of the run is measured, such as checkpoints/step_000500; empty for its latest checkpoint."""
    arms: list[str] = field(default_factory=list)
    """Empty for every arm."""
    seeds: list[int] = field(default_factory=list)
    """Empty for every seed."""


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    file: Path
    title: str
    question: str
    arms: dict[str, dict[str, Any]]
    """Settings of each arm, over `settings`."""
    base: Path | None = None
    """The study that this one goes on from."""
    seeds: list[int] = field(default_factory=lambda: [0])
    arm_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Seeds of arms that have others than `seeds`."""
    ds_config: str = "ds_configs/zero2_fp32.json"
    launch: list[str] = field(default_factory=list)
    """Words before a training script, such as [deepspeed, --num_gpus, "8"]; empty for this Python."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs, as a run file holds them."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """What --plan takes of shards that are not made yet, by the names of PlanConfig; by default the embedded ones."""
    steps: list[Step] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    report: list[dict[str, Any]] = field(default_factory=list)
    """Sections: `section` names a kind, the rest are its arguments."""

    def default_out(self) -> Path:
        """Return the folder of its runs, which is its base's."""
        return Path("runs") / (self.base or self.file).stem

    def report_dir(self, out: Path) -> Path:
        """Return where the report goes: a study in its base's folder has a folder of its own there."""
        return out / self.file.stem if self.base else out

    def seeds_of(self, arm: str) -> list[int]:
        """Return an arm's seeds."""
        return self.arm_seeds.get(arm, self.seeds)

    def runs(self) -> list[tuple[str, int]]:
        """List arms and seeds, seed by seed, so that a study cut short still has paired arms."""
        seeds = sorted({seed for arm in self.arms for seed in self.seeds_of(arm)})
        return [(arm, seed) for seed in seeds for arm in self.arms if seed in self.seeds_of(arm)]


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
