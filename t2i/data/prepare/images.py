"""Prepare a source as a shard folder: any number of ranks encode units, and rank 0 merges them when all are complete.

OUT.part/ is the only state that ranks share, and a killed preparation resumes from it. It is renamed to OUT at the end.
Rank i modulo the number of ranks encodes unit i. A unit depends only on the source and the arguments, and so do the
shards.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from t2i.config import PrepareConfig
from t2i.data.prepare.arguments import Arguments, arguments_of, check_same, given_ids
from t2i.data.prepare.decode import decoding
from t2i.data.prepare.encode import Encoder, facts_file, write_unit
from t2i.data.prepare.finish import finish
from t2i.data.prepare.part_folder import (
    ARGUMENTS,
    RANKS,
    UNITS,
    claimed,
    is_done,
    place_of,
    publish,
    read_arguments,
    saying_full_disk,
    sweep,
)
from t2i.data.shards.manifest import Manifest, read_manifest
from t2i.data.sources import Source, Unit
from t2i.data.sources.listing import Listing, list_source
from t2i.distributed.heartbeat import signs_of_life, wait_for
from t2i.files import write_json
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

logger = logging.getLogger(__name__)


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
        UserError: `out` was begun with other arguments, another process works there, or precomputed codes were asked
            for views.
        DataError: no image of the source could be read, or the source has changed since `out` was begun.
        CheckpointError: the disk is full.
        LostRankError: a rank with pending units has no heartbeat.
    """
    out = place_of(out)
    listing = list_source(source)
    arguments = arguments_of(source, image_tokenizer, text_tokenizer, config, listing=listing)
    part = out.with_name(out.name + ".part")
    with saying_full_disk(part):
        if not is_done(out) and rank == 0:
            _begin(part, arguments, listing)
        if rank > 0:
            wait_for(lambda: [] if is_done(out) or (part / ARGUMENTS).exists() else [0], folder=part / RANKS)
        if is_done(out):
            manifest = read_manifest(out)
            check_same(out, manifest.arguments, arguments, listing=listing)
            if (out / UNITS).exists() and rank == 0:
                sweep(out)
            logger.info("%s is already prepared", out)
            return manifest
        check_same(part, read_arguments(part), arguments, listing=listing)
        with claimed(part, rank=rank), signs_of_life(part / RANKS, rank=rank), decoding(config) as pool:
            encoder = Encoder(
                image_tokenizer,
                image_tokenizer.codebook_size if image_tokenizer else given_ids(source).vocab_size,
                text_tokenizer,
                config,
                pool,
                progress=tqdm(unit="pair", desc="encode", disable=rank > 0),
            )
            units = source.units(config.unit_pairs)
            with encoder.progress:
                _encode_units(
                    part, out, units, num_pairs=source.num_pairs, encoder=encoder, ranks=(rank, world_size)
                )
            if rank == 0 and not is_done(part):
                _wait_for_units(part, len(units), world_size)
                finish(part, len(units), source=source, encoder=encoder, arguments=arguments)
        if rank == 0:
            publish(part, out)
        else:
            wait_for(lambda: [] if is_done(out) else [0], folder=part / RANKS)
    return read_manifest(out)


def _begin(part: Path, arguments: Arguments, listing: Listing) -> None:
    (part / UNITS).mkdir(parents=True, exist_ok=True)
    if not (part / ARGUMENTS).exists() and not is_done(part):
        listing.write(part)
        write_json(part / ARGUMENTS, arguments)


def _encode_units(
    part: Path,
    out: Path,
    units: Sequence[Unit],
    *,
    num_pairs: int | None,
    encoder: Encoder,
    ranks: tuple[int, int],
) -> None:
    """Encode this rank's units that nobody has encoded yet."""
    rank, world_size = ranks
    # By index rather than first come, first served: ranks then need no locks, only a folder, and another number of
    # ranks can resume.
    mine = [index for index in range(rank, len(units), world_size) if not facts_file(part, index).exists()]
    if num_pairs is not None:
        encoder.progress.reset(round(num_pairs * len(mine) / len(units)))
    for place, index in enumerate(mine):
        encoder.progress.set_postfix_str(f"unit {place + 1} of {len(mine)}")
        # In this order: the facts of units are removed after the manifest was written.
        if not facts_file(part, index).exists() and not is_done(part) and not is_done(out):
            write_unit(part, index, unit=units[index], encoder=encoder)
        if num_pairs is None:
            encoder.progress.total = round(encoder.progress.n * len(mine) / (place + 1))


def _wait_for_units(part: Path, num_units: int, world_size: int) -> None:
    def pending() -> set[int]:
        return {index % world_size for index in range(num_units) if not facts_file(part, index).exists()}

    wait_for(pending, folder=part / RANKS)
