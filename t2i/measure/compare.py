"""Two scores side by side, if they were measured by one protocol."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from t2i.errors import UserError
from t2i.files import check_keys, read_json
from t2i.measure.protocol import CLIP, SCORES, Protocol, RowScore, Subject
from t2i.runs.eval_results import read_eval_results


@dataclass(frozen=True)
class ReadScores:
    """A scores.json, as far as scores are compared."""

    measures: list[str]
    rows: dict[str, RowScore]
    entries: dict[str, object]
    """All of it."""


def read_scores(file: Path) -> ReadScores:
    """Read a scores.json, that of a folder, or a file of .eval_results/ that an export holds.

    Raises:
        UserError: the file holds no scores.
    """
    file = file / SCORES if file.is_dir() else file
    is_listed = file.suffix in (".yaml", ".yml")
    scores = read_eval_results(file) if is_listed else read_json(file, error=UserError)
    where = f"{file} is no scores.json"
    check_keys(scores, {"rows": dict, "measures": list}, where=where, error=UserError)
    measures = [str(measure) for measure in scores["measures"]]
    for row in scores["rows"]:
        check_keys(scores["rows"], {row: {"what": str, "n": int}}, where=where, error=UserError)
    rows = {
        name: RowScore(row["what"], n=row["n"], measures={key: row[key] for key in measures if key in row})
        for name, row in scores["rows"].items()
    }
    return ReadScores(measures, rows=rows, entries=scores)


def check_protocols(a: ReadScores, b: ReadScores) -> None:
    """Refuse scores that were measured by different protocols.

    Raises:
        UserError: the entries that differ, one per line.
    """
    keys = tuple(each.name for each in fields(Protocol))
    if CLIP in a.entries and CLIP in b.entries:
        keys += (CLIP,)
    # One wrong comparison costs more than a refused one: FID moves more by its protocol than by most improvements.
    lines = differing_entries(_in_todays_words(a.entries), _in_todays_words(b.entries), keys=keys)
    if lines:
        raise UserError("These scores were measured by different protocols:\n" + "\n".join(lines))


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
        numbers = [f"{row.measures[key]:21.4f}" if key in row.measures else " " * 21 for key in measures]
        lines.append(" ".join([f"{row.what:56s}", f"{row.n:6d}", *numbers]).rstrip())
    return lines
