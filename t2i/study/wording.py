"""How a report writes numbers that may be unknown, as nan is."""

import math


def without_empty_columns(table: list[list[str]]) -> list[list[str]]:
    """Drop columns that no row below the head fills."""
    kept = [place for place in range(len(table[0])) if any(row[place] != "-" for row in table[1:])]
    return [[row[place] for place in kept] for row in table]


def interval(low: float, high: float, form: str) -> str:
    """Write a 95% interval's bounds in a format such as "{:.3f}"."""
    if math.isnan(low):
        return "(one seed: no interval)"
    return f"(95%: {form.format(low)} to {form.format(high)})"


def difference(mean: float, low: float, high: float) -> str:
    """Write a mean difference with its 95% interval."""
    return f"{mean:+.4f} {interval(low, high, '{:+.4f}')}"


def known(value: float) -> str:
    """Write a number of something, or that it is not known."""
    return "an unknown number of" if math.isnan(value) else f"{value:.4f}"


def p_value(value: float) -> str:
    """Write a p-value."""
    return "unknown" if math.isnan(value) else f"{value:.3g}"


def verdict_on(verdict: str, name: str) -> str:
    """Say what a test on losses found, where lower is better."""
    sentences = {"lower": f"{name} is better", "higher": f"{name} is worse"}
    return sentences.get(verdict, verdict)
