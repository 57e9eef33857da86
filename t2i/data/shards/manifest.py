"""manifest.json of a shard folder: what made the shards, what they hold, and which runs can use them."""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from t2i.config import DataConfig
from t2i.errors import DataError, UserError
from t2i.files import Kind, check_keys, file_hash, is_inside, read_json, why_lacking, write_json
from t2i.tokens.image import ROUND_TRIP
from t2i.tokens.text import TextTokenizer

FORMAT_VERSION = 2
MANIFEST, BROKEN, RECONSTRUCTIONS = "manifest.json", "broken.jsonl", "reconstructions.png"
IMAGE_TOKENIZER, TEXT_TOKENIZER = "image_tokenizer", "text_tokenizer"
"""Folders of the tokenizers that made the shards."""
KEYS: dict[str, Kind] = {
    "source": str,
    "heldout_share": (int, float),
    "counts": dict,
    "files": dict,
    "arguments": dict,
    "floors_nats": dict,
    "text_tokenizer": {"name": str, "fingerprint": str, "num_tokens": int},
}
"""Keys of every manifest; manifests of codes, of images and of text have more."""
CODE_KEYS: dict[str, Kind] = {
    "given_ids": bool,
    "codes_per_image": int,
    "codebook_size": int,
    "image_tokenizer": {"name": str, "fingerprint": str},
}
IMAGE_KEYS: dict[str, Kind] = {**CODE_KEYS, "image_size": int}
TEXT_KEYS: dict[str, Kind] = {"sequence_tokens": int}
OPTIONAL_KEYS: dict[str, Kind] = {
    "licence": str,
    "split_rule": str,
    "reading": dict,
    "prepare": dict,
    "broken": int,
    "seen": int,
    "caption_tokens": dict,
    "wordings": dict,
    "left_out": dict,
    "changed": dict,
    "unread": dict,
    "codes_equal_float32": (int, float),
    "versions": dict,
    "gathered_sha256": str,
    "documents": dict,
}
"""Keys that older manifests or other kinds of shards lack. A key that is present has this type."""
TRAIN = "train"
USUAL_SPLITS = (TRAIN, "heldout", "combinations")  # in a manifest's order; a source's others follow
SPLIT_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class Maker:
    """The image tokenizer that made the codes, or whoever made precomputed ones."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class TextMaker:
    """The text tokenizer that made the caption ids."""

    name: str
    fingerprint: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json. A key that a kind of shards lacks is None or 0 here and absent from the file."""

    source: str
    heldout_share: float
    counts: dict[str, int]
    """Samples of each split that has any."""
    text_tokenizer: TextMaker
    floors_nats: dict[str, dict[str, float]]
    """Per split, what its codes (or text tokens) cost count-based baselines, in nats each."""
    files: dict[str, str]
    """Files beside the shards and their hashes."""
    arguments: dict[str, Any]
    """What determines the content of the shards; preparing into the same folder again needs the same."""
    licence: str | None = None
    split_rule: str | None = None
    reading: dict[str, Any] | None = None
    """SourceConfig's settings that were not the defaults."""
    prepare: dict[str, Any] | None = None
    """PrepareConfig's settings."""
    broken: int | None = None
    seen: int | None = None
    """Entries of the source; each was kept, left out or broken."""
    caption_tokens: dict[str, int] | None = None
    """How many pairs have a caption of so many ids of the text tokenizer."""
    wordings: dict[str, str] | None = None
    """Held-out splits with the images of another under captions in other words: their names -> that split."""
    left_out: dict[str, int] | None = None
    """Entries that became no sample, by reason."""
    changed: dict[str, int] | None = None
    """Entries that were kept otherwise than they are in the source, by what was changed."""
    unread: dict[str, int] | None = None
    """Files that were not read, or not to their end, by reason."""
    given_ids: bool | None = None
    """The codes are precomputed: there is no image tokenizer and no image."""
    codes_per_image: int = 0
    """0 for text shards."""
    codebook_size: int = 0
    image_size: int = 0
    """Pixels per side; 0 for text and for precomputed codes."""
    image_tokenizer: Maker | None = None
    codes_equal_float32: float | None = None
    """Share of codes that equal those of the image tokenizer in float32, measured on a few images."""
    sequence_tokens: int | None = None
    """Tokens per sequence of text shards; None for others."""
    versions: dict[str, str] | None = None
    gathered_sha256: str | None = None
    documents: dict[str, int] | None = None
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def is_text(self) -> bool:
        """Tell whether these are text shards."""
        return self.sequence_tokens is not None

    @property
    def heldout_splits(self) -> list[str]:
        """List the splits that training never sees, without those that have the images of another."""
        return [split for split in self.counts if split != TRAIN and split not in (self.wordings or {})]

    @property
    def has_image_tokenizer(self) -> bool:
        """Tell whether an image tokenizer lies beside the shards; precomputed codes and text have none."""
        return self.given_ids is False

    @property
    def code_maker(self) -> Maker:
        """Return what made the codes.

        Raises:
            DataError: these are text shards.
        """
        if self.image_tokenizer is None:
            raise DataError(f"{self.source}: these are text shards, without image_tokenizer.")
        return self.image_tokenizer

    def write(self, folder: Path) -> None:
        """Write manifest.json, whole or not at all."""
        # Absent rather than null or 0, as readers of older versions expect it.
        sizes = ("codes_per_image", "codebook_size", "image_size")
        known = {
            key: value
            for key, value in asdict(self).items()
            if value is not None and (value or key not in sizes)
        }
        write_json(folder / MANIFEST, known)


