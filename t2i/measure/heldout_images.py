"""Held-out images of the model's own data as a scoring task, which needs no COCO.

The held-out pairs are read again from their source and cut into two halves. One half is the reference of every row;
the captions of the other are drawn.
"""

import math
from dataclasses import dataclass
from itertools import islice

from t2i.config import DataConfig
from t2i.data.shards.integrity import Sample
from t2i.data.shards.manifest import TRAIN, Manifest, read_manifest_file
from t2i.data.shards.reader import spread
from t2i.data.sources import Pair, Source, reopen_source
from t2i.data.sources.source import first_of_each_image
from t2i.errors import DataError, UserError
from t2i.files import hash_uniform
from t2i.measure.feature_cache import Reference
from t2i.measure.heldout import CaptionMeter, caption_meter
from t2i.measure.images import encode, images_of_pairs, readable
from t2i.measure.score import Task
from t2i.model.backbone import trained_seq_len
from t2i.runs.loading import DATA_MANIFEST, OpenedModel

BICUBIC_CROP = "centre square of the shorter side, PIL bicubic"
# A covariance of fewer has so low a rank that the distance says more of the sample than of the model.
LEAST_IMAGES = 20
"""Held-out images that a distance needs, half of them for the reference."""
METER_IMAGES = 2_048
"""Images of a split that caption sensitivity is measured on; a mean is settled long before a large split is read."""
HALF_RULE = "held-out captions of {source}, by hash of the key"
OTHER_HALF_RULE = f"{HALF_RULE}, the other half"


@dataclass(frozen=True)
class Halves:
    """Held-out pairs, split in two by a hash of the key."""

    reference: list[Pair]
    drawn: list[Pair]


def heldout_halves(source: Source, *, num_samples: int | None) -> Halves:
    """Read the held-out pairs of a source and split them into halves of equal size.

    Args:
        num_samples: images per half; None for as many as there are.

    Raises:
        DataError: fewer than LEAST_IMAGES held-out images can be read.
        UserError: fewer than half of them are asked for, or more than there are.
    """
    # An image of many captions comes once: if both halves had it, *real* would be near zero for that alone.
    pairs = first_of_each_image(pair for pair in source.pairs if pair.split != TRAIN)
    # By hash, so that the halves stay what they are when the source lists its images in another order.
    ordered = sorted(pairs, key=lambda pair: hash_uniform("halves", pair.key))
    found = list(islice(readable(ordered), None if num_samples is None else 2 * num_samples))
    if len(found) < max(LEAST_IMAGES, 2 * (num_samples or 0)):
        found = list(readable(ordered))  # all that there are, to say how many
    half = len(found) // 2
    if len(found) < LEAST_IMAGES:
        raise DataError(
            f"{source.name} has {len(found)} held-out images; a distance needs at least {LEAST_IMAGES}."
            f" {how_to_hold_out(source, count=LEAST_IMAGES)}".rstrip()
        )
    if num_samples is not None and not LEAST_IMAGES // 2 <= num_samples <= half:
        raise UserError(
            f"--num-samples is {num_samples:,}; expected {LEAST_IMAGES // 2} to {half:,}, half of the"
            f" {len(found):,} held-out images of {source.name}. The other half is the reference."
        )
    # Equal halves: the bias of a distance depends on both sizes, so rows compare only with n the same.
    return Halves(reference=found[half : 2 * half], drawn=found[:half])


def how_to_hold_out(
    source: Source, *, count: int, again: str = ": prepare again with it, into a new folder"
) -> str:
    """Say with which share a source has at least `count` held-out images; empty if its split has another rule.

    Args:
        again: what to do with the flag.
    """
    placed = {hash_uniform(pair.group or pair.key): pair.split for pair in source.pairs}
    if any((place < source.heldout_share) != (split == "heldout") for place, split in placed.items()):
        return ""
    # A tenth more: some may be broken. The places are those that decide the split, so the share is no guess.
    places, wanted = sorted(placed), count + -(-count // 10)
    if len(places) <= wanted:
        return f"It has {len(places)} images in all, which is too few to hold so many out: add images."
    share = min(math.floor(places[wanted - 1] * 100 + 1) / 100, 0.99)
    return f"Of its {len(places):,} images `--heldout-share {share:g}` holds out enough{again}."


def halves_task(manifest: Manifest, *, num_samples: int | None, other_half: bool = False) -> Task:
    """Make the task of scoring on a manifest's held-out images.

    Args:
        num_samples: as in heldout_halves.
        other_half: draw the captions of the half that is the reference otherwise, and compare with the half that is
            drawn otherwise.
    """
    halves = heldout_halves(reopen_source(manifest), num_samples=num_samples)
    if other_half:
        halves = Halves(reference=halves.drawn, drawn=halves.reference)
    source, size = manifest.source, manifest.image_size
    reference = Reference(
        name=f"{len(halves.reference)} held-out images of {source}",
        images=images_of_pairs(halves.reference, size=size),
        which={"keys": [pair.key for pair in halves.reference], "source": source},
        crop=BICUBIC_CROP,
        image_size=size,
    )
    return Task(
        data=f"{source}, held-out images",
        captions={f"{index:05d}": pair.caption for index, pair in enumerate(halves.drawn)},
        captions_rule=(OTHER_HALF_RULE if other_half else HALF_RULE).format(source=source),
        own=images_of_pairs(halves.drawn, size=size),
        # No own_places: the two halves share no image, so no row is compared with itself.
        reference=reference,
    )


def read_data_manifest(checkpoint: OpenedModel) -> Manifest:
    """Read the data manifest of a run or an exported folder.

    Raises:
        DataError: there is none.
    """
    path = checkpoint.home / DATA_MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing, so the held-out images of this model are not known.")
    return read_manifest_file(path)


def caption_meters(checkpoint: OpenedModel, manifest: Manifest) -> dict[str, CaptionMeter]:
    """Measure caption sensitivity per held-out split: image loss under three captions, in nats per code.

    At most METER_IMAGES images of each split are read, evenly spread.
    """
    source = reopen_source(manifest)
    mode = checkpoint.model.config.sequence_mode
    config = DataConfig(mode=mode, seq_len=trained_seq_len(checkpoint.model))
    meters = {}
    for split in (split for split in manifest.counts if split != TRAIN):
        listed = [pair for pair in source.pairs if pair.split == split]
        # Spread and not the first: sources list images by folder or class, so the first are of few kinds.
        pairs = list(readable(spread(listed, METER_IMAGES)))
        if len(pairs) < 2:  # no shuffled caption to compare with
            continue
        codes = encode(images_of_pairs(pairs, size=manifest.image_size), checkpoint.needed_image_tokenizer())
        samples = [
            Sample(
                key=pair.key,
                codes=row,
                caption_ids=checkpoint.text_tokenizer.encode(pair.caption).numpy(),
                style=pair.style,
            )
            for pair, row in zip(pairs, codes, strict=True)
        ]
        meters[split] = caption_meter(
            checkpoint.model,
            samples,
            config=config,
            layout=checkpoint.layout,
            batch_size=32,
            description=f"captions heard, {split}",
        )
    return meters
