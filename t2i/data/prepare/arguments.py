"""What determines the content of shards: a folder that was begun or made is used again only with the same."""

import os
from dataclasses import asdict
from pathlib import Path

from t2i.config import PrepareConfig, SourceConfig
from t2i.data.shards.manifest import FORMAT_VERSION, Maker, TextMaker
from t2i.data.sources import GivenIds, Source
from t2i.data.sources.hub import is_saved
from t2i.data.sources.listing import Listing, check_same_listing
from t2i.data.sources.place import absolute_source
from t2i.errors import UserError
from t2i.files import HUB
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

ADDED = ("listed", "keys")
"""What shards of older versions do not say."""
Arguments = dict[str, object]
"""Everything that determines the content of the shards, by name."""


def arguments_of(
    source: Source,
    image_tokenizer: ImageTokenizer | None,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
    *,
    listing: Listing,
) -> Arguments:
    """Collect everything that determines the content of the shards.

    Raises:
        UserError: precomputed codes were asked for views, or the image size is no multiple of the tokenizer's stride.
    """
    common: Arguments = {
        "format_version": FORMAT_VERSION,
        **source_arguments(source.name, listing),
        "heldout_share": source.heldout_share,
        "reading": changed_from_defaults(source.config),
        # Absent, keys of such a dataset are of an older form; other sources have one form.
        **({"keys": "row"} if is_saved(Path(source.name.removeprefix(HUB))) else {}),
        "unit_pairs": config.unit_pairs,
        "image_tokenizer": maker_of(source, image_tokenizer).fingerprint,
        "text_tokenizer": text_tokenizer.fingerprint(),
    }
    if image_tokenizer is None:
        if config.views != 1:
            raise UserError(
                f"--views is {config.views}; {source.name} has precomputed codes, which cannot be shifted."
            )
        return common
    # Called for its check of the image size.
    image_tokenizer.num_codes(config.image_size)
    return {
        **common,
        "image_size": config.image_size,
        "views": config.views,
        "batch_size": config.batch_size,
        "dtype": str(image_tokenizer.dtype).removeprefix("torch."),
    }


def source_arguments(name: str, listing: Listing) -> Arguments:
    """Name a source: as it was typed, as it is found from any folder, and what it consists of."""
    return {"source": name, "source_path": absolute_source(name), "listed": listing.fingerprint}


def check_same(folder: Path, found: Arguments, wanted: Arguments, *, listing: Listing) -> None:
    """Check that a folder was made of the same source with the same arguments.

    Raises:
        UserError: an argument differs; each difference is named.
        DataError: the source has changed.
    """
    is_same_source = found.get("source") == wanted["source"] or _path(found) == _path(wanted)
    # The source first: the share that is held out may follow from its size.
    if is_same_source and "listed" in found and found.get("reading") == wanted.get("reading"):
        check_same_listing(folder, found["listed"], listing, source=str(wanted["source"]))
    # Shards of older versions do not say all of it, and are found again as they are. A half-made folder must.
    is_begun = folder.name.endswith(".part")
    known = found if is_begun else {key: wanted[key] for key in ADDED if key in wanted} | found
    # The same folder may be typed in two ways, and a project may be moved with its images.
    compared = wanted.keys() - {"source_path"} - ({"source"} if is_same_source else set())
    changed = [
        f"{key}: {known.get(key)} there, {wanted[key]} here"
        for key in wanted
        if key in compared and known.get(key) != wanted[key]
    ]
    if changed:
        advice = "Remove it to begin anew, or choose another --out" if is_begun else "Choose another --out"
        raise UserError(f"{folder} was made with other arguments ({'; '.join(changed)}). {advice}.")


def _path(arguments: Arguments) -> str:
    return os.path.normpath(str(arguments.get("source_path", arguments.get("source"))))


def maker_of(source: Source, image_tokenizer: ImageTokenizer | None) -> Maker:
    """Name what made the codes."""
    if image_tokenizer is not None:
        return Maker(str(image_tokenizer.folder.absolute()), image_tokenizer.fingerprint())
    given = given_ids(source)
    # There are no weights to hash, so the name that ids.json gives stands for them.
    return Maker(given.made_by, f"ids:{given.made_by}:{given.vocab_size}:{given.length}")


def text_maker_of(tokenizer: TextTokenizer) -> TextMaker:
    """Name what made the caption ids: a folder, or a tokenizer of the hub."""
    folder = Path(tokenizer.name)
    name = str(folder.absolute()) if folder.is_dir() else tokenizer.name
    return TextMaker(name, tokenizer.fingerprint(), tokenizer.num_tokens)


def given_ids(source: Source) -> GivenIds:
    """Return what a source says about its precomputed codes."""
    assert source.given is not None, "a source of images needs an image tokenizer"
    return source.given


def changed_from_defaults(config: SourceConfig) -> dict[str, object]:
    """Return the settings that differ from the defaults."""
    defaults = asdict(SourceConfig())
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}