def read_manifest(folder: Path) -> Manifest:
    """Read a shard folder's manifest.

    Raises:
        DataError: there is none, it has another format, or it has entries that prepare.py does not write.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder} is no shard folder: {why_lacking(folder, MANIFEST)}. Make one with launchers/prepare.py."
        )
    return read_manifest_file(folder / MANIFEST)


def read_manifest_file(path: Path) -> Manifest:
    """Read a manifest, or the copy of it that a run keeps.

    Raises:
        DataError: it has another format, or entries that prepare.py does not write.
    """
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {values.get('format_version')!r:.80}; this version reads {FORMAT_VERSION}."
            " Prepare the source again."
        )
    kind = IMAGE_KEYS if values.get("given_ids") is False else CODE_KEYS
    if "sequence_tokens" in values:
        kind = TEXT_KEYS
    present = {key: expected for key, expected in OPTIONAL_KEYS.items() if values.get(key) is not None}
    check_keys(values, KEYS | kind | present, where=path)
    _check_names(values["counts"], values["files"], wordings=values.get("wordings") or {}, where=path)
    _check_tallies(values, where=path)
    for key in ("codes_per_image", "codebook_size", "image_size", "sequence_tokens"):
        found = values.get(key)
        if found is not None and (not isinstance(found, int) or found < 1):
            raise DataError(f"{path}: {key} is {found!r:.80}; expected a whole number >= 1.")
    known = {one.name for one in fields(Manifest)}
    text, image = values["text_tokenizer"], values.get("image_tokenizer")
    return Manifest(
        **{
            key: value
            for key, value in values.items()
            if key in known - {"text_tokenizer", "image_tokenizer"}
        },
        text_tokenizer=TextMaker(text["name"], text["fingerprint"], text["num_tokens"]),
        image_tokenizer=None if image is None else Maker(image["name"], image["fingerprint"]),
    )


def _check_tallies(values: dict[str, Any], *, where: Path) -> None:
    """Check that what is counted by reason, or by length, is counted."""
    for name in ("left_out", "changed", "unread", "documents", "caption_tokens"):
        for reason, count in (values.get(name) or {}).items():
            is_length = name != "caption_tokens" or reason.isdecimal()
            if not is_length or type(count) is not int or count < 0:
                raise DataError(
                    f"{where}: {name} says {reason!r:.80} {count!r:.80}; expected a whole number >= 0."
                )
    views = (values.get("prepare") or {}).get("views", 1)
    if type(views) is not int or views < 1:
        raise DataError(f"{where}: prepare says views {views!r:.80}; expected a whole number >= 1.")


def are_same_shards(kept: Path, found: Path) -> bool:
    """Tell whether two manifest files are of the same shards, wherever these lie.

    Raises:
        DataError: as read_manifest_file.
    """
    if kept.read_bytes() == found.read_bytes():
        return True
    one, other = read_manifest_file(kept), read_manifest_file(found)
    # An index holds the hashes of its shards. Older manifests have no hash of it, and then any difference counts.
    has_indexes = all(f"{split}/index.json" in one.files for split in one.counts)
    return has_indexes and (one.counts, one.files) == (other.counts, other.files)


def _check_names(
    counts: dict[str, object], files: dict[str, object], *, wordings: dict[str, object], where: Path
) -> None:
    # The names become paths, so that one with `..` would reach outside the folder.
    for split, count in counts.items():
        if not SPLIT_NAME.fullmatch(split) or not isinstance(count, int) or count < 1:
            names = ", ".join(USUAL_SPLITS)
            raise DataError(
                f"{where}: counts say {split!r:.80} {count!r:.80}; expected names such as {names}."
            )
    for split, other in wordings.items():
        if split not in counts or other not in counts:
            raise DataError(
                f"{where}: wordings say {split!r:.80} {other!r:.80}; expected two splits of counts."
            )
    for name, digest in files.items():
        if not is_inside(name) or not isinstance(digest, str):
            raise DataError(f"{where}: files list {name!r:.80}; expected a file of the folder with its hash.")


def side_files(folder: Path) -> dict[str, str]:
    """Hash the files beside the shards that training reads: indexes, the round trip and the tokenizers."""
    patterns = ("*/index.json", ROUND_TRIP, f"{IMAGE_TOKENIZER}/*", f"{TEXT_TOKENIZER}/*")
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(found)}


def check_text_use(config: DataConfig, *, manifest: Manifest, tokenizer: TextTokenizer) -> None:
    """Check that a run may read text shards.

    Raises:
        UserError: the run has another mode or sequence length.
        DataError: another text tokenizer made them.
    """
    if config.mode != "text-only":
        raise UserError(
            f"{config.shards} holds only text, but data.mode is {config.mode}; expected text-only."
        )
    if config.seq_len != manifest.sequence_tokens:
        raise UserError(
            f"data.seq_len is {config.seq_len}; the sequences of {config.shards} have {manifest.sequence_tokens}"
            " tokens."
        )
    check_text_tokenizer(config.shards, manifest=manifest, tokenizer=tokenizer)


def check_text_tokenizer(folder: Path, *, manifest: Manifest, tokenizer: TextTokenizer) -> None:
    """Check that a tokenizer is the one that packed the text shards.

    Raises:
        DataError: another tokenizer did.
    """
    # Packed sequences have no text beside their ids, so they cannot be tokenized again as captions can.
    made_by = manifest.text_tokenizer
    if made_by.fingerprint != tokenizer.fingerprint():
        raise DataError(
            f"{folder} was made with the text tokenizer {made_by.name} ({made_by.fingerprint[:12]}),"
            f" not {tokenizer.name} ({tokenizer.fingerprint()[:12]}). Prepare it again with --text-tokenizer."
        )
