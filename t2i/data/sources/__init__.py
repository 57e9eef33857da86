"""Sources of (image, caption) pairs, all opened by open_source.

Each file here reads one kind of source and lists its entries. `source.py` turns entries into pairs.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from t2i.config import SourceConfig
from t2i.data.shards.manifest import Manifest
from t2i.data.sources import openmoji
from t2i.data.sources.coco import caption_files, has_both, list_coco
from t2i.data.sources.folder import find_metadata, read_image_folder, read_text_folder
from t2i.data.sources.hub import units_of_dataset
from t2i.data.sources.image import UNREADABLE, OpenedImage, decode_image
from t2i.data.sources.parquet import units_of_tables
from t2i.data.sources.precomputed import files_of_ids, read_facts, read_ids
from t2i.data.sources.source import (
    IMAGE_SUFFIXES,
    Entry,
    GivenIds,
    LeftOut,
    Listed,
    Pair,
    ReadEntries,
    Source,
    Tally,
    Unit,
    sift,
)
from t2i.data.sources.splits import choose_share, with_splits
from t2i.data.sources.webdataset import units_of_tars
from t2i.distributed.heartbeat import place_in_job
from t2i.errors import DataError, UserError

__all__ = [
    "UNREADABLE",
    "GivenIds",
    "LeftOut",
    "Listed",
    "OpenedImage",
    "Pair",
    "Source",
    "Tally",
    "Unit",
    "decode_image",
    "open_source",
    "reopen_source",
]

AS_IT_IS = SourceConfig()
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

Sift = Callable[..., Iterator[Pair]]
"""`sift` with its rules filled in; takes a reader."""

GLOB_CHARACTERS = frozenset("*?[")


def open_source(name: str, *, heldout_share: float | None = None, config: SourceConfig = AS_IT_IS) -> Source:
    """Open a source without decoding its images.

    Args:
        name: `openmoji`, a folder, tar or parquet files (a path with braces and globs), `coco:DIR`, a Hugging Face
            dataset (USER/NAME, or hf: before any name or folder), or `ids:DIR`.
        heldout_share: share of the images, chosen by a hash of the key, that training never sees; None for 2%, or
            for more of a small source.
        config: which columns are read, and which pairs are left out.

    Raises:
        DataError: the source does not exist, or has no usable pair.
        UserError: the settings contradict each other.
    """
    if not name:
        raise UserError("--source is empty; expected one of the sources that `--help` lists.")
    sieve = partial(sift, config=config)
    if name == "openmoji":
        source = _openmoji(sieve)
    else:
        source = _open(name, sieve, config)
        share = choose_share(source) if heldout_share is None else heldout_share
        source = with_splits(source, heldout_share=share)
        rule = f"sha256 of the key below {share} of its range is heldout"
        source = replace(source, split_rule=source.split_rule or rule)
    return replace(source, name=name, config=config)


def reopen_source(manifest: Manifest) -> Source:
    """Open a manifest's source with the settings that it was prepared with."""
    config = SourceConfig(**manifest.reading or {})
    return open_source(manifest.source, heldout_share=manifest.heldout_share, config=config)


def _open(name: str, sieve: Sift, config: SourceConfig) -> Source:
    kind, _, rest = name.partition(":")
    if kind == "coco":
        return _coco(Path(rest), sieve)
    # A folder of this name comes first: data/images is a hub name too.
    if kind == "hf" or (HUB_NAME.fullmatch(name) and not Path(name).exists()):
        reads = units_of_dataset(rest if kind == "hf" else name, config=config)
        listing = partial(_list_dataset, rest if kind == "hf" else name, len(reads))
        return Source(units=partial(_sifted, reads, sieve), listing=listing, is_streamed=True)
    if kind == "ids":
        return _given(Path(rest), config)
    if not Path(name).is_dir():
        return _files(expand(name), sieve, config)
    folder = Path(name)
    metadata = find_metadata(folder)
    if metadata:
        return _listed(partial(read_image_folder, metadata=metadata, caption_key=config.caption_key), sieve)
    # img2dataset's layout of plain files has 00000.parquet, which holds no images, beside the folder 00000.
    tables = [path for path in folder.glob("*.parquet") if not path.with_suffix("").is_dir()]
    # Sorted: the order of units, and so the shards, must not depend on the file system.
    files = sorted(folder.glob("*.tar")) or sorted(tables)
    return _files(files, sieve, config) if files else _listed(partial(read_text_folder, folder=folder), sieve)


def _openmoji(sieve: Sift) -> Source:
    captions, left_out = openmoji.captioned_keys()

    def entries(tally: Tally) -> Iterator[Entry]:
        tally.seen += len(captions) + left_out.total()
        tally.left_out.update(left_out)
        for key, caption in captions.items():
            yield Entry(key, caption, partial(openmoji.open_emoji, key), split=openmoji.split_of(key))

    source = _listed(entries, sieve)
    return replace(source, split_rule=openmoji.SPLIT_RULE, licence=openmoji.LICENCE)


