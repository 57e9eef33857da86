"""Finished runs as arrays: what a comparison of arms is computed from, metrics.jsonl alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from t2i.data.shards.manifest import MANIFEST
from t2i.runs.loading import DATA_MANIFEST
from t2i.runs.metrics_log import read_metrics
from t2i.runs.run_folder import RESOLVED, STATUS
from t2i.study.jobs import run_dir
from t2i.study.spec import Study

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One value of one arm over training: columns are the steps that every seed has recorded."""

    steps: list[int]
    tokens: list[int]
    """Trained on at each column, of the first seed: arms share their data."""
    values: np.ndarray
    """(seeds, T)."""
    seeds: list[int]


@dataclass(frozen=True)
class Run:
    """One training run's files."""

    folder: Path
    seed: int
    rows: Rows
    status: dict[str, Any]


def runs_of(study: Study, *, arm: str, out: Path) -> list[Run]:
    """Read an arm's runs that have ended well."""
    folders = [(seed, run_dir(out, arm, seed)) for seed in study.seeds_of(arm)]
    runs = [Run(folder, seed, read_metrics(folder), read_json(folder / STATUS)) for seed, folder in folders]
    return [run for run in runs if run.status.get("state") == "done"]


def curve(runs: list[Run], *, value: str, split: str = "train") -> Curve | None:
    """Collect one value over the steps that all runs have; None if there is no such step.

    Args:
        split: "train" for the training rows, else the `split` of held-out rows.
    """
    found = [
        {
            row["step"]: row[value]
            for row in run.rows
            if row.get("split", "train") == split and row.get(value) is not None
        }
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return None
    tokens = tokens_at(runs[0].rows)
    values = np.array([[one[step] for step in steps] for one in found], dtype=float)
    return Curve(steps, [tokens[step] for step in steps], values, [run.seed for run in runs])


def tokens_at(rows: Rows) -> dict[int, int]:
    """Map each training step to the tokens done by then; step 0 has none."""
    return {0: 0} | {row["step"]: row["tokens"] for row in rows if "split" not in row}


def paired(first: Curve | None, second: Curve | None) -> tuple[Curve, Curve] | None:
    """Keep the seeds and steps that both have; None if there are none."""
    if first is None or second is None:
        return None
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    steps = [step for step in first.steps if step in second.steps]
    if not seeds or not steps:
        return None
    return _kept(first, seeds, steps), _kept(second, seeds, steps)


def floors_of(runs: list[Run]) -> dict[str, float]:
    """Read what held-out codes cost models that only count, in nats a code; empty for text."""
    manifest = read_json(runs[0].folder / DATA_MANIFEST) if runs else {}
    floors: dict[str, float] = manifest.get("floors_nats", {}).get("heldout", {})
    return floors if "codebook_size" in manifest else {}


def text_floors_of(runs: list[Run]) -> dict[str, float]:
    """Read what held-out text costs models that only count, in nats a token; empty where it is of no text shards."""
    if not runs:
        return {}
    settings = yaml.safe_load((runs[0].folder / RESOLVED).read_text())
    manifest = read_json(Path(settings["train"]["eval_text"]) / MANIFEST)
    floors: dict[str, float] = manifest.get("floors_nats", {}).get("heldout", {})
    return floors if "sequence_tokens" in manifest else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _kept(one: Curve, seeds: list[int], steps: list[int]) -> Curve:
    rows = [one.seeds.index(seed) for seed in seeds]
    columns = [one.steps.index(step) for step in steps]
    tokens = [one.tokens[column] for column in columns]
    return Curve(steps, tokens, one.values[np.ix_(rows, columns)], seeds)
