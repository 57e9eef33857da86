"""Sections of a study's report: each reads run folders and returns figures, a table and the sentence that follows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2i.errors import UserError
from t2i.study import drawing
from t2i.study.arms import Curve, curve, floors_of, paired, read_json, runs_of
from t2i.study.grid import Study, run_dir
from t2i.study.statistics import difference_curve, ema, paired_test, worth_in_tokens
from t2i.study.wording import interval, known, p_value, verdict_on, without_empty_columns
from t2i.train.align import SUMMARY

SMOOTHING = 0.95
"""Decay of the averages that are drawn (paper, Figure 6)."""


@dataclass
class Section:
    """A part of the report."""

    title: str
    found: str
    """One sentence, made from the numbers."""
    figure: Any = None
    """A matplotlib figure; None for a section that is a table."""
    table: list[list[str]] = field(default_factory=list)
    """Its first row is the head."""
    paper: str = ""
    """What the paper found, as the study file says."""


def make_section(arguments: dict[str, Any], *, study: Study, out: Path) -> Section:
    """Make one section from its entry in the study file.

    Raises:
        UserError: an unknown kind or argument.
    """
    given = dict(arguments)
    kind, title, paper = given.pop("section", ""), given.pop("title", ""), given.pop("paper", "")
    if kind not in KINDS:
        raise UserError(f"{study.file}: report has a section {kind!r}; known are {', '.join(KINDS)}.")
    try:
        section = KINDS[kind](study, out, **given)
    except TypeError as error:
        raise UserError(f"{study.file}: section {title or kind}: {error}.") from error
    section.title, section.paper = title or section.title, paper
    return section


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
            cells.append(_last(curve(runs, value=value, split="heldout")))
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
    found = [curve(runs_of(study, arm=arm, out=out), value=value, split=split) for arm in arms]
    if found[0] is None or found[1] is None:
        return Section("Comparison", f"{' or '.join(arms)} has no finished run with {split} {value}.")
    first, second = paired(found[0], found[1])
    test = paired_test(first.values[:, -1].tolist(), second.values[:, -1].tolist())
    worth = worth_in_tokens(first.tokens, first.values, second.values, at=range(len(first.tokens)))
    figure = drawing.difference(
        first,
        difference_curve(first.values, second.values),
        worth,
        names=(first_name, second_name),
        value=value,
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
        extra = (
            "not reached"
            if math.isnan(one.extra_tokens)
            else f"{one.extra_tokens:,.0f} {interval(one.low, one.high, '{:,.0f}')}"
        )
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
    sentence = (
        f"At {first.tokens[-1]:,} tokens {first_name} - {second_name} is {test.mean:+.4f} nats"
        f" {interval(test.low, test.high, '{:+.4f}')}, paired t-test over {test.num_seeds} seeds:"
        f" p = {p_value(test.p_value)},"
        f" {verdict_on(test.verdict, first_name)}. So many seeds would have seen a difference of"
        f" {known(test.smallest_detectable)} nats four times in five."
    )
    floor = floors_of(runs_of(study, arm=first_name, out=out)).get("unigram")
    if (
        value == "image_loss"
        and floor
        and min(first.values[:, -1].mean(), second.values[:, -1].mean()) > floor
    ):
        sentence += (
            f" Neither arm is below the cost of counting codes ({floor:.3f}): pictures are not learned yet."
        )
    return Section("Comparison", sentence, figure, table)


def alignment(study: Study, out: Path, *, folder: str) -> Section:
    """Draw the contrastive alignment's loss and temperature; the table has retrieval beside chance (Figure 7)."""
    path = Path(folder.replace("{out}", str(out)))
    summary = read_json(path / SUMMARY)
    sides = [name for name in summary if name != "settings"]
    if not sides:
        return Section("Alignment", f"{path} holds no finished alignment.")
    table = [
        ["rows", "picture finds caption", "caption finds picture", "chance", "held-out pairs", "temperature"]
    ]
    for name in sides:
        one = summary[name]
        shares = [f"{one[key]:.2%}" for key in ("image_to_text", "text_to_image", "chance")]
        table.append([name, *shares, str(one["num_pairs"]), f"{one['temperature']:.4f}"])
    best = max(summary[name]["image_to_text"] / summary[name]["chance"] for name in sides)
    sentence = (
        f"A picture finds its caption among held-out ones at most {best:.1f} times as often as by chance."
    )
    return Section("Alignment", sentence, drawing.alignment_curves(path, sides), table)


