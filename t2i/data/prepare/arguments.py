"""What determines the content of shards: a folder that was begun or made is used again only with the same."""

from dataclasses import asdict
from pathlib import Path

from t2i.config import PrepareConfig, SourceConfig
from t2i.data.shards.manifest import FORMAT_VERSION, Maker
from t2i.data.sources import GivenIds, Source
from t2i.errors import UserError
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

Arguments = dict[str, object]
"""Everything that determines the content of the shards, by name."""


def arguments_of(
    source: Source,
    image_tokenizer: ImageTokenizer | None,
    text_tokenizer: TextTokenizer,
    config: PrepareConfig,
) -> Arguments:
    """Collect everything that determines the content of the shards.

    Raises:
        UserError: precomputed codes were asked for views, or the image size is no multiple of the tokenizer's stride.
    """
    common: Arguments = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "heldout_share": source.heldout_share,
        "reading": changed_from_defaults(source.config),
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


def check_same_arguments(folder: Path, found: Arguments, wanted: Arguments) -> None:
    """Check that a folder was made with the same arguments.

    Raises:
        UserError: it was not; each difference is named.
    """
    changed = [
        f"{key}: {found.get(key)} there, {wanted[key]} here"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        begun = folder.name.endswith(".part")
        advice = "Remove it to begin anew, or choose another --out" if begun else "Choose another --out"
        raise UserError(f"{folder} was made with other arguments ({'; '.join(changed)}). {advice}.")


def maker_of(source: Source, image_tokenizer: ImageTokenizer | None) -> Maker:
    """Name what made the codes."""
    if image_tokenizer is not None:
        return Maker(str(image_tokenizer.folder), image_tokenizer.fingerprint())
    given = given_ids(source)
    # There are no weights to hash, so the name that ids.json gives stands for them.
    return Maker(given.made_by, f"ids:{given.made_by}:{given.vocab_size}:{given.length}")


def given_ids(source: Source) -> GivenIds:
    """Return what a source says about its precomputed codes."""
    assert source.given is not None, "a source of images needs an image tokenizer"
    return source.given


def changed_from_defaults(config: SourceConfig) -> dict[str, object]:
    """Return the settings that differ from the defaults."""
    defaults = asdict(SourceConfig())
    return {key: value for key, value in asdict(config).items() if value != defaults[key]}
