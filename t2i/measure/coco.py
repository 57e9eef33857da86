"""MS COCO val2014 as a scoring task: a fixed list of captions, and the pictures that drawn ones are compared with.

A COCO folder holds annotations/captions_val2014.json and val2014/*.jpg, as https://cocodataset.org distributes them.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from t2i.data.hashing import hash_uniform
from t2i.errors import DataError, UserError
from t2i.measure.features import cache_folder
from t2i.measure.pictures import Pictures, read_file
from t2i.measure.reference import Reference
from t2i.measure.score import Task

CAPTIONS = Path("annotations", "captions_val2014.json")
PICTURES = "val2014"
NUM_SAMPLES = 30_000
"""What papers draw."""

CROP_RULE = "centre square of the shorter side, PIL Lanczos"
CAPTIONS_RULE = (
    "pictures of captions_val2014.json in the order of sha256(coco, {seed}, picture id), each with its first caption"
    " by id; then each with its second, and so on; the first {num_samples}"
)


@dataclass(frozen=True)
class Caption:
    """One sentence that a person wrote about one picture."""

    caption_id: int
    picture_id: int
    text: str

    @property
    def name(self) -> str:
        """Name its drawn picture: the picture's id as COCO writes it, and its own."""
        return f"{self.picture_id:012d}_{self.caption_id}"


@dataclass(frozen=True)
class Coco:
    """What captions_val2014.json says."""

    files: dict[int, Path]
    """Picture id -> file, by id."""
    captions: dict[int, list[Caption]]
    """Picture id -> its captions, by id."""


def coco_task(folder: Path, *, image_size: int, num_samples: int, seed: int) -> Task:
    """Make the task of scoring on a COCO folder: every val2014 picture is the reference.

    Args:
        image_size: pixels a side that the model draws.
        num_samples: captions drawn; more than there are pictures takes second captions.
        seed: which of the captions.

    Raises:
        DataError: the folder is not of COCO's layout, or pictures are missing.
        UserError: more captions asked than there are.
    """
    coco = read_coco(folder)
    chosen = choose_captions(coco.captions, num_samples=num_samples, seed=seed)
    own_ids = list(dict.fromkeys(caption.picture_id for caption in chosen))
    places = {picture_id: place for place, picture_id in enumerate(coco.files)}
    sizes = _sizes(list(coco.files.values()))
    return Task(
        data="MS COCO val2014",
        captions={caption.name: caption.text for caption in chosen},
        captions_rule=CAPTIONS_RULE.format(seed=seed, num_samples=f"{num_samples:,}"),
        own=_pictures([coco.files[picture_id] for picture_id in own_ids], size=image_size),
        reference=Reference(
            name=f"all {len(coco.files):,} pictures of MS COCO val2014",
            pictures=_pictures(list(coco.files.values()), size=image_size),
            made_of={"pictures": sizes, "crop": CROP_RULE, "image_size": image_size},
            cache=cache_folder() / "reference",
        ),
        own_places=[places[picture_id] for picture_id in own_ids],
    )


def read_coco(folder: Path) -> Coco:
    """Read the captions file of a COCO folder.

    Raises:
        DataError: it is missing, or not of COCO's schema.
    """
    file = folder / CAPTIONS
    if not file.is_file():
        raise DataError(
            f"{file} is missing; --coco wants a folder with {CAPTIONS} and {PICTURES}/*.jpg (cocodataset.org)."
        )
    try:
        content = json.loads(file.read_text())
        files = {image["id"]: folder / PICTURES / image["file_name"] for image in content["images"]}
        captions: dict[int, list[Caption]] = {}
        for row in sorted(content["annotations"], key=lambda row: row["id"]):
            text = " ".join(row["caption"].split())
            files[row["image_id"]]  # a caption of no picture is an error
            captions.setdefault(row["image_id"], []).append(Caption(row["id"], row["image_id"], text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not COCO's: wanted images (id, file_name) and annotations (id, image_id, caption);"
            f" found {type(error).__name__} {error}."
        ) from error
    return Coco(files=dict(sorted(files.items())), captions=captions)


def choose_captions(captions: dict[int, list[Caption]], *, num_samples: int, seed: int) -> list[Caption]:
    """Choose captions by CAPTIONS_RULE: distinct pictures first.

    Raises:
        UserError: there are fewer.
    """
    total = sum(map(len, captions.values()))
    if not 2 <= num_samples <= total:
        raise UserError(
            f"--num-samples is {num_samples:,}; wanted 2 to the {total:,} captions that there are."
        )
    order = sorted(captions, key=lambda picture_id: hash_uniform("coco", seed, picture_id))
    most = max(map(len, captions.values()))
    rounds = [captions[each][turn] for turn in range(most) for each in order if turn < len(captions[each])]
    return rounds[:num_samples]


def centre_crop_lanczos(image: Image.Image, *, size: int) -> Image.Image:
    """Cut the centre square of the shorter side out and resize it to size x size (CROP_RULE).

    The cut comes first, so that the filter sees nothing outside the square.

    Source: the rule of GigaGAN's evaluation, https://github.com/mingukkang/GigaGAN
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def _pictures(files: list[Path], *, size: int) -> Pictures:
    return Pictures(
        [partial(read_file, file) for file in files], crop=partial(centre_crop_lanczos, size=size)
    )


def _sizes(files: list[Path]) -> list[list[str | int]]:
    """List names and bytes of the files; all of them must be there before anything is drawn."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of the {len(files):,} pictures of {CAPTIONS} are missing, first {missing[0]}."
        )
    return [[file.name, file.stat().st_size] for file in files]
