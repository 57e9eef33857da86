"""Folders in the layouts of GenEval, GenEval 2 and DPG-Bench, whose judges are run where they are installed.

GenEval: line N of evaluation_metadata.jsonl becomes a folder (00000/, 00001/, ...) with that line as
metadata.jsonl and four images, samples/0000.png to 0003.png (README of https://github.com/djghosh13/geneval).

GenEval 2: the prompts of geneval2_data.jsonl, an image each, and image_paths.json, which maps prompts to files (README
of https://github.com/facebookresearch/GenEval2, --image_filepath_data).

DPG-Bench: a prompt file STEM.txt becomes STEM.png, four images in two rows, in a folder of nothing else
(dpg_bench/compute_dpg_bench.py of https://github.com/TencentQQGYLab/ELLA takes every file of the folder for one;
--pic-num 4, --resolution of one image).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from t2i.errors import DataError, UserError
from t2i.files import check_keys, is_file, lines_of, parse_json, valid_text, write_whole
from t2i.generate.beside import SETTINGS
from t2i.generate.grid import grid

PER_PROMPT = 4
"""Images per prompt of GenEval and DPG-Bench."""
IMAGE_PATHS = "image_paths.json"

Layout = Literal["geneval", "geneval2", "dpg"]


@dataclass(frozen=True)
class Benchmark:
    """What is drawn for one benchmark, and where its scorer looks."""

    captions: dict[str, str]
    """Image name -> prompt."""
    drawn: Path
    """Folder that the images are drawn into."""
    metadata: dict[Path, str]
    """Other files of the layout, and their text."""
    sheets: dict[Path, list[Path]]
    """Sheets of two columns, and the drawn images of each."""

    def check_sheets(self) -> None:
        """Refuse to replace sheets whose images are not there: they may be another model's.

        Raises:
            UserError: there are such sheets.
        """
        there = next((path for path in self.sheets if path.exists()), None)
        if there is not None and not (self.drawn / SETTINGS).exists():
            raise UserError(
                f"{there} was not drawn here: {self.drawn} has no {SETTINGS}. Choose another --out."
            )

    def write_metadata(self) -> None:
        """Write the files beside the images; called in one process."""
        for path, text in self.metadata.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)

    def write_sheets(self) -> None:
        """Combine drawn images into sheets, once all of them exist; called in one process."""
        for path, images in self.sheets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            grid([Image.open(image).convert("RGB") for image in images], columns=2).save(path)


def read_benchmark(layout: Layout, *, prompts: Path, out: Path) -> Benchmark:
    """Read a benchmark's prompts and plan its folder.

    Args:
        prompts: GenEval's evaluation_metadata.jsonl, GenEval 2's geneval2_data.jsonl, or DPG-Bench's folder of .txt
            files.
        out: folder that the scorer reads.

    Raises:
        DataError: there are no such prompts.
    """
    readers = {"geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg}
    return readers[layout](prompts, out)


def _rows(file: Path, *, usual: str) -> list[tuple[str, str]]:
    """Read the lines of a .jsonl file of prompts, which a benchmark calls `usual`: each line and its prompt."""
    if not is_file(file):
        raise DataError(f"--prompts {file} is no file; {usual}.")
    rows = []
    for number, line in enumerate(lines_of(file.read_text(encoding="utf-8-sig", errors="replace")), 1):
        if line.strip():
            values = parse_json(line, where=f"{file}, line {number}")
            check_keys(values, {"prompt": str}, where=f"{file}, line {number}")
            # Half a surrogate is valid JSON, and no text.
            rows.append((line, valid_text(values["prompt"])))
    if not rows:
        raise DataError(f"--prompts {file} is empty; {usual}, which has a JSON object per line.")
    return rows


def _geneval2(file: Path, out: Path) -> Benchmark:
    prompts = [prompt for _, prompt in _rows(file, usual="GenEval 2's is geneval2_data.jsonl")]
    repeated = next((prompt for place, prompt in enumerate(prompts) if prompt in prompts[:place]), None)
    if repeated is not None:
        raise DataError(
            f"{file} has the prompt {repeated!r:.80} twice; GenEval 2 finds images by their prompts."
        )
    captions = {f"images/{number:05d}": prompt for number, prompt in enumerate(prompts)}
    # Whole paths: its scorer is run in a folder of its own.
    paths = {prompt: str((out / f"{name}.png").resolve()) for name, prompt in captions.items()}
    return Benchmark(
        captions=captions, drawn=out, metadata={out / IMAGE_PATHS: json.dumps(paths, indent=1)}, sheets={}
    )


def _geneval(file: Path, out: Path) -> Benchmark:
    rows = _rows(file, usual="GenEval's is evaluation_metadata.jsonl")
    captions: dict[str, str] = {}
    metadata = {}
    for number, (row, prompt) in enumerate(rows):
        captions |= dict.fromkeys(_names(f"{number:05d}/samples/", digits=4), prompt)
        metadata[out / f"{number:05d}" / "metadata.jsonl"] = (
            row  # as it stands: the scorer reads keys that we do not
        )
    return Benchmark(captions=captions, drawn=out, metadata=metadata, sheets={})


def _dpg(folder: Path, out: Path) -> Benchmark:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(
            f"--prompts {folder} holds no .txt file; DPG-Bench's is the folder dpg_bench/prompts."
        )
    # Beside `out`, not in it: the scorer takes every file of its folder for a sheet.
    whole = out.resolve()  # `.` has no name
    drawn = whole.with_name(f"{whole.name}-single")
    captions: dict[str, str] = {}
    sheets = {}
    for file in files:
        names = _names(f"{file.stem}_", digits=1)
        prompt = " ".join(file.read_text(encoding="utf-8-sig", errors="replace").split())
        if not prompt:
            raise DataError(f"--prompts: {file} is empty; expected a prompt.")
        captions |= dict.fromkeys(names, prompt)
        sheets[out / f"{file.stem}.png"] = [drawn / f"{name}.png" for name in names]
    return Benchmark(captions=captions, drawn=drawn, metadata={}, sheets=sheets)


def _names(prefix: str, *, digits: int) -> list[str]:
    return [f"{prefix}{place:0{digits}d}" for place in range(PER_PROMPT)]
