"""manifest.json of a shard folder: what made the shards, what they hold, and whether a run can use them."""

from pathlib import Path
from typing import Any

from t2i.config import DataConfig
from t2i.errors import DataError, UserError
from t2i.files import Kind, check_keys, file_hash, is_inside, read_json
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
    "text_tokenizer": {"name": str, "fingerprint": str, "num_tokens": int},
}
"""Of every manifest; those of codes, of pictures and of text have more."""
CODE_KEYS: dict[str, Kind] = {
    "given_ids": bool,
    "codes_per_image": int,
    "codebook_size": int,
    "floors_nats": dict,
    "image_tokenizer": {"name": str, "fingerprint": str},
}
PICTURE_KEYS: dict[str, Kind] = {**CODE_KEYS, "image_size": int}
TEXT_KEYS: dict[str, Kind] = {"sequence_tokens": int, "floors_nats": dict}
SPLITS = ("train", "heldout", "combinations")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a shard folder's manifest.

    Raises:
        DataError: there is none, another format, or one that prepare.py does not write.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is no shard folder: it has no {MANIFEST}. launchers/prepare.py makes one.")
    return read_manifest_file(folder / MANIFEST)


def read_manifest_file(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {manifest.get('format_version')!r:.80}; this version reads {FORMAT_VERSION}."
            " Prepare the source again."
        )
    kind = PICTURE_KEYS if has_image_tokenizer(manifest) else CODE_KEYS
    if "sequence_tokens" in manifest:
        kind = TEXT_KEYS
    check_keys(manifest, KEYS | kind, where=path)
    _check_names(manifest, where=path)
    return manifest


def _check_names(manifest: dict[str, Any], *, where: Path) -> None:
    """Check splits, counts and names of files, which are used as paths."""
    for split, count in manifest["counts"].items():
        if split not in SPLITS or not isinstance(count, int) or count < 1:
            raise DataError(
                f"{where}: counts say {split!r:.80} {count!r:.80}; wanted are {', '.join(SPLITS)}."
            )
    for name, digest in manifest["files"].items():
        if not is_inside(name) or not isinstance(digest, str):
            raise DataError(
                f"{where}: files name {name!r:.80}, which is no file of the folder with its hash."
            )


def has_image_tokenizer(manifest: dict[str, Any]) -> bool:
    """Tell shards of pictures from those of given ids and of documents, which no image tokenizer decodes."""
    return manifest.get("given_ids") is False


def side_files(folder: Path) -> dict[str, str]:
    """Hash what training reads beside the shards: indexes, the round trip and the tokenizers."""
    patterns = ("*/index.json", ROUND_TRIP, f"{IMAGE_TOKENIZER}/*", f"{TEXT_TOKENIZER}/*")
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(found)}


def is_text(manifest: dict[str, Any]) -> bool:
    """Tell shards of documents from shards of pictures."""
    return "sequence_tokens" in manifest


def check_text_use(config: DataConfig, *, manifest: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Check that a run may read text shards.

    Raises:
        UserError: another mode or sequence length.
        DataError: another text tokenizer made them.
    """
    if config.mode != "text-only":
        raise UserError(f"{config.shards} holds text alone; data.mode is {config.mode}, wanted is text-only.")
    if config.seq_len != manifest["sequence_tokens"]:
        wanted = manifest["sequence_tokens"]
        raise UserError(
            f"data.seq_len is {config.seq_len}; the sequences of {config.shards} have {wanted} tokens."
        )
    check_text_tokenizer(config.shards, manifest=manifest, tokenizer=tokenizer)


def check_text_tokenizer(folder: Path, *, manifest: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """Check that a tokenizer is the one that packed text shards, whose ids cannot be made anew.

    Raises:
        DataError: it is another.
    """
    made_by = manifest["text_tokenizer"]
    if made_by["fingerprint"] != tokenizer.fingerprint():
        raise DataError(
            f"{folder} was made with the text tokenizer {made_by['name']} ({made_by['fingerprint'][:12]}),"
            f" not {tokenizer.name} ({tokenizer.fingerprint()[:12]}). Prepare it again with --text-tokenizer."
        )
