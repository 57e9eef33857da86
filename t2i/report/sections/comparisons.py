"""Training curves, comparisons of arms, what runs cost."""

import math
from pathlib import Path

import numpy as np
import yaml

from t2i.data.loader import num_trained_on
from t2i.report.sections.section import (
    Section,
    difference,
    interval,
    known,
    last,
    p_value,
    verdict_on,
    without_empty_columns,
)
from t2i.runs.loading import DATA_MANIFEST
from t2i.runs.run_folder import RESOLVED
from t2i.study.drawing import training as drawing
from t2i.study.jobs import run_dir
from t2i.study.results import Curve, Run, curve, floors_of, paired, read_json, runs_of
from t2i.study.spec import Study
from t2i.study.statistics import (
    CONFIDENCE,
    PairedTest,
    corrected,
    difference_curve,
    ema,
    paired_test,
    worth_in_tokens,
)

SMOOTHING = 0.95
"""Decay of the averages that are drawn (paper, Figure 6)."""


def curves(
    study: Study, out: Path, *, arms: list[str], values: list[str], perplexity: bool = False
) -> Section:
    """Draw training curves against tokens, raw and smoothed, a panel a value; the table has the last held-out ones."""
    panels: dict[str, dict[str, Curve]] = {value: {} for value in values}
    table = [["arm", "seeds", *(f"held-out {value}" for value in values)]]
    floors: dict[str, float] = {}
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        floors = floors or floors_of(runs)
        cells = []
        for value in values:
            found = curve(runs, value=value)
            if found is not None:
                panels[value][arm] = found
            cells.append(last(curve(runs, value=value, split="heldout")))
        table.append([arm, str(len(runs)), *cells])
    table = without_empty_columns(table)
    figure = drawing.training_curves(panels, decay=SMOOTHING, perplexity=perplexity, floors=floors)
    sentence = "; ".join(
        f"{value} ends at "
        + ", ".join(f"{_smoothed_end(one):.3f} ({arm})" for arm, one in panels[value].items())
        for value in values
        if panels[value]
    )
    return Section("Training curves", f"Smoothed by {SMOOTHING}, in nats a token, {sentence}.", figure, table)


def comparison(study: Study, out: Path, *, arms: list[str], value: str, split: str = "heldout") -> Section:
    """Compare two arms: the paired difference along training, the test at its end, the worth in tokens."""
    first_name, second_name = arms
    runs, pair = _pair_of(study, out, arms, value=value, split=split)
    if pair is None:
        return Section(
            "Comparison", f"{' and '.join(arms)} have no finished runs of one seed with {split} {value}."
        )
    first, second = pair
    test = _test_at_end(first, second)
    until = int(first.values.mean(0).argmin()) + 1  # a loss that rises again is no level to reach
    worth = worth_in_tokens(first.tokens, first.values, second.values, at=range(until))
    floors = floors_of(runs[0]) if value == "image_loss" else {}
    figure = drawing.difference(
        (first, second),
        difference_curve(first.values, second.values),
        worth,
        names=(first_name, second_name),
        value=value,
        floors=floors,
    )
    table = [
        [
            "at tokens",
            f"{value} of {first_name}",
            f"tokens {second_name} needs beyond",
            "factor",
            "seeds that reach it",
        ]
    ]
    for one in worth:
        if one.is_earlier:
            extra = "reached before it is first measured"
        elif math.isnan(one.extra_tokens):
            extra = "not reached"
        else:
            extra = f"{one.extra_tokens:,.0f} {interval(one.low, one.high, '{:,.0f}')}"
        factor = "" if math.isnan(one.factor) else f"{one.factor:.2f}"
        table.append(
            [
                f"{one.first_tokens:,}",
                f"{one.loss:.4f}",
                extra,
                factor,
                f"{one.num_reached} of {test.num_seeds}",
            ]
        )
    at = f"{first.tokens[-1]:,}"
    if second.tokens[-1] != first.tokens[-1]:  # such as where one of them has text beside its pictures
        at += f" and {second.tokens[-1]:,}"
    sentence = (
        f"At {at} tokens, step {first.steps[-1]}, {first_name} - {second_name} is {test.mean:+.4f} nats"
        f" {interval(test.low, test.high, '{:+.4f}')}, paired t-test over {test.num_seeds} seeds:"
        f" p = {p_value(test.p_value)},"
        f" {verdict_on(test.verdict, first_name)}. So many seeds would have seen a difference of"
        f" {known(test.smallest_detectable)} nats four times in five."
    )
    rises = [_rise(one, name) for one, name in zip(pair, arms, strict=True)]
    if any(rises):
        sentence += f"{''.join(rises)} At each run's own lowest, {_lowest_difference(first, second)}."
    floor = floors.get("unigram")
    if floor and min(first.values[:, -1].mean(), second.values[:, -1].mean()) > floor:
        why = (
            "what is learned does not hold for other pictures"
            if any(rises)
            else "pictures are not learned yet"
        )
        sentence += f" Neither arm is below the cost of counting codes ({floor:.3f}): {why}."
    return Section("Comparison", sentence, figure, table)


