"""COCO as it is unpacked: annotations/captions_*.json and the picture folders."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from t2i.data.pairs.pair import Entry, read_file
from t2i.errors import DataError


def read_coco(left_out: Counter[str], *, folder: Path) -> Iterator[Entry]:
    """Make a pair of each caption, in order of picture and caption, with keys PICTURE-NUMBER.

    Where there are train and val captions, the val pictures are heldout; else the picture's id decides.

    Raises:
        DataError: there are no annotations, or no folder with their pictures.
    """
    files = caption_files(folder)
    for name, file in files.items():
        content = json.loads(file.read_text())
        pictures = _picture_folder(folder, name)
        captions: dict[int, list[tuple[int, str]]] = {}
        for note in content["annotations"]:
            captions.setdefault(note["image_id"], []).append((note["id"], note["caption"]))
        for image in sorted(content["images"], key=lambda image: int(image["id"])):
            path = pictures / image["file_name"]
            if not path.is_file():
                left_out["annotations name a picture that is not in its folder"] += 1
                continue
            for number, (_, caption) in enumerate(sorted(captions.get(image["id"], []))):
                yield Entry(
                    f"{image['id']:012d}-{number}",
                    caption,
                    partial(read_file, path),
                    group=str(image["id"]),
                    split=_own_split(name, files),
                )


def caption_files(folder: Path) -> dict[str, Path]:
    """Find the caption files by COCO's names of splits, such as val2014.

    Raises:
        DataError: there are none.
    """
    files = sorted((folder / "annotations").glob("captions_*.json"))
    if not files:
        raise DataError(f"coco:{folder} has no annotations/captions_*.json.")
    return {file.stem.removeprefix("captions_"): file for file in files}


def has_both(files: dict[str, Path]) -> bool:
    """Tell whether there are val captions and others."""
    return len({name.startswith("val") for name in files}) == 2


def _own_split(name: str, files: dict[str, Path]) -> str:
    if not has_both(files):
        return ""
    return "heldout" if name.startswith("val") else "train"


def _picture_folder(folder: Path, name: str) -> Path:
    candidates = (folder / name, folder / "images" / name)
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise DataError(f"coco:{folder} has captions_{name}.json, but neither {name}/ nor images/{name}/.")
    return found
