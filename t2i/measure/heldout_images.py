"""Held-out pictures of the model's own data as a scoring task: the yardsticks that need no COCO.

The held-out pairs are read again from their source and cut in two halves: one is the reference of every row, the
captions of the other are drawn.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice

from t2i.config import DataConfig
from t2i.data.shards.integrity import Sample
from t2i.data.shards.manifest import Manifest, read_manifest_file
from t2i.data.sources import Pair, Source, reopen_source
from t2i.errors import DataError
from t2i.files import hash_uniform
from t2i.measure.feature_cache import Reference
from t2i.measure.heldout import HELDOUT_SPLITS, CaptionMeter, caption_meter
from t2i.measure.images import Pictures, encode, readable
from t2i.measure.score import Task
from t2i.model.backbone import trained_seq_len
from t2i.runs.loading import DATA_MANIFEST, OpenedModel
from t2i.tokens.image import centre_crop_resize

BICUBIC_CROP = "centre square of the shorter side, PIL bicubic"
METER_PICTURES = 2_048
"""Images that a caption's worth is measured on: its mean is known long before a large split is read."""
HALF_RULE = "held-out captions of {source}, by hash of the key"


@dataclass(frozen=True)
class Halves:
    """Held-out pairs cut in two by a hash of the key."""

    reference: list[Pair]
    drawn: list[Pair]


def heldout_halves(source: Source, *, num_samples: int | None) -> Halves:
    """Read the held-out pairs of a source and cut them into halves of equal size.

    Args:
        num_samples: pictures a half; None for as many as there are.

    Raises:
        DataError: the source has fewer than 20 held-out pictures that can be read, or fewer are asked for.
    """
    pairs: dict[str, Pair] = {}
    for pair in source.pairs:
        if pair.split in HELDOUT_SPLITS:
            # An image of many captions comes once: if both halves had it, *real* would be near zero for that alone.
            pairs.setdefault(pair.group or pair.key, pair)
    # By hash, so that the halves stay what they are when the source lists its images in another order.
    ordered = sorted(pairs.values(), key=lambda pair: hash_uniform("halves", pair.key))
    found = list(islice(readable(ordered), None if num_samples is None else 2 * num_samples))
    half = len(found) // 2
    if half < 10:
        raise DataError(f"{source.name} gives {len(found)} held-out pictures; a distance needs at least 20.")
    return Halves(reference=found[half : 2 * half], drawn=found[:half])


def halves_task(manifest: Manifest, *, num_samples: int | None) -> Task:
    """Make the task of scoring on a manifest's held-out pictures; num_samples as in heldout_halves."""
    halves = heldout_halves(reopen_source(manifest), num_samples=num_samples)
    source, size = manifest.source, manifest.image_size
    reference = Reference(
        name=f"{len(halves.reference)} held-out pictures of {source}",
        pictures=pictures(halves.reference, size=size),
        which={"keys": [pair.key for pair in halves.reference], "source": source},
        crop=BICUBIC_CROP,
        image_size=size,
    )
    return Task(
        data=f"{source}, held-out pictures",
        captions={f"{index:05d}": pair.caption for index, pair in enumerate(halves.drawn)},
        captions_rule=HALF_RULE.format(source=source),
        own=pictures(halves.drawn, size=size),
        reference=reference,
    )


def read_data_manifest(checkpoint: OpenedModel) -> Manifest:
    """Read what a run or an exported folder tells of its data.

    Raises:
        DataError: it tells nothing.
    """
    path = checkpoint.home / DATA_MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing, so the held-out pictures of this model are not known.")
    return read_manifest_file(path)


def caption_meters(checkpoint: OpenedModel, manifest: Manifest) -> dict[str, CaptionMeter]:
    """Measure, per held-out split, the image loss under the right, a wrong and the empty caption, nats a code.

    At most METER_PICTURES of each, evenly spread.
    """
    source = reopen_source(manifest)
    mode = checkpoint.model.config.sequence_mode
    config = DataConfig(mode=mode, seq_len=trained_seq_len(checkpoint.model))
    meters = {}
    for split in HELDOUT_SPLITS:
        listed = [pair for pair in source.pairs if pair.split == split]
        spread = listed[:: max(1, len(listed) // METER_PICTURES)][:METER_PICTURES]
        pairs = list(readable(spread))
        if len(pairs) < 2:
            continue
        codes = encode(pictures(pairs, size=manifest.image_size), checkpoint.needed_image_tokenizer())
        samples = [
            Sample(
                key=pair.key,
                codes=row,
                caption_ids=checkpoint.text_tokenizer.encode(pair.caption).numpy(),
            )
            for pair, row in zip(pairs, codes, strict=True)
        ]
        meters[split] = caption_meter(
            checkpoint.model, samples, config=config, layout=checkpoint.layout, batch_size=32
        )
    return meters


def pictures(pairs: list[Pair], *, size: int) -> Pictures:
    """Line up pairs' pictures as the model sees them, size x size."""
    return Pictures([pair.open for pair in pairs], crop=partial(centre_crop_resize, size=size))
