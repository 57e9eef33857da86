"""Finish a preparation: merge the units, store the tokenizers and a round trip, and write the manifest last of all."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from t2i.config import PrepareConfig
from t2i.data.prepare.arguments import Arguments, changed_from_defaults, given_ids, maker_of, text_maker_of
from t2i.data.prepare.encode import Encoder
from t2i.data.prepare.merge import Merged, merge_units
from t2i.data.prepare.preview import write_round_trip
from t2i.data.shards.accounts import by_kind, check_accounts, most_frequent, num_pairs
from t2i.data.shards.baselines import code_floors
from t2i.data.shards.manifest import (
    BROKEN,
    IMAGE_TOKENIZER,
    TEXT_TOKENIZER,
    USUAL_SPLITS,
    Manifest,
    side_files,
)
from t2i.data.shards.reader import read_split
from t2i.data.sources import Source
from t2i.data.sources.listing import check_same_listing, list_source
from t2i.errors import DataError
from t2i.files import copy_whole, write_whole
from t2i.tokens.text import TextTokenizer

logger = logging.getLogger(__name__)

FLOOR_CODES = 2**24
"""Codes per split, from evenly spread images, that the count-based baselines are computed on."""


def finish(part: Path, num_units: int, *, source: Source, encoder: Encoder, arguments: Arguments) -> None:
    """Make complete units into a complete shard folder; the manifest is written last.

    Raises:
        DataError: no pair can be used for training, too many images are broken, or an entry is not accounted for.
    """
    text_tokenizer = encoder.text_tokenizer
    merged = merge_units(part, num_units, encoder=encoder)
    merged.tally.add(source.tally)
    write_whole(part / BROKEN, "".join(json.dumps(entry) + "\n" for entry in merged.broken))
    _check_train(merged, part=part, source=source)
    _check_broken(merged, part=part, config=encoder.config)
    save_text_tokenizer(text_tokenizer, part)
    images = _keep_image_tokenizer(part, source, encoder)
    # The baselines settle long before this many codes, and all codes of a large set do not fit in memory.
    num_images = FLOOR_CODES // images.codes_per_image
    codes = {
        split: _codes(part, split, num_images=num_images) for split in merged.counts if merged.counts[split]
    }
    _warn_of_equal_images(codes["train"], source=source)
    splits = [
        split for split in dict.fromkeys((*USUAL_SPLITS, *sorted(merged.counts))) if merged.counts[split]
    ]
    manifest = Manifest(
        source=source.name,
        licence=source.licence,
        split_rule=source.split_rule,
        heldout_share=source.heldout_share,
        reading=changed_from_defaults(source.config),
        counts={split: merged.counts[split] for split in splits},
        caption_tokens={
            str(length): merged.caption_tokens[length] for length in sorted(+merged.caption_tokens)
        },
        broken=len(merged.broken),
        seen=merged.tally.seen,
        wordings={split: other for split, other in source.wordings.items() if split in splits} or None,
        left_out=dict(sorted(merged.tally.left_out.items())),
        changed=dict(sorted((+merged.tally.changed).items())),
        unread=dict(sorted(merged.tally.unread.items())),
        codebook_size=encoder.codebook_size,
        image_size=images.image_size,
        codes_per_image=images.codes_per_image,
        given_ids=encoder.image_tokenizer is None,
        codes_equal_float32=images.codes_equal_float32,
        image_tokenizer=maker_of(source, encoder.image_tokenizer),
        text_tokenizer=text_maker_of(text_tokenizer),
        floors_nats=code_floors(codes, codebook_size=encoder.codebook_size),
        files=side_files(part),
        arguments=arguments,
        prepare=asdict(encoder.config),
    )
    check_accounts(manifest, where=part)
    # Files that were replaced while others were read; what was only added is noticed by the next preparation.
    check_same_listing(part, arguments["listed"], list_source(source), source=source.name)
    manifest.write(part)


def save_text_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Store the text tokenizer beside the shards."""
    # The library's own writer reports a full disk as a bare Exception. A file of that size finds out before it.
    room = folder / ".room"
    room.write_bytes(tokenizer.tokenizer.backend_tokenizer.to_str(pretty=True).encode() * 2)
    room.unlink()
    tokenizer.tokenizer.save_pretrained(folder / TEXT_TOKENIZER)


def _check_train(merged: Merged, *, part: Path, source: Source) -> None:
    """Refuse a source without a pair to train on, with what became of its pairs."""
    if merged.counts["train"]:
        return
    broken = by_kind(entry["reason"] for entry in merged.broken)
    reasons = most_frequent(merged.tally.left_out + broken)
    heldout = sum(merged.counts.values())
    parts = [f"{len(merged.broken)} are broken", f"{merged.tally.left_out.total()} left out"]
    parts += [f"{heldout} held out by --heldout-share {source.heldout_share:g}"] if heldout else []
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise DataError(
        f"no pair of --source {source.name} can be used for training: of {merged.tally.seen}, {', '.join(parts)}{why}."
        f" Broken ones are listed in {part / BROKEN}."
    )


def _check_broken(merged: Merged, *, part: Path, config: PrepareConfig) -> None:
    """Refuse a source with more broken images than config.max_broken: something else must be wrong."""
    # A broken image has no views, so images are counted without theirs.
    num_broken = len(merged.broken)
    num_images = num_broken + num_pairs(merged.counts, views=config.views)
    if num_broken > config.max_broken * num_images:
        reasons = ", ".join(most_frequent(by_kind(entry["reason"] for entry in merged.broken), most=3))
        raise DataError(
            f"{num_broken} of {num_images} images are broken ({reasons}; listed in {part / BROKEN}); expected at most"
            f" {config.max_broken:.0%}. Run again with a larger --max-broken to resume from here."
        )


def _warn_of_equal_images(codes: np.ndarray, *, source: Source) -> None:
    """Say that there is nothing to tell apart: losses will fall to zero and measures compare equal with equal."""
    if len(codes) == 1:
        logger.warning("--source %s has only one pair to train on.", source.name)
    elif (codes == codes[0]).all():
        logger.warning(
            "all %d images of --source %s have the same codes: are they equal?", len(codes), source.name
        )


def _codes(part: Path, split: str, *, num_images: int) -> np.ndarray:
    return np.stack([sample["codes"] for sample in read_split(part, split, num_samples=num_images)])


@dataclass(frozen=True)
class _Images:
    """The manifest's entries on images and their codes."""

    codes_per_image: int
    image_size: int = 0
    codes_equal_float32: float | None = None


def _keep_image_tokenizer(part: Path, source: Source, encoder: Encoder) -> _Images:
    """Copy the image tokenizer beside the shards and store a round trip; precomputed codes have neither."""
    # A copy, so that a shard folder or a bucket is enough to train from.
    tokenizer, config = encoder.image_tokenizer, encoder.config
    if tokenizer is None:
        return _Images(given_ids(source).length)
    (part / IMAGE_TOKENIZER).mkdir(exist_ok=True)
    for path in tokenizer.folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            copy_whole(path, part / IMAGE_TOKENIZER / path.name)
    return _Images(
        codes_per_image=tokenizer.num_codes(config.image_size),
        image_size=config.image_size,
        codes_equal_float32=write_round_trip(part, source, tokenizer, config),
    )
