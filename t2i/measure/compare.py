"""Two scores side by side, if they were measured by one protocol."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.files import Kind, check_keys, read_json
from t2i.measure.protocol import (
    BOOTSTRAP,
    CHOSE,
    CLIP,
    CLIP_PREPROCESSING,
    CLIP_RULE,
    JUDGES,
    PIXELS,
    PREPROCESSING,
    RULES,
    SCORES,
    Protocol,
    RowScore,
    Scores,
    Subject,
)
from t2i.runs.eval_results import read_card, read_eval_results


@dataclass(frozen=True)
class ReadScores:
    """A scores.json, as far as scores are compared."""

    measures: list[str]
    rows: dict[str, RowScore]
    entries: dict[str, object]
    """All of it."""


def read_scores(file: Path) -> ReadScores:
    """Read a scores.json, that of a folder, a file of .eval_results/ that an export holds, or its card.

    Raises:
        UserError: the file holds no scores.
    """
    file = file / SCORES if file.is_dir() else file
    forms = {".yaml": read_eval_results, ".yml": read_eval_results, ".md": read_card}
    read = forms.get(file.suffix)
    scores = read(file) if read else read_json(file, error=UserError)
    where = f"{file} is no scores.json"
    check_keys(scores, {"rows": dict, "measures": list}, where=where, error=UserError)
    measures = [str(measure) for measure in scores["measures"]]
    for name, row in scores["rows"].items():
        _check_row(row, measures, where=f"{where}: rows: {name}")
    rows = {
        name: RowScore(
            row["what"],
            n=row["n"],
            measures={key: row[key] for key in measures if key in row},
            intervals=row.get("intervals", {}),
        )
        for name, row in scores["rows"].items()
    }
    return ReadScores(measures, rows=rows, entries=scores)


def _check_row(row: object, measures: list[str], *, where: str) -> None:
    """Refuse what is no row of a scores.json.

    Raises:
        UserError: a key is missing or of another type.
    """
    number = (int, float)
    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r:.80}; expected an object of keys.")
    kinds: dict[str, Kind] = {key: number for key in measures if key in row}
    check_keys(row, {"what": str, "n": int, **kinds}, where=where, error=UserError)
    intervals = row.get("intervals", {})
    if not isinstance(intervals, dict) or not all(map(_is_pair, intervals.values())):
        raise UserError(f"{where}: intervals is {intervals!r:.80}; expected two numbers per measure.")


def _is_pair(bounds: object) -> bool:
    return (
        isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(one, int | float) for one in bounds)
    )


def check_protocols(a: ReadScores, b: ReadScores) -> None:
    """Refuse scores that were measured by different protocols.

    Raises:
        UserError: the entries that differ, one per line.
    """
    keys = tuple(each.name for each in fields(Protocol))
    keys += tuple(
        key
        for key in (CLIP, CLIP_PREPROCESSING, CLIP_RULE, BOOTSTRAP, PIXELS, PREPROCESSING)
        if key in a.entries and key in b.entries
    )
    # One wrong comparison costs more than a refused one: FID moves more by its protocol than by most improvements.
    lines = differing_entries(_in_todays_words(a.entries), _in_todays_words(b.entries), keys=keys)
    for key in (RULES, JUDGES):
        lines += _differing_where_both(a.entries, b.entries, key=key)
    left, right = _judges_behind_http(a), _judges_behind_http(b)
    if left and right and not left & right:
        lines.append(
            f"judges: {', '.join(sorted(left))} | {', '.join(sorted(right))}; expected one that judged both"
        )
    if lines:
        raise UserError("These scores were measured by different protocols:\n" + "\n".join(lines))


def _differing_where_both(a: Mapping[str, object], b: Mapping[str, object], *, key: str) -> list[str]:
    """List what differs in the named parts of an entry that both files have."""
    left, right = a.get(key), b.get(key)
    if not isinstance(left, dict) or not isinstance(right, dict):
        return []  # a file from before there was such an entry shares none of these measures
    # A measure that one model has and the other has not is compared with nothing, so it is no difference.
    shared = {name for name in left if name in right}
    lines = differing_entries(left, right, keys=tuple(sorted(shared)))
    return [f"{key}.{line}" for line in lines]


def lone_judges(a: ReadScores, b: ReadScores) -> tuple[list[str], list[str]]:
    """List the judges behind HTTP that judged the first alone, and those that judged the second alone."""
    left, right = _judges_behind_http(a), _judges_behind_http(b)
    return sorted(left - right), sorted(right - left)


def _judges_behind_http(scores: ReadScores) -> set[str]:
    judges = scores.entries.get(JUDGES)
    entries = judges.items() if isinstance(judges, dict) else ()
    return {name for name, entry in entries if isinstance(entry, dict) and "reward" in entry}


def _in_todays_words(entries: Mapping[str, object]) -> dict[str, object]:
    """Put the sentences of a protocol that version 0.1 wrote into today's words."""
    # Other words for the same rule and reference are no other protocol: older scores must still compare.
    return {
        key: value.replace("picture", "image") if isinstance(value, str) else value
        for key, value in entries.items()
    }