def nearest(study: Study, out: Path, *, files: dict[str, str], rows: str = "input") -> Section:
    """Draw cosines of image rows to their nearest text rows beside text and random rows, for nearest.json files."""
    found = {name: read_json(Path(file.replace("{out}", str(out)))) for name, file in files.items()}
    found = {name: one[rows] for name, one in found.items() if rows in one}
    if not found:
        return Section("Nearest text tokens", "No file of nearest tokens was made.")
    table = [
        [
            "model",
            "median image",
            "median random",
            "median text",
            "random row nearer",
            "code 0 to 3, nearest token",
        ]
    ]
    for name, one in found.items():
        medians = [f"{one[kind]['0.50']:.3f}" for kind in ("image", "random", "text")]
        tokens = " ".join(repr(tokens[0]) for tokens in one["nearest_tokens"][:4])
        table.append([name, *medians, f"{one['compared']['random_nearer']:.1%}", tokens])
    shares = ", ".join(f"{one['compared']['random_nearer']:.0%} ({name})" for name, one in found.items())
    sentence = f"A random row is nearer to text than an image row in {shares}; 50% would be no difference from noise."
    return Section("Nearest text tokens", sentence, drawing.cosines(found), table)


def completions(study: Study, out: Path, *, files: dict[str, str]) -> Section:
    """Tabulate completions of the same prompts by several checkpoints (Table 1), from forgetting.json files."""
    found = {name: read_json(Path(file.replace("{out}", str(out)))) for name, file in files.items()}
    found = {name: one for name, one in found.items() if one}
    table = [["prompt", "model", "completion", "perplexity of text among text rows"]]
    for name, one in found.items():
        for which, model in one["models"].items():
            label = name if which == "model" else f"{name}: {which}"
            for prompt, text in zip(one["prompts"], model["completions"], strict=True):
                table.append([prompt, label, text, f"{model['costs']['text']['perplexity_text_rows']:.2f}"])
    table[1:] = sorted(table[1:], key=lambda row: row[0])
    return Section(
        "Completions",
        f"{len(found)} models completed the same prompts, greedily, among text tokens.",
        table=table,
    )


def forgetting(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw what text costs along training, among text rows and over all, against what pictures cost."""
    panels: dict[str, dict[str, Curve]] = {"text_loss_text_rows": {}, "leaked": {}}
    table = [["arm", "text before", "text after", "leaked after", "held-out image loss"]]
    sentences = []
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        for value, panel in panels.items():
            found = curve(runs, value=value, split="text")
            if found is not None:
                panel[arm] = found
        if arm in panels["leaked"]:
            text, leaked = panels["text_loss_text_rows"][arm], panels["leaked"][arm]
            before, after = text.values[:, 0].mean(), text.values[:, -1].mean()
            image = _last(curve(runs, value="image_loss", split="heldout"))
            table.append([arm, f"{before:.3f}", f"{after:.3f}", f"{leaked.values[:, -1].mean():.2%}", image])
            sentences.append(f"{arm} from {before:.2f} to {after:.2f}")
    sentence = (
        f"Held-out text, among text rows, goes in nats a token: {'; '.join(sentences) or 'not measured'}."
    )
    return Section("Forgetting", sentence, drawing.forgetting(panels), table)


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
            last = [row for row in runs[0].rows if "split" not in row][-1]
            facts = read_json(folder / "checkpoints" / f"step_{last['step']:06d}" / "manifest.json")
            table.append(
                [
                    folder.name,
                    "done",
                    f"{facts['parameters']['learned']:,} of {facts['parameters']['all']:,}",
                    f"{facts['optimizer_state_bytes'] / 1e6:,.1f} MB",
                    _last(curve(runs, value="image_loss", split="heldout")),
                    f"{last['tokens']:,}",
                    f"{last['seconds'] / 60:.1f}",
                ]
            )
    total = sum(len(study.seeds_of(arm)) for arm in arms)
    return Section("Runs", f"{total - failed} of {total} runs ended well.", table=table)


KINDS: dict[str, Callable[..., Section]] = {
    "curves": curves,
    "comparison": comparison,
    "alignment": alignment,
    "nearest": nearest,
    "completions": completions,
    "forgetting": forgetting,
    "ends": ends,
}


def _smoothed_end(one: Curve) -> float:
    return float(np.mean([ema(row.tolist(), decay=SMOOTHING)[-1] for row in one.values]))


def _last(one: Curve | None) -> str:
    """Write the mean over seeds of the last value, with the range of seeds."""
    if one is None:
        return "-"
    last = one.values[:, -1]
    return f"{last.mean():.4f}" + (f" ({last.min():.4f} to {last.max():.4f})" if len(last) > 1 else "")
