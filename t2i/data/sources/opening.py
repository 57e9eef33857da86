"""Open a source by its name: which kind it is, and where its parts lie."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from t2i.config import SourceConfig
from t2i.data.shards.manifest import Manifest
from t2i.data.sources import openmoji
from t2i.data.sources.coco import caption_files, has_both, list_coco
from t2i.data.sources.folder import (
    METADATA,
    find_metadata,
    list_files,
    other_kind,
    read_image_folder,
    read_text_folder,
)
from t2i.data.sources.hub import is_saved, revision_of, units_of_dataset
from t2i.data.sources.iconify import HELDOUT_SHARE, SPLIT_RULE, WORDING_SPLITS, list_icons, read_icon_sets
from t2i.data.sources.image import IMAGE_SUFFIXES
from t2i.data.sources.listing import list_source
from t2i.data.sources.parquet import units_of_tables
from t2i.data.sources.pattern import expand, key_prefixes
from t2i.data.sources.precomputed import files_of_ids, read_facts, read_ids
from t2i.data.sources.source import (
    Entry,
    KeyForm,
    Listed,
    Pair,
    ReadEntries,
    Source,
    Tally,
    Unit,
    sift,
)
from t2i.data.sources.splits import USUAL_SHARE, choose_share, with_splits
from t2i.data.sources.webdataset import unfinished_tars, units_of_tars
from t2i.distributed.heartbeat import place_in_job
from t2i.errors import DataError, UserError
from t2i.files import HUB, hub_name

logger = logging.getLogger(__name__)

AS_IT_IS = SourceConfig()
LISTS = (".csv", ".tsv", ".jsonl")
"""Endings of tables that name image files. A .parquet file has the images themselves."""

Sift = Callable[..., Iterator[Pair]]
"""`sift` with its rules filled in; takes a reader."""


def open_source(
    name: str,
    *,
    heldout_share: float | None = None,
    config: SourceConfig = AS_IT_IS,
    key_form: KeyForm = "row",
) -> Source:
    """Open a source without decoding its images.

    Args:
        name: `openmoji`, a folder, tar or parquet files (a path with braces and globs), a .csv, .tsv or .jsonl that
            names images, `coco:DIR`, `iconify:FOLDER` of icon sets, `ids:DIR`, or a Hugging Face dataset
            (`hf:` and USER/NAME or a folder).
        heldout_share: share of the images, chosen by a hash of the key, that training never sees; None for 2%, or
            for more of a small source.
        config: which columns are read, and which pairs are left out.
        key_form: how keys are made; another than now for shards of older versions.

    Raises:
        DataError: the source does not exist, or has no usable pair.
        UserError: the settings contradict each other.
    """
    if not name:
        raise UserError("--source is empty; expected one of the sources that `--help` lists.")
    sieve = partial(sift, config=config)
    kind, _, rest = name.partition(":")
    if name == "openmoji":
        source = _openmoji(sieve)
    elif kind == "coco":
        source = _coco(Path(rest), sieve)
    elif kind == "iconify":
        source = _icons(rest, sieve, config, share=HELDOUT_SHARE if heldout_share is None else heldout_share)
    elif kind == "ids":
        source = _given(Path(rest), config)
    elif hub_name(name) or is_saved(Path(name)):
        reads = units_of_dataset(name.removeprefix(HUB), config=config, key_form=key_form)
        listing = partial(_list_dataset, name.removeprefix(HUB), len(reads))
        source = Source(units=partial(_sifted, reads, sieve), listing=listing, is_streamed=True)
    elif Path(name).is_dir():
        source = _folder(Path(name), sieve, config, key_form)
    else:
        source = _files(name, expand(name), sieve, config, key_form)
    if name != "openmoji" and kind != "iconify":
        share = heldout_share
        if share is None:
            # A dataset of the hub would be downloaded twice.
            is_remote = hub_name(name) and not Path(hub_name(name)).is_dir()
            share = USUAL_SHARE if is_remote else choose_share(source)
        rule = f"sha256 of the key below {share} of its range is heldout"
        source = replace(with_splits(source, heldout_share=share), split_rule=source.split_rule or rule)
    return replace(source, name=name, config=config)


def reopen_source(manifest: Manifest) -> Source:
    """Open a manifest's source with the settings that it was prepared with, and say if it has changed since.

    Raises:
        DataError: it is neither where it was nor at the same name from here.
    """
    try:
        config = SourceConfig(**manifest.reading or {})
    except TypeError as error:
        raise DataError(
            f"the manifest of {manifest.source} has settings that are unknown: {error}."
        ) from error
    # Manifests of 0.1 do not count what was seen. Their held-out images are found by the keys that they had.
    is_old = manifest.seen is None
    form: KeyForm = "bare" if is_old else "row" if manifest.arguments.get("keys") == "row" else "shard"
    name = manifest.source
    if is_old and name.count("/") == 1 and ":" not in name and not Path(name).exists():
        name = f"{HUB}{name}"
    opened = partial(open_source, heldout_share=manifest.heldout_share, config=config, key_form=form)
    try:
        source = opened(str(manifest.arguments.get("source_path", name)))
    except DataError as error:
        try:
            source = opened(name)  # a project may have been moved with its images
        except DataError:
            # No flag of this command gave the name, which the readers speak of as one.
            raise DataError(
                f"images are read again from the source that the shards were prepared from, {manifest.source}, which"
                f" is neither where it was nor in {Path.cwd()}. Put it back. ({error})"
            ) from error
    listed = manifest.arguments.get("listed")
    if listed and listed != (now := list_source(source).fingerprint):
        logger.warning(
            "%s has changed since its shards were made (%s then, %s now); what is there now is used.",
            source.name, listed, now,
        )  # fmt: skip
    return replace(source, name=manifest.source)


def _folder(folder: Path, sieve: Sift, config: SourceConfig, key_form: KeyForm) -> Source:
    table = find_metadata(folder)
    if table:
        return _named(table, sieve, config)
    # img2dataset's layout of plain files has 00000.parquet, which holds no images, beside the folder 00000.
    tables = [path for path in folder.glob("*.parquet") if not path.with_suffix("").is_dir()]
    # Sorted: the order of units, and so the shards, must not depend on the file system.
    files = sorted(folder.glob("*.tar")) or sorted(tables)
    tally = Tally()
    # Not those that are links out of the folder; whoever means them names them by a pattern.
    listed = set(list_files(folder, tally)) if files else set()
    files = [path for path in files if path in listed]
    if files:
        source = _files(str(folder), files, sieve, config, key_form)
        # NAME.parquet and NAME_stats.json are img2dataset's words on NAME.tar.
        stems = {path.stem for path in files}
        others = [path for path in listed if path.stem.removesuffix("_stats") not in stems]
        tally.unread.update(map(other_kind, others))
        source.tally.add(tally)
        return source
    return _listed(partial(read_text_folder, folder=folder, caption_key=config.caption_key), sieve, folder)


def _named(table: Path, sieve: Sift, config: SourceConfig) -> Source:
    read = partial(
        read_image_folder,
        table=table,
        caption_key=config.caption_key,
        image_key=config.image_key,
        takes_all=config.captions == "all",
    )
    return _listed(read, sieve, table)


def _openmoji(sieve: Sift) -> Source:
    captions, left_out = openmoji.captioned_keys()

    def entries(tally: Tally) -> Iterator[Entry]:
        tally.seen += len(captions) + left_out.total()
        tally.left_out.update(left_out)
        for key, caption in captions.items():
            yield Entry(key, caption, partial(openmoji.open_emoji, key), split=openmoji.split_of(key))

    source = _listed(entries, sieve, Path())
    return replace(source, split_rule=openmoji.SPLIT_RULE, licence=openmoji.LICENCE)


def _coco(folder: Path, sieve: Sift) -> Source:
    source = _listed(partial(list_coco, folder=folder), sieve, folder)
    if has_both(caption_files(folder)):
        return replace(source, split_rule="images of captions_val*.json are heldout, all others train")
    return source


def _icons(pattern: str, sieve: Sift, config: SourceConfig, *, share: float) -> Source:
    icons = read_icon_sets(pattern)
    read = partial(list_icons, icons=icons, heldout_share=share, size=config.icon_size)
    source = _listed(read, sieve, Path(pattern))
    files, rule = [one.file for one in icons.sets], SPLIT_RULE.format(share=share)
    source = replace(
        source, listing=partial(_list_icons, source, files), split_rule=rule, heldout_share=share
    )
    return replace(source, licence=icons.licence, wordings=WORDING_SPLITS)


def _list_icons(source: Source, files: list[Path]) -> list[Listed]:
    # Captions tell the words; of a new version of a set, its file's size tells the drawings.
    return [*source.listing(), *_list_files(files)]


def _given(folder: Path, config: SourceConfig) -> Source:
    if replace(config, caption_encoding=AS_IT_IS.caption_encoding) != AS_IT_IS:
        raise UserError(
            f"ids:{folder} takes no filters and no key settings; those are for sources of images."
        )
    if not folder.is_dir():
        raise DataError(f"--source ids:{folder} is not a folder.")
    facts, tally = read_facts(folder), Tally()
    files = files_of_ids(folder, tally)
    read = partial(read_ids, facts=facts, encoding=config.caption_encoding)
    units = [partial(read, path=path) for path in files]
    listing = partial(_list_files, [*files, *sorted(folder.glob("*.txt"))])
    return Source(units=lambda num_pairs: units, given=facts, tally=tally, listing=listing)


def _files(pattern: str, paths: list[Path], sieve: Sift, config: SourceConfig, key_form: KeyForm) -> Source:
    prefixes = key_prefixes(paths, pattern=pattern)
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".tar"}:
        tally = Tally()
        # Which tars are left out is a part of what the source is: units are known by their number alone.
        unfinished = unfinished_tars(paths)
        reads = units_of_tars(prefixes, tally, unfinished=unfinished, config=config)
        listing = partial(_list_files, paths, unfinished=unfinished)
        return Source(units=partial(_sifted, reads, sieve), tally=tally, listing=listing)
    if suffixes == {".parquet"}:
        read = partial(units_of_tables, prefixes, config=config, has_bare_keys=key_form == "bare")
        return Source(
            units=lambda num_pairs: _sifted(read(num_pairs), sieve), listing=partial(_list_files, paths)
        )
    if len(paths) == 1 and suffixes <= set(LISTS):
        return _named(paths[0], sieve, config)
    found = ", ".join(sorted(suffix or "no ending" for suffix in suffixes))
    raise DataError(
        f"--source names {len(paths)} files with {found}; expected only .tar or only .parquet files, or one of"
        f" {', '.join(LISTS)} that names images. An archive such as .zip or .tar.gz must be unpacked first."
    )


def _listed(read: ReadEntries, sieve: Sift, place: Path) -> Source:
    """Make a source whose pairs are all listed now, like the files of a folder."""
    tally = Tally()
    # Counted aloud after a while: a large folder on a shared disk takes minutes.
    is_quiet = place_in_job()[0] > 0
    pairs = list(tqdm(sieve(tally, read=read), desc="list", unit="pair", delay=2, disable=is_quiet))
    if not pairs:
        reasons = "; ".join(
            f"{count} times {reason}" for reason, count in (tally.left_out + tally.unread).items()
        )
        raise DataError(
            f"--source {place} is without a usable pair: {reasons or 'it has no image'}. Expected images"
            f" ({', '.join(IMAGE_SUFFIXES)}) with .txt captions beside them, or metadata.jsonl (.csv, .parquet), .tar"
            f" or .parquet files at its top.{_advice(place)} For COCO give coco:DIR."
        )
    return Source(
        units=partial(_runs, pairs),
        tally=tally,
        listing=lambda: (Listed(pair.key, pair.caption, pair.file) for pair in pairs),
        num_pairs=len(pairs),
    )


def _list_files(paths: Iterable[Path], *, unfinished: Collection[Path] = ()) -> list[Listed]:
    """List files of many pairs, with their folder's name, as keys have it."""
    return [
        Listed(
            f"{path.parent.absolute().name}/{path.name}",
            "unfinished" if path in unfinished else "",
            file=path,
        )
        for path in paths
    ]


