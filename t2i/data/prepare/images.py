"""Prepare a source as a shard folder: any number of ranks encode units, and rank 0 merges them when all are complete.

OUT.part/ is the only state that ranks share, and a killed preparation resumes from it. It is renamed to OUT at the end.
Rank i modulo the number of ranks encodes unit i. A unit depends only on the source and the arguments, and so do the
shards.
"""

import json
import logging
import shutil
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from t2i.config import PrepareConfig, SourceConfig
from t2i.data.prepare.encode import Encoder, decoding, facts_file, write_unit
from t2i.data.prepare.merge import Merged, merge_units
from t2i.data.prepare.preview import write_round_trip
from t2i.data.shards.baselines import code_floors
from t2i.data.shards.manifest import (
    BROKEN,
    FORMAT_VERSION,
    IMAGE_TOKENIZER,
    SPLITS,
    TEXT_TOKENIZER,
    Maker,
    Manifest,
    TextMaker,
    read_manifest,
    side_files,
)
from t2i.data.shards.reader import read_split
from t2i.data.sources import GivenIds, Source
from t2i.distributed.heartbeat import signs_of_life, wait_for
from t2i.errors import DataError, UserError
from t2i.files import write_json
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

logger = logging.getLogger(__name__)

ARGUMENTS = "arguments.json"
WORKING = ("units", "ranks", "writing")
"""Folders of OUT.part that are removed from OUT."""

Arguments = dict[str, object]
"""Everything that determines the content of the shards, by name."""

FLOOR_CODES = 2**24
"""Codes per split, from evenly spread images, that the count-based baselines are computed on."""


def prepare(
    source: Source,
    *,
    out: Path,
    image_tokenizer: ImageTokenizer | None,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
    rank: int = 0,
    world_size: int = 1,
) -> Manifest:
    """Encode a source into shards at `out` and return the manifest; a half-made `out` is resumed.

    All ranks make the same call and return when rank 0 has merged all units.

    Args:
        image_tokenizer: None for a source of precomputed codes only.

    Raises:
        UserError: `out` was begun with other arguments, or precomputed codes were asked for views.
        DataError: no image of the source could be read.
        LostRankError: a rank with pending units has no heartbeat.
    """
    arguments = _arguments(source, image_tokenizer, text_tokenizer, config)
    units = source.units(config.unit_pairs)
    part = out.with_name(out.name + ".part")
    ranks = part / "ranks"
    if not out.exists() and rank == 0:
        _begin(part, arguments)
    if rank > 0:
        wait_for(lambda: [] if out.exists() or (part / ARGUMENTS).exists() else [0], folder=ranks)
    if out.exists():
        return _finished(out, arguments)
    _same_arguments(part, json.loads((part / ARGUMENTS).read_text()), arguments)

    def pending() -> set[int]:
        return {index % world_size for index in range(len(units)) if not facts_file(part, index).exists()}

    with _signs(ranks, rank, world_size), decoding(config) as pool:
        encoder = Encoder(
            image_tokenizer,
            image_tokenizer.codebook_size if image_tokenizer else _given(source).vocab_size,
            text_tokenizer,
            config,
            pool,
            shows_progress=rank == 0,
        )
        # By index rather than first come, first served: ranks then need no locks, only a folder, and
        # another number of ranks can resume.
        mine = range(rank, len(units), world_size)
        for index in tqdm(mine, unit="unit", desc="encode", disable=rank > 0):
            if not out.exists() and not facts_file(part, index).exists():
                write_unit(part, index, unit=units[index], encoder=encoder)
        if rank == 0:
            wait_for(pending, folder=ranks)
            merged = _finish(part, len(units), source, encoder, arguments)
            part.rename(out)
            _sweep(out, part, merged)
        else:
            wait_for(lambda: [] if out.exists() else [0], folder=ranks)
    return read_manifest(out)


def _arguments(
    source: Source,
    image_tokenizer: ImageTokenizer | None,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
) -> Arguments:
    """Collect everything that determines the content of the shards."""
    common = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "heldout_share": source.heldout_share,
        "reading": _changed(source.config),
        "unit_pairs": config.unit_pairs,
        "image_tokenizer": _maker(source, image_tokenizer).fingerprint,
        "text_tokenizer": text_tokenizer.fingerprint(),
    }
    if image_tokenizer is None:
        if config.views != 1:
            raise UserError(
                f"views is {config.views}; {source.name} has precomputed codes, which cannot be shifted."
            )
        return common
    # Called for its check: it refuses an image size that is no multiple of the tokenizer's stride.
    image_tokenizer.num_codes(config.image_size)
    return {
        **common,
        "image_size": config.image_size,
        "views": config.views,
        "batch_size": config.batch_size,
        "dtype": str(image_tokenizer.dtype).removeprefix("torch."),
    }


def _maker(source: Source, image_tokenizer: ImageTokenizer | None) -> Maker:
    """Name what made the codes."""
    if image_tokenizer is not None:
        return Maker(str(image_tokenizer.folder), image_tokenizer.fingerprint())
    given = _given(source)
    # There are no weights to hash, so the name that ids.json gives stands for them.
    return Maker(given.made_by, f"ids:{given.made_by}:{given.vocab_size}:{given.length}")


def _given(source: Source) -> GivenIds:
    assert source.given is not None, "a source of images needs an image tokenizer"
    return source.given


