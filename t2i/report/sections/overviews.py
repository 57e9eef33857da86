"""Several comparisons of two arms at once: tests corrected for their number, and differences between differences."""

import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from t2i.errors import UserError
from t2i.report.figures import COLOURS, LABELS, finish, panels
from t2i.report.sections.comparisons import pair_of, said_early
from t2i.report.sections.section import Section, SectionKind, difference, interval, p_value
from t2i.study.results import Curve, data_manifest, image_baselines
from t2i.study.spec import Study, nearest_name
from t2i.study.statistics import CONFIDENCE, PairedTest, corrected, paired_test

BASELINES = ("uniform", "unigram", "position_unigram", "bigram")
"""Count-based baselines of shards."""


@dataclass(frozen=True)
class Gap:
    """What the first arm of a pair is above the second at the end of training, seed by seed."""

    differences: dict[int, float]
    """Seed -> first - second: in nats, or as a share of what the second arm has learned."""
    learned: dict[int, float]
    """Seed -> what the second arm has learned beyond the baseline, nats per code; empty for differences in nats."""
    image_tokenizers: set[str]
    """Fingerprints of what made the codes of its arms."""
    early: str
    """Which arm is read before its end, in words."""


def overview(
    study: Study,
    out: Path,
    *,
    pairs: dict[str, tuple[str, str]],
    value: str = "image_loss",
    against: str = "",
    relative_to: str = "",
) -> Section:
    """Tabulate the tests of several comparisons, corrected for their number.

    Args:
        pairs: what each comparison is called -> its first and second arm.
        against: the comparison whose difference is subtracted from those of the others, seed by seed: is pre-training
            worth more there than here? Empty for none.
        relative_to: a count-based baseline of held-out codes, such as unigram. Each difference is then divided, seed by
            seed, by what the second arm has learned beyond it: losses per code of two image tokenizers do not compare,
            such shares do. Empty for differences in nats.
    """
    gaps = {
        name: gap
        for name, arms in pairs.items()
        if (gap := gap_of(study, out, arms, value=value, relative_to=relative_to)) is not None
    }
    # Pairs without finished runs are left out, and not counted by the correction.
    tests = {name: _test(gap) for name, gap in gaps.items() if gap.differences}
    if not tests:
        why = _without_share(gaps, relative_to) or "No pair of arms is finished."
        return Section("Comparisons", why.strip())
    between = _between_pairs({name: gaps[name] for name in tests}, against)
    every = tests | between
    # Twenty tests at 5% find one difference where there is none; Holm's correction keeps that chance at 5% for all.
    holm = dict(zip(every, corrected([test.p_value for test in every.values()]), strict=True))
    share = f"share of what was learned beyond {relative_to}" if relative_to else ""
    learned = ["learned by the second arm, nats per code"] if relative_to else []
    table = [
        [
            "comparison",
            "arms",
            "seeds",
            f"difference, {share}" if share else "difference",
            "p",
            "p, corrected",
            "detectable alone, 80% power",
        ]
        + learned
    ]
    for name, test in every.items():
        least = test.smallest_detectable
        cells = [difference(test.mean, test.low, test.high), p_value(test.p_value), p_value(holm[name])]
        cells.append("-" if math.isnan(least) else f"{least:.4f}")
        arms = " - ".join(pairs[name]) if name in tests else ""
        table.append([name, arms, str(test.num_seeds), *cells])
        if learned:
            table[-1].append(_learned(gaps[name]) if name in tests else "")
    # Several pairs may have one arm in common.
    early = dict.fromkeys(gaps[name].early for name in tests)
    below = sum(test.mean < 0 for test in tests.values())
    seen = [name for name, one in holm.items() if one < 1 - CONFIDENCE]
    sentence = (
        f"Paired t-tests of held-out {value} at the end of training, {len(every)} in all"
        f" ({below} differences of arms below zero); corrected for their number (Holm), a difference is seen in"
        f" {len(seen)}" + (f": {', '.join(seen)}." if seen else ".")
    ) + "".join(early)
    if relative_to:
        sentence += (
            " Each difference is divided, seed by seed, by what the second arm has learned: the held-out"
            f" {relative_to} cost minus its loss. At -0.1 the first arm has learned a tenth more."
        )
    elif against and len(set().union(*(gap.image_tokenizers for gap in gaps.values()))) > 1:
        sentence += " The codes are of several image tokenizers, whose losses per code do not compare."
    sentence += _said_of(between, holm, nats="" if relative_to else " nats") + _without_share(
        gaps, relative_to
    )
    if against and against not in tests:
        sentence += f" Without {against}, no difference from it is taken."
    sentence += _shared_by_seeds(study, has_codes=any(gaps[name].image_tokenizers for name in tests))
    # A share has no unit. On two lines, because names of comparisons may leave half of the width to it.
    what = f"image loss as a\n{share}" if share else LABELS.get(value, value)
    label = f"difference of {what}\nmean and 95% interval of each alone"
    return Section("Comparisons", sentence, _draw(every, label=label), table)


