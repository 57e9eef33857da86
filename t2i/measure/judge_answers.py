"""Answers of judges behind HTTP, kept in a file: a second try asks only for what is missing."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from t2i.errors import DataError
from t2i.files import parse_json, write_whole

ANSWERS = "judge_answers.jsonl"
"""File beside the scores: an answer per line."""
Score = dict[str, float]
"""Measure -> number, of one image."""


def answer_key(image: Image.Image, caption: str, *, judge: str) -> str:
    """Name an answer by all that decides it: the judge with its revision, the caption and the pixels (hex SHA-256)."""
    pixels = np.asarray(image)  # (H, W, 3)
    said = json.dumps([judge, caption, pixels.shape])
    return hashlib.sha256(said.encode() + pixels.tobytes()).hexdigest()


def read_answers(file: Path) -> dict[str, Score]:
    """Read the answers that are kept, by their keys; a last line that was cut off is dropped from the file.

    Raises:
        DataError: the file holds something else.
    """
    if not file.is_file():
        return {}
    whole, _, torn = file.read_text().rpartition("\n")
    if torn:  # else the next answer would be written behind it
        write_whole(file, f"{whole}\n" if whole else "")
    lines = (parse_json(line, where=file) for line in whole.splitlines())
    answers = {}
    for line in lines:
        if not {"key", "score"} <= line.keys():
            raise DataError(f"{file} has a line without key and score: {json.dumps(line):.200}. Remove it.")
        answers[line["key"]] = line["score"]
    return answers


def keep_answers(file: Path, answers: Mapping[str, Score]) -> None:
    """Add answers to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(
            "".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in answers.items())
        )
