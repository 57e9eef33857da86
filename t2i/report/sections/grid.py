"""Arms of a grid of runs as a law sees them: their sizes, ages and held-out losses."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2i.errors import UserError
from t2i.report.sections.section import in_folder
from t2i.study.cost import run_costs
from t2i.study.jobs import run_name, step_config
from t2i.study.law import Cells
from t2i.study.results import Curve, curve, read_rows, runs_of, tokens_spent
from t2i.study.spec import TRAIN, Study


def places_of(arms: dict[str, list[int]]) -> list[tuple[str, int]]:
    """List arm and step of cells, in their order."""
    return [(arm, step) for arm, steps in arms.items() for step in steps]


@dataclass(frozen=True)
class Grid:
    """Arms by what the law knows of them, and their held-out losses."""

    parameters: dict[str, float]
    """FLOPs of a trained token over 6."""
    ages: dict[str, float]
    curves: dict[str, Curve]
    """Of arms with finished runs."""

    def cells(self, arms: dict[str, list[int]]) -> Cells:
        """Make cells of arms at steps."""
        places = places_of(arms)
        tokens = self.tokens()
        return Cells(
            np.array([self.parameters[arm] for arm, _ in places]),
            np.array([float(tokens[step]) for _, step in places]),
            np.array([self.ages[arm] for arm, _ in places]),
        )

    def has(self, arm: str, step: int, *, seeds: Iterable[int] = ()) -> bool:
        """Say whether an arm was measured at a step, by each of some seeds."""
        one = self.curves.get(arm)
        return one is not None and step in one.steps and set(seeds) <= set(one.seeds)

    def losses(self, arms: dict[str, list[int]], *, seeds: list[int]) -> np.ndarray:
        """Collect the losses of cells, as means over seeds, (M,)."""
        # Over the same seeds everywhere: what a seed does, it does to all arms alike.
        found = []
        for arm, steps in arms.items():
            one = self.curves[arm]
            rows = one.values[[one.seeds.index(seed) for seed in seeds]]
            found.append(rows.mean(0)[[one.steps.index(step) for step in steps]])
        return np.concatenate(found)

    def tokens(self) -> dict[int, int]:
        """Map measured steps to tokens."""
        # Of all arms, which see the same sequences in the same order, though some for more steps. The first one's where
        # they differ, as those of an arm do that lacks the first seed: so predictions stay when others are finished.
        found: dict[int, int] = {}
        for one in self.curves.values():
            for step, tokens in zip(one.steps, one.tokens, strict=True):
                found.setdefault(step, tokens)
        return found


def read_grid(study: Study, out: Path, *, ages: dict[str, str | float], value: str) -> Grid:
    """Read arms and their finished runs.

    Args:
        ages: arm -> tokens of text that its start had seen, or the folder of the run that made it.
        value: key of metrics.jsonl.
    """
    costs = {one.name: one for one in run_costs(study, out=out)}
    own = {arm: costs[run_name(arm, study.seeds_of(arm)[0])] for arm in ages}
    # By plan, done or not: cells are predicted before the steps that only these cells need.
    planned = {
        step_config(step, out=out).run_dir: costs[step.name].tokens
        for step in study.steps
        if step.command == TRAIN
    }
    curves = {arm: curve(runs_of(study, arm=arm, out=out), value=value, split="heldout") for arm in ages}
    return Grid(
        parameters={arm: one.flops / one.tokens / 6 for arm, one in own.items()},
        ages={arm: _age(age, out, planned=planned) for arm, age in ages.items()},
        curves={arm: one for arm, one in curves.items() if one is not None},
    )


def _age(age: str | float, out: Path, *, planned: dict[Path, int]) -> float:
    if isinstance(age, int | float):
        return float(age)
    folder = in_folder(age, out)
    if folder in planned:
        return float(planned[folder])
    if not (spent := tokens_spent(read_rows(folder))):
        raise UserError(f"law: {folder} is no run that has trained; ages names it.")
    return float(spent)