def _check_names(
    _study: Study,
    *,
    pairs: dict[str, tuple[str, str]],
    value: str = "image_loss",
    against: str = "",
    relative_to: str = "",
) -> None:
    """Check `against` and `relative_to`.

    Raises:
        UserError: the one is no pair, or the other is no baseline, or one that the value does not have.
    """
    if against and against not in pairs:
        raise UserError(f"overview: against is {against}; expected one of {', '.join(pairs)}.")
    if relative_to and relative_to not in BASELINES:
        raise UserError(
            f"overview: relative_to is {relative_to}; {nearest_name(relative_to, list(BASELINES))}."
        )
    if relative_to and value != "image_loss":
        raise UserError(
            f"overview: relative_to is {relative_to} and value {value}; expected image_loss, the loss of codes."
        )


def gap_of(study: Study, out: Path, arms: tuple[str, str], *, value: str, relative_to: str) -> Gap | None:
    """Subtract the ends of two arms; None without finished runs of one seed."""
    pair = pair_of(study, out, arms, value=value)
    if pair is None:
        return None
    manifests = [found for of_arm in pair.runs for run in of_arm if (found := data_manifest(run)) is not None]
    makers = {one.image_tokenizer.fingerprint for one in manifests if one.image_tokenizer is not None}
    early = said_early(pair, arms)
    first, second = (_ends(one) for one in pair.common)
    gaps = {seed: first[seed] - second[seed] for seed in first}
    if not relative_to:
        return Gap(gaps, {}, makers, early)
    costs = {run.seed: image_baselines([run]).get(relative_to, math.nan) for run in pair.runs[1]}
    learned = {seed: costs[seed] - second[seed] for seed in gaps}
    # Of all seeds or none: to leave out those that learned nothing would choose the seeds by their loss.
    if not all(one > 0 for one in learned.values()):
        return Gap({}, learned, makers, early)
    return Gap({seed: gap / learned[seed] for seed, gap in gaps.items()}, learned, makers, early)


def _ends(one: Curve) -> dict[int, float]:
    return dict(zip(one.seeds, one.values[:, -1].tolist(), strict=True))


def _test(gap: Gap) -> PairedTest:
    return paired_test([*gap.differences.values()], [0.0] * len(gap.differences))


def _between_pairs(gaps: dict[str, Gap], against: str) -> dict[str, PairedTest]:
    """Test by how much the difference of each pair differs from that of the pair `against`; empty without it."""
    if against not in gaps:
        return {}
    base, tests = gaps[against].differences, {}
    for name, gap in gaps.items():
        seeds = [seed for seed in base if seed in gap.differences]
        if seeds and name != against:
            ends = ([one[seed] for seed in seeds] for one in (gap.differences, base))
            tests[f"{name} minus {against}"] = paired_test(*ends)
    return tests


def _said_of(between: dict[str, PairedTest], holm: dict[str, float], *, nats: str) -> str:
    return "".join(
        f" The difference of {name} is {test.mean:+.4f}{nats} {interval(test.low, test.high, '{:+.4f}')}, paired over"
        f" {test.num_seeds} seeds: p = {p_value(test.p_value)}, corrected {p_value(holm[name])}."
        for name, test in between.items()
    )


def _without_share(gaps: dict[str, Gap], relative_to: str) -> str:
    """Say which pairs have no share of what was learned, because nothing was."""
    names = [name for name, gap in gaps.items() if not gap.differences]
    if not names:
        return ""
    return (
        f" Without a share: {', '.join(names)}. A seed of the second arm is not below the {relative_to} cost, so that"
        " it has learned nothing to take a share of, or its shards do not state that cost."
    )


def _shared_by_seeds(study: Study, *, has_codes: bool) -> str:
    """Say what was drawn or chosen once for all seeds, and is in no interval over them."""
    once = [*(["the image tokenizers"] if has_codes else []), "the held-out data"]
    if study.tuning is not None:
        once.append(f"each arm's {study.tuning.key}, chosen on seed {study.tuning.seed}")
    return f" All seeds share {' and '.join(once)}, so that no interval has what others would give."


def _learned(gap: Gap) -> str:
    found = gap.learned.values()
    return f"{sum(found) / len(found):.4f} ({min(found):.4f} to {max(found):.4f})"


def _draw(tests: dict[str, PairedTest], *, label: str) -> Figure:
    """Draw each test's mean difference with its interval, a line per comparison, the first on top."""
    figure, (axis,) = panels(1)
    # Height by the number of lines, so that four comparisons and twenty have letters of one size.
    figure.set_size_inches(7.4, 1.0 + 0.32 * len(tests))
    axis.axvline(0, color="0.5", linewidth=0.8)
    for place, test in enumerate(tests.values()):
        reach = 0.0 if math.isnan(test.low) else test.mean - test.low
        axis.errorbar(test.mean, -place, xerr=reach, color=COLOURS[0], marker="o", markersize=4, capsize=3)
    # Downwards, so that the figure has the order of the table.
    axis.set_yticks([-place for place in range(len(tests))], list(tests), fontsize=8)
    axis.set_xlabel(label, fontsize=9)
    finish(axis)
    return figure


SECTIONS = (
    SectionKind(
        "overview", reads="metrics.jsonl and data_manifest.json of runs", make=overview, check=_check_names
    ),
)
