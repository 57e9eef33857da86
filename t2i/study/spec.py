"""What a study file says: steps that run once, training runs of arms and seeds, measures of runs, and a report.

`base: OTHER.yaml` takes the settings and steps of another study file, key by key, and works in that study's folder.
What both name alike is done once. A step that is only a name is the base's step of that name. `{out}` in any string is
the study's folder. In a measure, `{run}` is the folder of the run that it measures.

Everything here is checked when the file is read, so that a slip in the last section costs no training run.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from t2i.cli import is_kind, shown
from t2i.config import PlanConfig, RunConfig
from t2i.config.renamed import with_new_keys
from t2i.errors import UserError
from t2i.files import read_yaml
from t2i.settings import expected, hints_of
from t2i.shipped import in_checkout
from t2i.study.kinds import misfit

TRAIN = "launchers/train.py"
BY_ARM = ("ages", "held_out", "charged")
"""Arguments of sections that are mappings of arms."""
INHERITED = ("seeds", "ds_config", "launch", "settings", "assumed", "tuning", "steps")
"""Keys that a study takes from its base. Arms, measures and sections are its own, for they are its question."""

Setting = bool | int | float | str | None | list["Setting"] | dict[str, "Setting"]
"""A value of YAML."""
Settings = dict[str, Setting]
"""Nested as in a run file: {train: {max_steps: 200}}."""


@dataclass(frozen=True)
class Step:
    """A command that runs once, before all training runs."""

    name: str
    command: str
    """Script, from the repository's root; behind it its word, where it has several: `launchers/tokenizer.py train`."""
    flags: Settings = field(default_factory=dict)
    needs: list[str] | None = None
    """Steps that must be done before; None for all that are listed before."""


@dataclass(frozen=True)
class Measure:
    """A command that runs on finished training runs."""

    name: str
    command: str
    flags: Settings = field(default_factory=dict)
    at: str = ""
    """The part of the run to measure, such as checkpoints/step_000500; empty for its latest checkpoint."""
    arms: list[str] = field(default_factory=list)
    """Empty for every arm."""
    seeds: list[int] = field(default_factory=list)
    """Empty for every seed."""


@dataclass(frozen=True)
class Tuning:
    """A setting whose best value is found for each arm before its runs, on a seed that they do not have."""

    seed: int
    values: list[float]
    key: str = "train.lr"
    settings: Settings = field(default_factory=dict)
    """Settings of these trials, which override the study's and the arm's, such as fewer steps."""
    loss: str = "image_loss"
    """The held-out value that is to be lowest at the end."""


@dataclass(frozen=True)
class SectionSpec:
    """An entry of the report: the kind of section and its arguments."""

    section: str
    """A kind; docs/running_studies.md lists them."""
    title: str = ""
    """Empty for the kind's own."""
    paper: str = ""
    """What the paper found, shown beside what is found here."""
    arguments: Settings = field(default_factory=dict)
    """Arguments of the kind's function, by name."""

    def arms(self) -> list[str]:
        """List the arms that the section names: alone, in pairs, or as keys of what it says of each."""
        pairs = self.arguments.get("pairs")
        named = list(pairs.values()) if isinstance(pairs, dict) else pairs
        lists = [self.arguments.get("arms"), *(named if isinstance(named, list) else [])]
        given = [self.arguments.get(name) for name in BY_ARM]
        keys = [arm for one in given if isinstance(one, dict) for arm in one]
        return [str(arm) for one in (*lists, keys) if isinstance(one, list) for arm in one]


@dataclass(frozen=True)
class Study:
    """What a study file says."""

    file: Path
    title: str
    question: str
    arms: dict[str, Settings]
    """Settings of each arm, which override `settings`."""
    base: "Study | None" = None
    """The study whose steps, settings and folder this one shares."""
    seeds: list[int] = field(default_factory=lambda: [0])
    arm_seeds: dict[str, list[int]] = field(default_factory=dict)
    """Seeds of arms that differ from `seeds`."""
    ds_config: str = "ds_configs/zero2_fp32.json"
    launch: list[str] = field(default_factory=list)
    """Words before a training script, such as [deepspeed, --num_gpus, "8"]; empty for this Python."""
    settings: Settings = field(default_factory=dict)
    """Settings of all runs, as a run file holds them."""
    assumed: Settings = field(default_factory=dict)
    """What --plan assumes of shards that are not made yet, by PlanConfig's names; the embedded ones by default."""
    tuning: Tuning | None = None
    """None for runs that take their settings as they are written."""
    steps: list[Step] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    report: list[SectionSpec] = field(default_factory=list)

    def default_out(self) -> Path:
        """Return the folder of its runs, which is its base's."""
        return Path("runs") / (self.base or self).file.stem

    def report_dir(self, out: Path) -> Path:
        """Return where the report goes: a study in its base's folder has a folder of its own there."""
        return out / self.file.stem if self.base else out

    def seeds_of(self, arm: str) -> list[int]:
        """Return an arm's seeds."""
        return self.arm_seeds.get(arm, self.seeds)

    def runs(self) -> list[tuple[str, int]]:
        """List arms and seeds, seed by seed, so that a study cut short still has paired arms."""
        return [(arm, seed) for seed in self.all_seeds() for arm in self.arms if seed in self.seeds_of(arm)]

    def all_seeds(self) -> list[int]:
        """List the seeds of all arms, each once."""
        return sorted({seed for arm in self.arms for seed in self.seeds_of(arm)})