def overview(study: Study, out: Path, *, pairs: dict[str, list[str]], value: str = "image_loss") -> Section:
    """Put the tests of several comparisons beside one another, corrected for their number.

    Args:
        pairs: what each comparison is called -> its first and second arm.
    """
    tests: dict[str, PairedTest] = {}
    for name, arms in pairs.items():
        _, pair = _pair_of(study, out, arms, value=value)
        if pair is not None:
            tests[name] = _test_at_end(*pair)
    if not tests:
        return Section("Comparisons", "No pair of arms is finished.")
    holm = corrected([test.p_value for test in tests.values()])
    table = [["comparison", "arms", "difference", "p", "p, corrected", "seen four times in five"]]
    for (name, test), p_corrected in zip(tests.items(), holm, strict=True):
        table.append(
            [
                name,
                " - ".join(pairs[name]),
                difference(test.mean, test.low, test.high),
                p_value(test.p_value),
                p_value(p_corrected),
                known(test.smallest_detectable),
            ]
        )
    below = sum(test.mean < 0 for test in tests.values())
    seen = [name for name, one in zip(tests, holm, strict=True) if one < 1 - CONFIDENCE]
    sentence = (
        f"Paired t-tests of held-out {value} at the end of training, {len(tests)} in all"
        f" ({below} below zero); corrected for their number (Holm), a difference is seen in {len(seen)}"
        + (f": {', '.join(seen)}." if seen else ".")
    )
    return Section("Comparisons", sentence, drawing.overview(tests, value=value), table)


def sizes(
    study: Study, out: Path, *, pairs: list[list[str]], names: list[str], value: str = "image_loss"
) -> Section:
    """Compare pairs of arms that were trained on different amounts of data: the gap against the size.

    Args:
        pairs: first and second arm of each size.
        names: what the first arms are, and the second.
    """
    heads = ["training samples", "arms", *names, "difference", "p", "verdict", "at each run's own lowest"]
    table = [heads]
    found: list[tuple[int, PairedTest]] = []
    for arms in pairs:
        runs, pair = _pair_of(study, out, arms, value=value)
        if pair is None:
            continue
        first, second = pair
        test = _test_at_end(first, second)
        found.append((_num_samples(runs[0][0]), test))
        gap = difference(test.mean, test.low, test.high)
        means = [f"{one.values[:, -1].mean():.4f}" for one in (first, second)]
        verdict = verdict_on(test.verdict, names[0])
        lowest = _lowest_difference(first, second)
        table.append(
            [f"{found[-1][0]:,}", ", ".join(arms), *means, gap, p_value(test.p_value), verdict, lowest]
        )
    if not found:
        return Section("Data sizes", "No pair of arms is finished.")
    sentence = "; ".join(f"{test.mean:+.4f} nats with {count:,} samples" for count, test in found)
    figure = drawing.sizes(
        [count for count, _ in found],
        [test for _, test in found],
        names=(names[0], names[1]),
        value=value,
    )
    return Section("Data sizes", f"{names[0]} - {names[1]}: {sentence}.", figure, table)


def _num_samples(run: Run) -> int:
    """Count the samples that a run was trained on."""
    settings = yaml.safe_load((run.folder / RESOLVED).read_text())["data"]
    return num_trained_on(read_manifest_file(run.folder / DATA_MANIFEST), keep_every=settings["keep_every"])


def ends(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Tabulate every run: how it ended, what learned, what it cost."""
    table = [
        ["run", "ended", "learned numbers", "optimizer state", "held-out image loss", "tokens", "minutes"]
    ]
    failed = 0
    for arm in arms:
        for seed in study.seeds_of(arm):
            folder = run_dir(out, arm, seed)
            status = read_json(folder / "status.json")
            runs = [run for run in runs_of(study, arm=arm, out=out) if run.seed == seed]
            if not runs:
                failed += 1
                table.append(
                    [
                        folder.name,
                        f"{status.get('state', 'not begun')}: {status.get('reason', '')}",
                        *[""] * 5,
                    ]
                )
                continue
            end = [row for row in runs[0].rows if "split" not in row][-1]
            facts = read_json(folder / "checkpoints" / f"step_{end['step']:06d}" / "manifest.json")
            table.append(
                [
                    folder.name,
                    "done",
                    f"{facts['parameters']['learned']:,} of {facts['parameters']['all']:,}",
                    f"{facts['optimizer_state_bytes'] / 1e6:,.1f} MB",
                    last(curve(runs, value="image_loss", split="heldout")),
                    f"{end['tokens']:,}",
                    f"{end['seconds'] / 60:.1f}",
                ]
            )
    total = sum(len(study.seeds_of(arm)) for arm in arms)
    return Section("Runs", f"{total - failed} of {total} runs ended well.", table=table)


def _pair_of(
    study: Study, out: Path, arms: list[str], *, value: str, split: str = "heldout"
) -> tuple[list[list[Run]], tuple[Curve, Curve] | None]:
    """Read two arms: the runs of each, and their curves over the seeds and steps of both, None if there are none."""
    runs = [runs_of(study, arm=arm, out=out) for arm in arms]
    first, second = (curve(one, value=value, split=split) for one in runs)
    return runs, paired(first, second)


def _test_at_end(first: Curve, second: Curve) -> PairedTest:
    return paired_test(first.values[:, -1].tolist(), second.values[:, -1].tolist())


def _rise(one: Curve, name: str) -> str:
    """Say where a held-out loss was lowest, if it ends above that in every seed; nothing if it does not."""
    lowest = int(one.values.mean(0).argmin())
    if not (one.values[:, -1] > one.values[:, lowest]).all():
        return ""
    least, end = one.values[:, lowest].mean(), one.values[:, -1].mean()
    return f" {name} was lowest at {one.tokens[lowest]:,} tokens, {least:.3f}, and rose to {end:.3f}."


def _lowest_difference(first: Curve, second: Curve) -> str:
    """Compare the lowest loss of each run, which stopping early would keep; chosen on the same held-out samples."""
    test = paired_test(first.values.min(1).tolist(), second.values.min(1).tolist())
    return f"{difference(test.mean, test.low, test.high)}, p = {p_value(test.p_value)}"


def _smoothed_end(one: Curve) -> float:
    return float(np.mean([ema(row.tolist(), decay=SMOOTHING)[-1] for row in one.values]))