def _list_dataset(name: str, num_shards: int) -> list[Listed]:
    """List a Hugging Face dataset: the files of a folder, or of one of the hub its revision and shards."""
    if Path(name).is_dir():
        return _list_files(sorted(path for path in Path(name).rglob("*") if path.is_file()))
    revision = revision_of(name)
    return [Listed(f"{name}/{shard}", text=revision) for shard in range(num_shards)]


def _advice(folder: Path) -> str:
    """Name the folder that has what this one lacks, if there is one."""
    below = next((path for name in METADATA for path in sorted(folder.glob(f"*/{name}"))), None)
    if below:
        return f" {below.relative_to(folder)} is not at its top: give {below.parent}, or {HUB}{folder}."
    has_classes = any(folder.glob("*/*"))
    return " If the names of folders are the captions, give --caption-key label." if has_classes else ""


def _sifted(reads: Sequence[ReadEntries], sieve: Sift, num_pairs: int = 0) -> list[Unit]:
    """Make one unit per file or part of a file; its entries are listed when it is read."""
    return [partial(sieve, read=read) for read in reads]


def _runs(pairs: Sequence[Pair], num_pairs: int) -> list[Unit]:
    """Cut listed pairs into units of equal size."""
    return [partial(_run, pairs, start, start + num_pairs) for start in range(0, len(pairs), num_pairs)]


def _run(pairs: Sequence[Pair], start: int, end: int, _: Tally) -> Sequence[Pair]:
    return pairs[start:end]