Made = TypeVar("Made", Step, Measure, Tuning, Study)


def read_spec(file: Path) -> Study:
    """Read a study file, and check its names: keys, settings, steps and arms.

    Raises:
        UserError: the file is no YAML, or has an unknown key or an undefined name.
    """
    # The YAML of a stranger until _made has checked every name of it.
    values: dict[str, Any] = _in_new_spelling(read_yaml(file, name=str(file)))
    base = _read_base(values.pop("base", None), file=file)
    if base is not None:
        values = _with_base(values, base, file)
    for key in ("steps", "measures", "report"):
        if said := misfit(values.get(key, []), list[object], name=key):
            raise UserError(f"{file}: {said}")
    values["steps"] = _listed(Step, values.get("steps", []), file)
    values["measures"] = _listed(Measure, values.get("measures", []), file)
    if values.get("tuning") is not None and not isinstance(values["tuning"], Tuning):
        values["tuning"] = _made(Tuning, values["tuning"], file)
    values["report"] = [_section(one, file) for one in values.get("report", [])]
    study = _made(Study, {**values, "file": file}, file)
    _check_steps(study)
    trials = {"tuning": study.tuning.settings} if study.tuning else {}
    for name, settings in {"settings": study.settings, **trials, **study.arms}.items():
        check_settings(settings, where=f"{file}: {name}")
    check_settings(study.assumed, where=f"{file}: assumed", kind=PlanConfig)
    _check_arms(study, list(study.arm_seeds), where="arm_seeds")
    for arm in study.arms:
        # Counted as two, one seed would make an interval of itself.
        if not (seeds := study.seeds_of(arm)):
            raise UserError(f"{file}: arm {arm} has no seeds; expected at least one, in seeds or arm_seeds.")
        if len(seeds) > len(set(seeds)):
            raise UserError(f"{file}: arm {arm} has the seeds {seeds}; expected each once.")
    for measure in study.measures:
        _check_arms(study, measure.arms, where=f"measures: {measure.name}")
    for section in study.report:
        _check_arms(study, section.arms(), where=f"report: {section.section}")
    return study


def with_ds_config(study: Study, ds_config: str) -> Study:
    """Train by another DeepSpeed JSON: runs, and the steps that name the study's own one."""

    # A study that stands on another has the steps of that one too.
    own = {in_checkout(Path(one.ds_config)) for one in (study, study.base) if one}

    def changed(step: Step) -> Step:
        is_own = in_checkout(Path(str(step.flags.get("ds_config", "")))) in own
        return replace(step, flags={**step.flags, "ds_config": ds_config}) if is_own else step

    base = with_ds_config(study.base, ds_config) if study.base else None
    return replace(study, ds_config=ds_config, steps=[changed(step) for step in study.steps], base=base)


def check_settings(settings: Settings, *, where: str, kind: type = RunConfig, prefix: str = "") -> None:
    """Check that settings have names that a run knows, and suggest the nearest one otherwise.

    tyro would refuse them too, but arm by arm, and its messages name flags and not the file.

    Raises:
        UserError: the first name that a run does not have.
    """
    known, hints = {one.name: one.type for one in fields(kind)}, hints_of(kind)
    for key, value in settings.items():
        name = key.replace("-", "_")  # as on the command line, where both spellings are read
        if name not in known:
            right = nearest_name(f"{prefix}{name}", [f"{prefix}{one}" for one in known])
            raise UserError(f"{where} has the setting {prefix}{key}, which is not known; {right}.")
        group = known[name]
        if isinstance(group, type) and is_dataclass(group) and isinstance(value, dict):
            check_settings(value, where=where, kind=group, prefix=f"{prefix}{name}.")
        elif is_dataclass(group) or not is_kind(value, hints[name]):
            wanted = "settings of its own" if is_dataclass(group) else expected(hints[name])
            raise UserError(f"{where}: {prefix}{key} is {shown(value)}; expected {wanted}.")


