"""Scores in the forms that the hub reads: the card's model-index, and the files of .eval_results/.

Source: https://huggingface.co/docs/hub/eval-results.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from t2i.errors import UserError
from t2i.files import Kind, check_keys, parse_yaml, read_yaml_list

EVAL_RESULTS = ".eval_results"
"""Folder of an export, one file per file of scores."""
OF_ALL_ROWS = ("rows", "measures", "captions_heard", "judged")
"""Entries of scores.json that tell of more than the model's own images."""
NOTED = {"measure": str, "what": str, "n": int}
"""What notes say at least."""


def model_index(scores: dict[str, Any]) -> list[EvalResult]:
    """Return the model's measures as entries of a card's model-index, each with its protocol as arguments."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=_dataset_id(scores),
            dataset_name=scores["data"],
            metric_type=key,
            metric_name=f"{key} ({scores['n']:,} images, {scores['features']}, {scores['resize']})",
            metric_value=round(scores[key], 4),
            metric_args=_notes(scores, key),
        )
        for key in scores["measures"]
    ]


def eval_results(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the model's measures as entries of a file of .eval_results/.

    The form has one field for whatever else is to be said, a text. It holds n, the interval if there is one, and the
    protocol, as YAML, so that people and `compare` can read it.
    """
    return [
        {
            "dataset": {"id": _dataset_id(scores), "task_id": key},
            "value": scores[key],
            "notes": yaml.safe_dump(_notes(scores, key), sort_keys=False, allow_unicode=True),
        }
        for key in scores["measures"]
    ]


def write_eval_results(scores: dict[str, Any], *, file: Path) -> None:
    """Write a file of .eval_results/."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(eval_results(scores), sort_keys=False, allow_unicode=True))


def read_eval_results(file: Path) -> dict[str, Any]:
    """Read a file of .eval_results/ that an export holds, back into the form of scores.json.

    Raises:
        UserError: it is another file, or one whose notes do not say how the scores were measured.
    """
    where = f"{file} holds no scores of an export"
    entries = []
    for entry in read_yaml_list(file):
        kinds: dict[str, Kind] = {"entry": {"value": (int, float), "notes": str}}
        check_keys({"entry": entry}, kinds, where=where, error=UserError)
        entries.append((entry["value"], parse_yaml(entry["notes"], name=f"notes of {file}")))
    return _scores_of(entries, where=where)


def read_card(file: Path) -> dict[str, Any]:
    """Read the model-index of an export's card, back into the form of scores.json; values have four digits there.

    Raises:
        UserError: it is no card with the scores of an export, or it holds those of several data sets.
    """
    where = f"{file} holds no scores of an export"
    try:
        results = ModelCard.load(file).data.eval_results or []
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {error}") from error
    data = sorted({result.dataset_name for result in results})
    if len(data) != 1:
        raise UserError(
            f"{where}: its model-index has the data sets {', '.join(data) or 'none'}; expected one. Each file of scores"
            f" that an export holds, and each of its {EVAL_RESULTS}/, has those of one."
        )
    return _scores_of([(result.metric_value, result.metric_args) for result in results], where=where)


def _scores_of(entries: Iterable[tuple[Any, Any]], *, where: str) -> dict[str, Any]:
    """Put values, each with its notes, into the form of scores.json."""
    found: dict[str, Any] = {"measures": []}
    row: dict[str, Any] = {"intervals": {}}
    for value, notes in entries:
        kinds: dict[str, Kind] = {"value": (int, float), "notes": NOTED}
        check_keys({"value": value, "notes": notes}, kinds, where=where, error=UserError)
        rest = {name: said for name, said in notes.items() if name not in ("measure", "what", "interval")}
        key = notes["measure"]
        found["measures"].append(key)
        row |= {key: value, "what": notes["what"], "n": notes["n"]}
        if "interval" in notes:
            row["intervals"][key] = notes["interval"]
        found |= {**rest, key: value}
    return {**found, "rows": {"model": row}}


def _notes(scores: dict[str, Any], key: str) -> dict[str, Any]:
    """Return all that tells how a measure was taken."""
    row = scores["rows"]["model"]
    interval = row.get("intervals", {}).get(key)
    protocol = {
        name: value for name, value in scores.items() if name not in (*OF_ALL_ROWS, *scores["measures"], "n")
    }
    return {
        "measure": key,
        "what": row["what"],
        "n": scores["n"],
        **({} if interval is None else {"interval": list(interval)}),
        **protocol,
    }


def _dataset_id(scores: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", scores["data"].lower()).strip("-")
