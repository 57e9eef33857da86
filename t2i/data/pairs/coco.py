"""COCO as it is unpacked: annotations/captions_*.json and the picture folders."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from t2i.data.pairs.pair import Entry, file_inside, read_file
from t2i.errors import DataError
from t2i.plain import Kind, check_keys, read_json


def read_coco(left_out: Counter[str], *, folder: Path) -> Iterator[Entry]:
    """Make a pair of each caption, in order of picture and caption, with keys PICTURE-NUMBER.

    Where there are train and val captions, the val pictures are heldout; else the picture's id decides.

    Raises:
        DataError: there are no annotations, or no folder with their pictures.
    """
    files = caption_files(folder)
    for name, file in files.items():
        images, captions = read_annotations(file)
        pictures = _picture_folder(folder, name)
        for image in sorted(images, key=lambda image: int(image["id"])):
            path = file_inside(pictures, image["file_name"])
            if path is None:
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


def read_annotations(file: Path) -> tuple[list[dict[str, Any]], dict[int, list[tuple[int, str]]]]:
    """Read a caption file: its pictures, and (id, caption) by the picture's id.

    Raises:
        DataError: it is none.
    """
    content = read_json(file)
    check_keys(content, {"images": list, "annotations": list}, where=file)
    captions: dict[int, list[tuple[int, str]]] = {}
    for image in content["images"]:
        _check_entry(image, {"id": int, "file_name": str}, where=f"{file}: images")
    for note in content["annotations"]:
        _check_entry(note, {"id": int, "image_id": int, "caption": str}, where=f"{file}: annotations")
        captions.setdefault(note["image_id"], []).append((note["id"], note["caption"]))
    return content["images"], captions


def _check_entry(entry: Any, wanted: dict[str, Kind], *, where: str) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{where} hold {entry!r:.80}; wanted is an object of keys.")
    check_keys(entry, wanted, where=where)


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
