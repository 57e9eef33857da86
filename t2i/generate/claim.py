"""The folder that images are drawn into: those of one drawing, whose settings lie beside them."""

from collections.abc import Mapping
from pathlib import Path

from t2i.errors import UserError
from t2i.files import read_json, write_json

LATER = {"compile": False, "best_of": 1, "best_by": "likelihood"}
"""Settings that there were not always, with the values that draw what was drawn before."""
UNSAID = {**LATER, "dtype": "float32", "window": None, "ranked_by": None}
"""Settings that are left out where they have these values."""
ONCE_UNSAID = ("image_tokenizer",)
"""Settings that folders of older versions do not say: they differ only where both say them."""
HASHES = {
    "weights": "other weights",
    "captions_sha256": "other captions",
    "image_tokenizer": "another image tokenizer",
}
"""Settings whose values say nothing to a reader, and what is said where they differ."""


def claim_folder(record: Path, paths: list[Path], *, settings: dict[str, object]) -> None:
    """Make the folders, and see that images in them are of these settings, which `record` holds.

    Raises:
        UserError: they are not, or it is not known what they are of.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    there = next((path for path in paths if path.exists()), None)
    # Settings are written before any image, so an image without them is somebody else's and would be scored as ours.
    if there is not None and not record.exists():
        raise UserError(
            f"{there} was not drawn here: {record.parent} has no {record.name}. Choose another --out."
        )
    _same_settings(record, settings, num_images=len(paths))
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)


def differing_settings(
    found: Mapping[str, object], asked: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """List the settings in which a drawing that is there differs from one that is asked for: both values of each."""
    # Both ways: what only the one that is there says, such as the best of eight, draws other images too.
    there, wished = {**UNSAID, **found}, {**UNSAID, **asked}
    wished = {key: value for key, value in wished.items() if key not in ONCE_UNSAID or key in there}
    return {key: (there.get(key), value) for key, value in wished.items() if there.get(key) != value}


def _same_settings(file: Path, settings: dict[str, object], *, num_images: int) -> None:
    if file.exists():
        found = read_json(file)
        changed = [
            HASHES.get(key, f"{key}: {there} there, {asked} asked")
            for key, (there, asked) in differing_settings(found, settings).items()
        ]
        if changed:
            raise UserError(
                f"{file.parent} holds images of other settings ({'; '.join(changed)}). Choose another --out."
            )
        return
    write_json(
        file, {**settings, "images": num_images}
    )  # each rank writes the same, and whichever is last is kept