def differing_subjects(a: ReadScores, b: ReadScores) -> list[str]:
    """List what differs in what was measured."""
    return differing_entries(a.entries, b.entries, keys=tuple(each.name for each in fields(Subject)))


def differing_entries(
    a: Mapping[str, object], b: Mapping[str, object], *, keys: tuple[str, ...]
) -> list[str]:
    """List entries that differ: `key: A | B`, nested ones as key.inner."""
    lines = []
    for key in keys:
        # A key that one file lacks is a difference too: what is not stated cannot be known to be equal.
        left, right = a.get(key, "not stated"), b.get(key, "not stated")
        if isinstance(left, dict) and isinstance(right, dict):
            inner = differing_entries(left, right, keys=tuple({**left, **right}))
            lines += [f"{key}.{line}" for line in inner]
        elif left != right:
            lines.append(f"{key}: {left} | {right}")
    return lines


def table(rows: Iterable[RowScore], *, measures: Sequence[str]) -> list[str]:
    """Lay rows out as lines: what, number of images, measures."""
    lines = [" ".join([f"{'images':56s}", f"{'n':>6s}", *(f"{key:>21s}" for key in measures)])]
    for row in rows:
        numbers = [f"{_cell(row, key):>21s}" for key in measures]
        lines.append(" ".join([f"{row.what:56s}", f"{row.n:6d}", *numbers]).rstrip())
    return lines


def _cell(row: RowScore, key: str) -> str:
    """Write a measure with half of its interval; empty for one that the row has not."""
    if key not in row.measures:
        return ""
    low, high = row.intervals.get(key, (0.0, 0.0))
    spread = f" ±{(high - low) / 2:.2g}" if high > low else ""
    return f"{row.measures[key]:.4f}{spread}"


def lines_of(scores: Scores, *, out: Path) -> list[str]:
    """Say all of a model's scores in lines."""
    lines = table(scores.rows.values(), measures=scores.measures)
    for name, judge in scores.judges.items():
        lines += [f"{name}, {row}: {verdict_line(verdict)}" for row, verdict in judge.details.items()]
        if CHOSE in judge.protocol:
            lines.append(
                f"{name} chose the images of {scores.subject.checkpoint}, so its own score says little."
            )
    for split, meter in (scores.facts.captions_heard or {}).items():
        matched, shuffled, null = (
            "unknown" if loss is None else f"{loss:.3f}" for loss in (meter.own, meter.wrong, meter.empty)
        )
        lines.append(
            f"{split}: image loss {matched} nats per code, shuffled captions {shuffled}, null caption {null}"
            f" ({meter.num_pictures} images)"
        )
    one = scores.protocol
    lines.append(f"{one.n:,} captions against {one.reference}, {one.features}, {one.resize}.")
    return [*lines, f"{scores.note}\nAll of it: {out / scores.file}".lstrip()]


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """Say how often each attribute is as captions state it."""
    if not verdict["accuracy"]:
        return "no caption states a kind, colour, skin tone, flag or count, so there is no measure"
    counts, averaged = verdict["n"], verdict["averaged"]
    return ", ".join(
        f"{name} {share:.0%} of {counts[name]}" + ("" if name in averaged else " (too few for the mean)")
        for name, share in verdict["accuracy"].items()
    )