def _coco(folder: Path, sieve: Sift) -> Source:
    source = _listed(partial(list_coco, folder=folder), sieve)
    if has_both(caption_files(folder)):
        return replace(source, split_rule="images of captions_val*.json are heldout, all others train")
    return source


def _given(folder: Path, config: SourceConfig) -> Source:
    if config != AS_IT_IS:
        raise UserError(
            f"ids:{folder} takes no filters and no key settings; those are for sources of images."
        )
    facts, files = read_facts(folder), files_of_ids(folder)
    units = [partial(read_ids, path=path, facts=facts) for path in files]
    read = [*files, *sorted(folder.glob("*.txt"))]
    return Source(units=lambda num_pairs: units, given=facts, listing=partial(_list_files, read))


def _files(paths: list[Path], sieve: Sift, config: SourceConfig) -> Source:
    suffixes = {path.suffix for path in paths}
    if suffixes == {".tar"}:
        tally = Tally()
        reads = units_of_tars(paths, tally, config=config)
        return Source(units=partial(_sifted, reads, sieve), tally=tally, listing=partial(_list_files, paths))
    if suffixes == {".parquet"}:
        return Source(
            units=lambda num_pairs: _sifted(units_of_tables(paths, num_pairs, config=config), sieve),
            listing=partial(_list_files, paths),
        )
    found = ", ".join(sorted(suffix or "no ending" for suffix in suffixes))
    raise DataError(f"--source names files with {found}; expected only .tar or only .parquet files.")


def _listed(read: ReadEntries, sieve: Sift) -> Source:
    """Make a source whose pairs are all listed now, like the files of a folder."""
    tally = Tally()
    # Counted aloud after a while: a large folder on a shared disk takes minutes.
    is_quiet = place_in_job()[0] > 0
    pairs = list(tqdm(sieve(tally, read=read), desc="list", unit="pair", delay=2, disable=is_quiet))
    if not pairs:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in tally.left_out.items())
        raise DataError(
            f"--source names a folder without a usable pair: {reasons or 'it has no image'}. Expected images"
            f" ({', '.join(IMAGE_SUFFIXES)}) with .txt captions beside them, or metadata.jsonl (.csv, .parquet), .tar"
            " or .parquet files at its top. For COCO give coco:DIR."
        )
    return Source(
        units=partial(_runs, pairs),
        tally=tally,
        listing=lambda: (Listed(pair.key, pair.caption, pair.file) for pair in pairs),
        num_pairs=len(pairs),
    )


def _list_files(paths: Iterable[Path]) -> list[Listed]:
    """List files of many pairs, with their folder's name, as keys have it."""
    return [Listed(f"{path.parent.absolute().name}/{path.name}", file=path) for path in paths]


def _list_dataset(name: str, num_shards: int) -> list[Listed]:
    """List a Hugging Face dataset: the files of a folder, or of one of the hub what it is called and its shards."""
    if Path(name).is_dir():
        return _list_files(sorted(path for path in Path(name).rglob("*") if path.is_file()))
    return [Listed(f"{name}/{shard}") for shard in range(num_shards)]


def _sifted(reads: Sequence[ReadEntries], sieve: Sift, num_pairs: int = 0) -> list[Unit]:
    """Make one unit per file or part of a file; its entries are listed when it is read."""
    return [partial(sieve, read=read) for read in reads]


def _runs(pairs: Sequence[Pair], num_pairs: int) -> list[Unit]:
    """Cut listed pairs into units of equal size."""
    return [partial(_run, pairs, start, start + num_pairs) for start in range(0, len(pairs), num_pairs)]


def _run(pairs: Sequence[Pair], start: int, end: int, _: Tally) -> Sequence[Pair]:
    return pairs[start:end]


def expand(pattern: str) -> list[Path]:
    """List the files that a pattern names, each once: braces in their order, globs sorted.

    Raises:
        DataError: a part of the pattern matches no file.
    """
    files: list[Path] = []
    for one in braces(pattern):
        path = Path(one)
        has_glob = not GLOB_CHARACTERS.isdisjoint(one)
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if has_glob else [path]
        if not found or not all(file.is_file() for file in found):
            raise DataError(
                f"--source {one} is not `openmoji`, an existing file or folder, coco:DIR, ids:DIR, or a Hugging Face"
                " dataset (USER/NAME, or hf: before any name)."
            )
        files += found
    return list(dict.fromkeys(files))


def braces(pattern: str) -> Iterator[str]:
    """Expand a pattern's braces; numbers are padded like the first one, and the first braces vary slowest."""
    match = re.search(r"\{([^{}]+)\}", pattern)
    if match is None:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        choices = [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from braces(pattern[: match.start()] + choice + pattern[match.end() :])
