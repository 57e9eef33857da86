"""MS COCO val2014 as a scoring task: a fixed list of captions, and all images as the reference.

A COCO folder holds annotations/captions_val2014.json and val2014/*.jpg (or images/val2014/*.jpg), as
https://cocodataset.org distributes them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from t2i.data.sources.caption_list import read_caption_list
from t2i.data.sources.coco import Caption, CaptionFile, read_captions
from t2i.errors import DataError, UserError
from t2i.files import hash_uniform, sha256_of
from t2i.measure.feature_cache import Reference
from t2i.measure.features import cache_folder
from t2i.measure.images import LazyImages, read_image
from t2i.measure.score import Task

CAPTIONS_FILE = Path("annotations", "captions_val2014.json")
IMAGES = "val2014"
NUM_SAMPLES = 30_000
"""Images that papers draw."""

# This and the two rules below are parts of the protocol: scores with other words there are not compared.
LANCZOS_CROP = "centre square of the shorter side, PIL Lanczos"
DRAWN_RULE = (
    "images of captions_val2014.json in the order of sha256(coco, {seed}, image id), each with its first caption"
    " by id; then each with its second, and so on; the first {num_samples}"
)

LISTED_RULE = (
    "the first {num_samples} captions of a list with SHA-256 {sha256}, each image's first before all others; where"
    " it names no images, a caption is of the first image by id that has it"
)


@dataclass(frozen=True)
class Choice:
    """Captions in the order of drawing, each image's first one before all others, and how they were chosen."""

    captions: list[Caption]
    rule: str


def coco_task(coco: CaptionFile, choice: Choice, *, image_size: int) -> Task:
    """Make the task of scoring on COCO: every val2014 image is the reference.

    Args:
        image_size: pixels per side that the model draws.

    Raises:
        DataError: images are missing, or too few to fit a Gaussian to each row.
    """
    chosen = choice.captions
    # Each image once, though five captions may be drawn: repeated, it would count five times in the matched row.
    own_ids = list(dict.fromkeys(caption.image_id for caption in chosen))
    if len(own_ids) < 2 or len(coco.images) < 4:
        raise DataError(
            f"The captions are of {len(own_ids)} of {len(coco.images)} images; expected at least 2 of 4."
        )
    places = {image_id: place for place, image_id in enumerate(coco.images)}
    sizes = _sizes(list(coco.images.values()))
    return Task(
        data="MS COCO val2014",
        captions={name_of(caption): caption.text for caption in chosen},
        captions_rule=choice.rule,
        own=_images([coco.images[image_id] for image_id in own_ids], size=image_size),
        # All of val2014: sampled anew for each list, the reference would move FID by more than most improvements.
        reference=Reference(
            name=f"all {len(coco.images):,} images of MS COCO val2014",
            images=_images(list(coco.images.values()), size=image_size),
            # By names and sizes: hashing its 6 GB would take minutes before each measure.
            which={"pictures": sizes},
            crop=LANCZOS_CROP,
            image_size=image_size,
            cache=cache_folder() / "reference",
        ),
        own_places=[places[image_id] for image_id in own_ids],
        image_ids=[caption.image_id for caption in chosen],
    )


def check_val2014(folder: Path) -> None:
    """Check that there are captions in a COCO folder, before anything is read.

    Raises:
        DataError: there are none.
    """
    if not (folder / CAPTIONS_FILE).is_file():
        raise DataError(
            f"{folder / CAPTIONS_FILE} is missing; --coco expects a folder with {CAPTIONS_FILE} and {IMAGES}/*.jpg"
            " (cocodataset.org)."
        )


def read_val2014(folder: Path) -> CaptionFile:
    """Read the captions of a COCO folder's val2014.

    Raises:
        DataError: the captions are missing, or not of COCO's schema.
    """
    check_val2014(folder)
    return read_captions(folder, IMAGES)


def drawn_captions(coco: CaptionFile, *, num_samples: int, seed: int) -> Choice:
    """Choose captions by DRAWN_RULE: distinct images first.

    Raises:
        UserError: there are fewer captions than num_samples.
    """
    captions = coco.captions
    total = sum(map(len, captions.values()))
    _check_count(num_samples, total=total)
    # By hashes of ids, not by a library's generator, whose stream may change with its version.
    order = sorted(captions, key=lambda image_id: hash_uniform("coco", seed, image_id))
    most = max(map(len, captions.values()))
    rounds = [captions[each][turn] for turn in range(most) for each in order if turn < len(captions[each])]
    return Choice(rounds[:num_samples], DRAWN_RULE.format(seed=seed, num_samples=f"{num_samples:,}"))


def listed_captions(coco: CaptionFile, file: Path, *, num_samples: int | None) -> Choice:
    """Take the captions of a published list, by LISTED_RULE.

    Args:
        num_samples: how many captions from the start of the list; None for all.

    Raises:
        DataError: the list cannot be read, or a row is of no image of val2014.
        UserError: the list has fewer captions than num_samples.
    """
    listed = read_caption_list(file)
    count = len(listed) if num_samples is None else num_samples
    _check_count(count, total=len(listed))
    ids = sorted(coco.captions, reverse=True)  # the first image by id overwrites those after it
    by_text = {caption.text: image_id for image_id in ids for caption in coco.captions[image_id]}
    captions = []
    for number, row in enumerate(listed[:count]):
        image_id = by_text.get(row.text) if row.image_id is None else row.image_id
        if image_id is None or image_id not in coco.images:
            wanted = f"caption {row.text!r:.80}" if image_id is None else f"image {image_id}"
            raise DataError(f"{file}, row {number + 1}: val2014 has no {wanted}.")
        captions.append(Caption(number, image_id, row.text))
    firsts = {caption.image_id: caption.caption_id for caption in reversed(captions)}
    # Real images are compared once each, beside their first captions; the sort is stable otherwise.
    captions.sort(key=lambda caption: firsts[caption.image_id] != caption.caption_id)
    return Choice(captions, LISTED_RULE.format(sha256=sha256_of(file), num_samples=f"{count:,}"))


def _check_count(num_samples: int, *, total: int) -> None:
    if not 2 <= num_samples <= total:
        raise UserError(f"--num-samples is {num_samples:,}; expected 2 to {total:,}, the number of captions.")


def name_of(caption: Caption) -> str:
    """Name the drawn image of a caption: the image id as COCO writes it, and the caption id."""
    return f"{caption.image_id:012d}_{caption.caption_id}"


def centre_crop_lanczos(image: Image.Image, *, size: int) -> Image.Image:
    """Crop to the centre square of the shorter side and resize it to size x size (LANCZOS_CROP).

    The crop comes first, so that the filter sees nothing outside the square.

    Source: the rule of GigaGAN's evaluation, https://github.com/mingukkang/GigaGAN
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def _images(files: list[Path], *, size: int) -> LazyImages:
    return LazyImages(
        [partial(read_image, file) for file in files], crop=partial(centre_crop_lanczos, size=size)
    )


def _sizes(files: list[Path]) -> list[list[str | int]]:
    """List names and sizes of the files, in bytes; all must exist before anything is drawn."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of the {len(files):,} images of {CAPTIONS_FILE} are missing, first {missing[0]}."
        )
    return [[file.name, file.stat().st_size] for file in files]