def _changed(config: SourceConfig) -> dict[str, object]:
    """Return the settings that differ from the defaults."""
    defaults = asdict(SourceConfig())
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}


def _begin(part: Path, arguments: Arguments) -> None:
    (part / "units").mkdir(parents=True, exist_ok=True)
    if not (part / ARGUMENTS).exists():
        write_json(part / ARGUMENTS, arguments)


def _finished(out: Path, arguments: Arguments) -> Manifest:
    manifest = read_manifest(out)
    _same_arguments(out, manifest.arguments, arguments)
    logger.info("%s is already prepared", out)
    return manifest


def _same_arguments(folder: Path, found: Arguments, wanted: Arguments) -> None:
    changed = [
        f"{key}: {found.get(key)} there, {wanted[key]} here"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        begun = folder.name.endswith(".part")
        advice = "Remove it to begin anew, or choose another --out" if begun else "Choose another --out"
        raise UserError(f"{folder} was made with other arguments ({'; '.join(changed)}). {advice}.")


def _signs(folder: Path, rank: int, world_size: int) -> AbstractContextManager[None]:
    return signs_of_life(folder, rank=rank) if world_size > 1 else nullcontext()


def _finish(part: Path, num_units: int, source: Source, encoder: Encoder, arguments: Arguments) -> Merged:
    """Merge the units, store the tokenizers and a round trip, compute the baselines, write the manifest."""
    text_tokenizer = encoder.text_tokenizer
    merged = merge_units(part, num_units, encoder=encoder)
    merged.tally.add(source.tally)
    if not merged.counts["train"]:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in merged.tally.left_out.items())
        raise DataError(
            f"no pair of {source.name} can be used for training: {len(merged.broken)} are broken, {reasons or '0'}"
            f" were left out; see {part / 'units'}."
        )
    (part / BROKEN).write_text("".join(json.dumps(entry) + "\n" for entry in merged.broken))
    _check_broken(merged, part=part, config=encoder.config)
    text_tokenizer.tokenizer.save_pretrained(part / TEXT_TOKENIZER)
    images = _keep_image_tokenizer(part, source, encoder)
    # The baselines settle long before this many codes, and all codes of a large set do not fit in memory.
    num_pictures = FLOOR_CODES // images.codes_per_image
    Manifest(
        source=source.name,
        licence=source.licence,
        split_rule=source.split_rule,
        heldout_share=source.heldout_share,
        reading=_changed(source.config),
        counts={split: merged.counts[split] for split in SPLITS if merged.counts[split]},
        broken=len(merged.broken),
        seen=merged.tally.seen,
        left_out=dict(sorted(merged.tally.left_out.items())),
        changed=dict(sorted(merged.tally.changed.items())),
        unread=dict(sorted(merged.tally.unread.items())),
        codebook_size=encoder.codebook_size,
        image_size=images.image_size,
        codes_per_image=images.codes_per_image,
        given_ids=encoder.image_tokenizer is None,
        codes_equal_float32=images.codes_equal_float32,
        image_tokenizer=_maker(source, encoder.image_tokenizer),
        text_tokenizer=TextMaker(
            text_tokenizer.name, text_tokenizer.fingerprint(), text_tokenizer.num_tokens
        ),
        floors_nats=code_floors(
            {split: _codes(part, split, num_pictures=num_pictures) for split in merged.counts},
            codebook_size=encoder.codebook_size,
        ),
        files=side_files(part),
        arguments=arguments,
        prepare=asdict(encoder.config),
    ).write(part)
    return merged


def _check_broken(merged: Merged, *, part: Path, config: PrepareConfig) -> None:
    """Refuse a source with more broken images than config.max_broken: something else must be wrong."""
    # A broken image has no views, so images are counted without theirs.
    num_views = merged.counts["train"] - merged.counts["train"] // config.views
    num_broken, num_pairs = len(merged.broken), len(merged.broken) + merged.counts.total() - num_views
    if num_broken > config.max_broken * num_pairs:
        usual = Counter(entry["reason"].split(":")[0] for entry in merged.broken).most_common(3)
        reasons = ", ".join(f"{count} times {reason}" for reason, count in usual)
        raise DataError(
            f"{num_broken} of {num_pairs} images are broken ({reasons}; listed in {part / BROKEN}); expected at most"
            f" {config.max_broken:.0%}. Run again with a larger --max-broken to resume from here."
        )


def _codes(part: Path, split: str, *, num_pictures: int) -> np.ndarray:
    return np.stack([sample["codes"] for sample in read_split(part, split, num_samples=num_pictures)])


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
        return _Images(_given(source).length)
    (part / IMAGE_TOKENIZER).mkdir(exist_ok=True)
    for path in tokenizer.folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, part / IMAGE_TOKENIZER / path.name)
    return _Images(
        codes_per_image=tokenizer.num_codes(config.image_size),
        image_size=config.image_size,
        codes_equal_float32=write_round_trip(part, source, tokenizer, config),
    )


def _sweep(out: Path, part: Path, merged: Merged) -> None:
    """Remove what only the preparation needed."""
    # After the rename: a kill in here leaves a complete OUT with some files too many.
    (out / ARGUMENTS).unlink()
    replaced = [out / path.relative_to(part) for path in merged.replaced]
    for folder in (*(out / name for name in WORKING), *replaced):
        shutil.rmtree(folder, ignore_errors=True)
