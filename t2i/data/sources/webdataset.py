"""img2dataset's WebDataset tars (KEY.jpg, KEY.txt and KEY.json, in any order), read in place and never extracted.

A tar is one unit. Listing reads its headers, then its captions. An image is read from its offset when it is opened.
"""

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from t2i.config import SourceConfig
from t2i.data.sources.caption import MAX_TEXT_BYTES, LeftOut, TextFile, mark_of
from t2i.data.sources.image import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, OpenedImage, decode_image
from t2i.data.sources.source import Entry, ReadEntries, Tally
from t2i.errors import DataError
from t2i.files import parse_json

logger = logging.getLogger(__name__)

BROKEN_TAR = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, KeyError)
"""What tarfile raises for invalid headers."""


class ListedFile(io.FileIO):
    """A tar file that refuses large reads: a header may claim a name of gigabytes, which tarfile would read whole."""

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes.

        Raises:
            tarfile.ReadError: `size` is more than any header or text has.
        """
        if size is None or not 0 <= size <= MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in its tar."""

    offset: int
    size: int


def unfinished_tars(paths: Collection[Path]) -> set[Path]:
    """Find the tars that are still being written: img2dataset writes NAME_stats.json last.

    If some tars of a folder have one, a tar without it is unfinished.
    """
    stats = {path for folder in {path.parent for path in paths} for path in folder.glob("*_stats.json")}
    finished = {path.parent for path in stats}
    return {
        path
        for path in paths
        if path.parent in finished and path.with_name(f"{path.stem}_stats.json") not in stats
    }


def units_of_tars(
    prefixes: dict[Path, str], tally: Tally, *, unfinished: Collection[Path], config: SourceConfig
) -> list[ReadEntries]:
    """Make one unit per finished tar; count the unfinished ones and log their names.

    Args:
        prefixes: the tars in order, and what their keys begin with.
    """
    units: list[ReadEntries] = []
    for path, prefix in prefixes.items():
        if path in unfinished:
            logger.warning("%s has no %s_stats.json: unfinished, left out", path, path.stem)
            tally.unread["an unfinished tar (no _stats.json)"] += 1
        else:
            units.append(partial(read_tar, path=path, prefix=prefix, config=config))
    return units


def read_tar(tally: Tally, *, path: Path, prefix: str, config: SourceConfig) -> Iterator[Entry]:
    """List the images of one tar in order, with keys PREFIX/KEY; of a broken tar, those before the break."""
    caption = config.caption_key.lower() or "txt"
    with path.open("rb") as file:
        groups, repeats = _groups(tally, path, caption)
        for stem, parts in groups.items():
            images = [parts[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in parts]
            # Of several samples of one key, the first image and the first caption are of one.
            if stem in repeats:
                images.sort(key=lambda image: image.offset)
            num_images = len(images) + repeats[stem]
            tally.seen += max(1, num_images)
            if num_images > 1:
                tally.left_out["another image of the same key in a tar"] += num_images - 1
            try:
                if not images:
                    raise LeftOut("no image beside the caption in a tar")
                yield _entry(file, path, f"{prefix}/{stem}", images[0], parts, config)
            except LeftOut as reason:
                tally.left_out[str(reason)] += 1


def read_member(path: Path, member: Member) -> OpenedImage:
    """Decode the image at an offset of a tar."""
    with path.open("rb") as file:
        file.seek(member.offset)
        return decode_image(file.read(member.size))


def _groups(tally: Tally, path: Path, caption: str) -> tuple[dict[str, dict[str, Member]], Counter[str]]:
    """List the members of each key, in the order of the keys: by their endings, the first of each.

    Returns:
        These, and the keys that have an ending twice, with the number of images that were left out for it.
    """
    endings = sorted(
        {caption, "txt", "json", *(suffix[1:] for suffix in IMAGE_SUFFIXES)}, key=len, reverse=True
    )
    groups: dict[str, dict[str, Member]] = {}
    repeats: Counter[str] = Counter()
    others: list[PurePosixPath] = []
    try:
        with ListedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _files_of(tar, tally):
                name = PurePosixPath(member.name)
                ending = next((one for one in endings if name.name.lower().endswith(f".{one}")), "")
                if (
                    any(part.startswith(".") and part != ".." for part in name.parts)
                    or "__MACOSX" in name.parts
                ):
                    tally.unread["a hidden file in a tar"] += 1
                elif not ending:
                    others.append(name)
                else:
                    stem = name.with_name(name.name[: -len(ending) - 1]).as_posix()
                    parts = groups.setdefault(stem, {})
                    if ending in parts:
                        repeats[stem] += f".{ending}" in IMAGE_SUFFIXES
                    else:
                        parts[ending] = Member(member.offset_data, member.size)
    except BROKEN_TAR as error:
        logger.warning("%s: %s; the images before this place are used", path, error)
        tally.unread["a broken tar, from where it breaks"] += 1
    # WebDataset ends a key at the first dot: A.seg.png is a part of the sample that A.jpg and A.txt belong to.
    for stem in [stem for stem in groups if "." in PurePosixPath(stem).name]:
        is_whole = groups[stem].keys() & {caption, "txt", "json"} and groups[stem].keys() - {
            caption,
            "txt",
            "json",
        }
        if not is_whole and _first_dot(PurePosixPath(stem)) in groups:
            del groups[stem]
    for name in others:
        if _first_dot(name) not in groups:
            tally.unread[f"a file of another kind in a tar ({name.suffix.lower() or 'no ending'})"] += 1
    return groups, repeats


def _first_dot(name: PurePosixPath) -> str:
    return name.with_name(name.name.partition(".")[0]).as_posix()


def _files_of(tar: tarfile.TarFile, tally: Tally) -> Iterator[tarfile.TarInfo]:
    """Iterate over the regular files; count links, devices and sparse files."""
    end = -1
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header, which a million would make large
        if member.offset <= end or member.size < 0:
            # A forged size can lead tarfile back to an earlier header, so that listing would never end.
            raise tarfile.ReadError("its members go backwards")
        end = member.offset
        # A name of dots alone is a folder's.
        if member.isreg() and not member.issparse() and PurePosixPath(member.name).name not in ("", ".."):
            yield member
        elif not member.isdir():
            tally.unread["a link or device in a tar"] += 1


def _entry(
    file: BinaryIO, path: Path, key: str, image: Member, parts: dict[str, Member], config: SourceConfig
) -> Entry:
    """Build the entry of one key's members.

    Raises:
        LeftOut: a member is too large, or its .json cannot be read.
    """
    if image.size > MAX_IMAGE_BYTES:
        raise LeftOut(f"a file over {MAX_IMAGE_BYTES} bytes")
    ending = config.caption_key.lower() or "txt"
    facts: dict[str, object] = {}
    if "json" in parts and (config.pair_key or config.score_key or ending not in parts):
        text = _bytes(file, parts["json"])
        try:
            facts = parse_json(text.decode(mark_of(text) or "utf-8", "surrogateescape"), where=key)
        except (DataError, UnicodeError):
            raise LeftOut("a .json that cannot be read in a tar") from None
    if ending in parts and ending != "json":
        caption: object = TextFile(_bytes(file, parts[ending]))
    else:
        caption = facts.get(config.caption_key or "caption")
    return Entry(key, caption, partial(read_member, path, image), facts=facts)


def _bytes(file: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise LeftOut(f"a text over {MAX_TEXT_BYTES} bytes")
    file.seek(member.offset)
    return file.read(member.size)
