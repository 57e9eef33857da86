"""A study as YAML: steps that are done once, arms times seeds of training runs, measures of each run.

`base: OTHER.yaml` takes runs' settings and steps from another study file, key by key, and works in that study's folder:
what both name alike is done once. A step that is a name alone is the base's. `{out}` in any string is the study's
folder, `{run}` in a measure the folder of the run that it measures.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from t2i.config import RunConfig
from t2i.errors import UserError

TRAIN = "launchers/train.py"


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


def check_keys(settings: dict[str, Any], *, where: str, kind: Any = RunConfig, prefix: str = "") -> None:
    """Check that settings have the names of a run's, and name the nearest where one has not.

    Raises:
        UserError: the first name that a run does not have.
    """
    known = {one.name: one.type for one in fields(kind)}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in known:
            right = nearest_name(f"{prefix}{name}", [f"{prefix}{one}" for one in known])
            raise UserError(f"{where} has the setting {prefix}{key}, which {TRAIN} does not take; {right}.")
        group = known[name]
        if is_dataclass(group) and isinstance(value, dict):
            check_keys(value, where=where, kind=group, prefix=f"{prefix}{name}.")


def nearest_name(name: str, known: list[str]) -> str:
    """Say what somebody may have meant, or all that there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"perhaps {close[0]} was meant" if close else f"known are {', '.join(known)}"
