"""COCO as it unpacks: annotations/captions_*.json and the image folders."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from t2i.data.sources.folder import file_inside
from t2i.data.sources.image import read_image_file
from t2i.data.sources.source import Entry, Tally
from t2i.errors import DataError
from t2i.files import Kind, check_keys, read_json


@dataclass(frozen=True)
class Caption:
    """One caption of one image."""

    caption_id: int
    image_id: int
    text: str
    """On one line."""


@dataclass(frozen=True)
class CaptionFile:
    """The content of one of COCO's captions files."""

    images: dict[int, Path]
    """Image id -> its file, which may be missing; sorted by id."""
    captions: dict[int, list[Caption]]
    """Image id -> its captions, sorted by caption id."""


def list_coco(tally: Tally, *, folder: Path) -> Iterator[Entry]:
    """List one entry per caption, in order of image and caption, with keys IMAGE-NUMBER.

    If there are train and val captions, the val images are heldout; otherwise a hash of the image's id decides.

    Raises:
        DataError: there are no annotations, or there is no folder with their images.
    """
    files = caption_files(folder)
    for name in files:
        content = read_captions(folder, name)
        for image_id, path in content.images.items():
            captions = content.captions.get(image_id, [])
            # An image without a caption is an entry too.
            tally.seen += max(len(captions), 1)
            if not captions:
                tally.left_out["no caption"] += 1
            elif file_inside(path.parent, path.name) is None:
                tally.left_out["annotations name an image that is not in its folder"] += len(captions)
                continue
            for number, caption in enumerate(captions):
                yield Entry(
                    f"{image_id:012d}-{number}",
                    caption.text,
                    partial(read_image_file, path),
                    # COCO has five captions per image, which must stay in one split.
                    group=str(image_id),
                    split=_own_split(name, files),
                    file=path,
                )


def read_captions(folder: Path, name: str) -> CaptionFile:
    """Read one captions file by COCO's name of its split, such as val2014.

    Raises:
        DataError: it does not follow COCO's schema, or there is no folder with its images.
    """
    file = folder / "annotations" / f"captions_{name}.json"
    home = _image_folder(folder, name)
    content = read_json(file)
    check_keys(content, {"images": list, "annotations": list}, where=file)
    images: dict[int, Path] = {}
    for image in content["images"]:
        _check_entry(image, {"id": int, "file_name": str}, where=f"{file}: images")
        # The base name alone: the file may come from a stranger, and `../` must not lead out of the folder.
        images[image["id"]] = home / Path(image["file_name"]).name
    captions: dict[int, list[Caption]] = {}
    for note in content["annotations"]:
        _check_entry(note, {"id": int, "image_id": int, "caption": str}, where=f"{file}: annotations")
        if note["image_id"] not in images:
            raise DataError(
                f"{file}: caption {note['id']} names image {note['image_id']}, which is not listed."
            )
        text = " ".join(note["caption"].split())
        captions.setdefault(note["image_id"], []).append(Caption(note["id"], note["image_id"], text))
    # Sorted by id, because the order of the keys and of the shards must not depend on the order in the file.
    for of_image in captions.values():
        of_image.sort(key=lambda caption: caption.caption_id)
    return CaptionFile(images=dict(sorted(images.items())), captions=captions)


def _check_entry(entry: object, wanted: dict[str, Kind], *, where: str) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{where} has {entry!r:.80}; expected an object of keys.")
    check_keys(entry, wanted, where=where)


def caption_files(folder: Path) -> dict[str, Path]:
    """Find the captions files, by COCO's names of its splits, such as val2014.

    Raises:
        DataError: there are none.
    """
    files = sorted((folder / "annotations").glob("captions_*.json"))
    if not files:
        raise DataError(f"coco:{folder} has no annotations/captions_*.json.")
    return {file.stem.removeprefix("captions_"): file for file in files}


def has_both(files: dict[str, Path]) -> bool:
    """Tell whether there are both val and other captions."""
    return len({name.startswith("val") for name in files}) == 2


def _own_split(name: str, files: dict[str, Path]) -> str:
    if not has_both(files):
        return ""
    return "heldout" if name.startswith("val") else "train"


def _image_folder(folder: Path, name: str) -> Path:
    candidates = (folder / name, folder / "images" / name)
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise DataError(f"coco:{folder} has captions_{name}.json, but neither {name}/ nor images/{name}/.")
    return found