def nearest_name(name: str, known: list[str]) -> str:
    """Suggest the nearest known name, or list all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"perhaps {close[0]} was meant" if close else f"known are {', '.join(known)}"


def _in_new_spelling(values: dict[str, object]) -> dict[str, object]:
    """Rename the settings of runs, plans, steps and measures; what has the wrong form is refused later."""

    def renamed(given: object) -> object:
        return with_new_keys(given) if isinstance(given, dict) else given

    def with_flags(job: object) -> object:
        return {**job, "flags": renamed(job["flags"])} if isinstance(job, dict) and "flags" in job else job

    values = {
        key: renamed(value) if key in ("settings", "assumed") else value for key, value in values.items()
    }
    if isinstance(arms := values.get("arms"), dict):
        values["arms"] = {arm: renamed(settings) for arm, settings in arms.items()}
    for key in ("steps", "measures"):
        if isinstance(jobs := values.get(key), list):
            values[key] = [with_flags(job) for job in jobs]
    return values


def _read_base(name: Setting, *, file: Path) -> Study | None:
    """Read the study that `base` names, a file in the same folder."""
    if name is None:
        return None
    path = file.parent / str(name)
    if not path.is_file():
        raise UserError(f"{file}: base is {name}, which is not in the same folder.")
    # One level: a folder that a chain of files shares would be hard to follow, and a chain may have no end.
    if "base" in read_yaml(path, name=str(path)):
        raise UserError(f"{file}: base is {name}, which has a base itself; name that one.")
    return read_spec(path)


def _with_base(values: dict[str, object], base: Study, file: Path) -> dict[str, object]:
    """Fill in what a study leaves to its base; a step that is only a name is the base's step of that name."""
    known = {step.name: vars(step) for step in base.steps}
    steps = list(known) if values.get("steps") is None else values["steps"]
    if not isinstance(steps, list):
        raise UserError(f"{file}: steps is {steps!r}; expected a list.")
    if missing := [one for one in steps if isinstance(one, str) and one not in known]:
        right = nearest_name(missing[0], list(known))
        raise UserError(f"{file}: steps has {missing[0]}, which is no step of {base.file.name}; {right}.")
    named = {**values, "steps": [known[one] if isinstance(one, str) else one for one in steps]}
    return {key: getattr(base, key) for key in INHERITED} | named | {"base": base}


def _section(values: object, file: Path) -> SectionSpec:
    """Split an entry of the report into the names that all kinds have and its kind's own arguments."""
    if not isinstance(values, dict):
        raise UserError(f"{file}: a section is {values!r}; expected names with values.")
    shared = {key: values[key] for key in ("section", "title", "paper") if key in values}
    for key, value in shared.items():
        if said := misfit(value, str, name=key):
            raise UserError(f"{file}: a section: {said}")
    return SectionSpec(
        **{"section": "", **shared},
        arguments={key: value for key, value in values.items() if key not in shared},
    )


def _listed(kind: type[Made], entries: list[object], file: Path) -> list[Made]:
    return [_made(kind, one, file, place=place) for place, one in enumerate(entries, start=1)]


def _made(kind: type[Made], values: object, file: Path, *, place: int = 0) -> Made:
    """Make one entry from the values in the file.

    Args:
        place: where it stands in its list, from 1; 0 if it stands in none.
    """
    what, known = kind.__name__.lower(), {one.name: one.type for one in fields(kind)}
    what = f"{what} {place}" if place else f"a {what}"
    if not isinstance(values, dict):
        raise UserError(f"{file}: {what} is {values!r}; expected names with values.")
    unknown = sorted(set(map(str, values)) - known.keys())
    if unknown:
        right = nearest_name(unknown[0], sorted(known))
        others = f" Unknown too: {', '.join(unknown[1:])}." if unknown[1:] else ""
        raise UserError(f"{file}: unknown key {unknown[0]} of {what}; {right}.{others}")
    for key, value in values.items():
        if said := misfit(value, known[key], name=str(key)):
            raise UserError(f"{file}: {'' if kind is Study else f'{what}: '}{said}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{file}: {what} is incomplete: {error}.") from error


def _check_steps(study: Study) -> None:
    # Only on steps before it: a list in the order of work can have no cycle.
    before: list[str] = []
    for step in study.steps:
        for name in step.needs or []:
            if name not in before:
                raise UserError(f"{study.file}: step {step.name} needs {name}, which is no step before it.")
        before.append(step.name)


def _check_arms(study: Study, arms: list[str], *, where: str) -> None:
    unknown = sorted(set(arms) - set(study.arms))
    if unknown:
        right = nearest_name(unknown[0], list(study.arms))
        raise UserError(f"{study.file}: {where} names arm {unknown[0]}; {right}.")
