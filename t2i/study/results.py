"""Finished runs as arrays, from which arms are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from t2i.data.loader import num_trained_on
from t2i.data.shards.manifest import MANIFEST, Manifest, read_manifest_file
from t2i.runs.loading import DATA_MANIFEST
from t2i.runs.metrics_log import MetricValue, read_metrics, step_of
from t2i.runs.run_folder import read_settings, read_status
from t2i.study.jobs import run_dir
from t2i.study.spec import Study

MOST = 1e300
"""Larger numbers of a row are left out."""

TRAIN_ROWS = "train"
"""The split of training rows, which metrics.jsonl leaves unnamed."""


@dataclass(frozen=True)
class Row:
    """One row of metrics.jsonl."""

    step: int
    split: str
    """train, or the split that a held-out row was measured on."""
    values: dict[str, float]
    """Numbers by key; what was not measured is left out."""


@dataclass(frozen=True)
class Run:
    """One training run's files."""

    folder: Path
    seed: int
    rows: list[Row]
    state: str
    """The state in status.json; empty for a run that has not begun."""
    reason: str
    """Why the run ended, if it failed or was stopped."""

    @property
    def is_done(self) -> bool:
        """Whether the run finished."""
        return self.state == "done"


@dataclass(frozen=True)
class Curve:
    """One value of one arm over training; columns are the steps that every seed has recorded."""

    steps: list[int]
    tokens: list[int]
    """Tokens trained on at each column, from the first seed, as all seeds have equal steps."""
    values: np.ndarray
    """(seeds, T)."""
    seeds: list[int]


def read_run(folder: Path, *, seed: int) -> Run:
    """Read a run's rows and how it ended."""
    status = read_status(folder)
    if status is None:
        return Run(folder, seed, read_rows(folder), state="", reason="")
    return Run(folder, seed, read_rows(folder), state=status.state, reason=status.reason)


def read_rows(folder: Path) -> list[Row]:
    """Read metrics.jsonl."""
    return [
        Row(
            step=step_of(row),
            split=str(row.get("split", TRAIN_ROWS)),
            # null is what was not measured, such as a split without samples; as a number it would bend a mean.
            values={key: value for key, value in row.items() if _is_number(value)},
        )
        for row in read_metrics(folder)
    ]


def _is_number(value: MetricValue) -> TypeGuard[float]:
    # Within what a figure can show: a damaged row may hold an integer that no float holds.
    return isinstance(value, int | float) and abs(value) < MOST


def runs_of(study: Study, *, arm: str, out: Path) -> list[Run]:
    """Read the finished runs of an arm."""
    # A run that is still going, or ended in nan, would pair its last step with another's end.
    runs = [read_run(run_dir(out, arm, seed), seed=seed) for seed in study.seeds_of(arm)]
    return [run for run in runs if run.is_done]


def curve(runs: list[Run], *, value: str, split: str = TRAIN_ROWS) -> Curve | None:
    """Collect one value over the steps that all runs have; None if there is no such step.

    Args:
        value: key of metrics.jsonl.
        split: of the rows.
    """
    found = [
        {row.step: row.values[value] for row in run.rows if row.split == split and value in row.values}
        for run in runs
    ]
    tokens = tokens_at(runs[0].rows) if runs else {}
    # A seed that recorded other steps, such as one resumed with another eval_every, counts where it has both. Runs of
    # 0.1 with train.log_every have measured steps without a training row, of which nobody knows the tokens.
    steps = sorted(set.intersection(set(tokens), *map(set, found)))
    if not steps:
        return None
    values = np.array([[one[step] for step in steps] for one in found], dtype=float)
    return Curve(steps, [tokens[step] for step in steps], values, [run.seed for run in runs])


def tokens_at(rows: list[Row]) -> dict[int, int]:
    """Map each training step to the tokens trained on by then; step 0 has none."""
    # Held-out rows carry no count of their own, and text is measured before the first step.
    counted = (row for row in rows if row.split == TRAIN_ROWS and "tokens" in row.values)
    return {0: 0} | {row.step: int(row.values["tokens"]) for row in counted}


def tokens_spent(rows: list[Row]) -> int:
    """Count the tokens that a run was trained on; 0 for one that has not trained."""
    return max(tokens_at(rows).values())


def paired(first: Curve | None, second: Curve | None) -> tuple[Curve, Curve] | None:
    """Keep the seeds and steps that both have; None if there are none."""
    of_seeds = of_common_seeds(first, second)
    if of_seeds is None:
        return None
    first, second = of_seeds
    steps = [step for step in first.steps if step in second.steps]
    if not steps:
        return None
    return _kept(first, first.seeds, steps), _kept(second, second.seeds, steps)


def of_common_seeds(first: Curve | None, second: Curve | None) -> tuple[Curve, Curve] | None:
    """Keep the seeds that both have, and all steps of each; None if there are none."""
    if first is None or second is None:
        return None
    # A seed that only one arm has finished yet has nothing to be subtracted from.
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    return (_kept(first, seeds, first.steps), _kept(second, seeds, second.steps)) if seeds else None


def image_baselines(runs: list[Run]) -> dict[str, float]:
    """Read the count-based baselines of held-out codes, in nats per code; none for runs on text."""
    manifest = data_manifest(runs[0]) if runs else None
    return _baselines(manifest) if manifest and not manifest.is_text else {}


def text_baselines(runs: list[Run]) -> dict[str, float]:
    """Read the count-based baselines of held-out text, in nats per token; none unless it comes from text shards."""
    if not runs:
        return {}
    file = Path(read_settings(runs[0].folder)["train"]["eval_text"]) / MANIFEST
    manifest = read_manifest_file(file) if file.is_file() else None
    return _baselines(manifest) if manifest and manifest.is_text else {}


def num_samples(run: Run) -> int:
    """Count the samples that a run was trained on."""
    # With what subsample_every leaves out: an ablation of data size is drawn against what was seen.
    settings = read_settings(run.folder)["data"]
    return num_trained_on(
        read_manifest_file(run.folder / DATA_MANIFEST), subsample_every=settings["subsample_every"]
    )


def is_rate_falling(runs: list[Run]) -> bool:
    """Tell whether an arm's learning rate falls until its end, so that its losses before it are no run's end."""
    return any(read_settings(run.folder).get("train", {}).get("min_lr_ratio", 1.0) < 1 for run in runs)


def codes_per_image(run: Run) -> int:
    """Read the number of codes per image of the run's shards."""
    return read_manifest_file(run.folder / DATA_MANIFEST).codes_per_image


def data_manifest(run: Run) -> Manifest | None:
    """Read the manifest of the shards that a run was trained on; None if it has not begun."""
    file = run.folder / DATA_MANIFEST
    return read_manifest_file(file) if file.is_file() else None


def _baselines(manifest: Manifest) -> dict[str, float]:
    return manifest.floors_nats.get("heldout", {})


def _kept(one: Curve, seeds: list[int], steps: list[int]) -> Curve:
    rows = [one.seeds.index(seed) for seed in seeds]
    columns = [one.steps.index(step) for step in steps]
    tokens = [one.tokens[column] for column in columns]
    return Curve(steps, tokens, one.values[np.ix_(rows, columns)], seeds)
