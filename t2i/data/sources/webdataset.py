"""img2dataset's WebDataset tars (KEY.jpg, KEY.txt and KEY.json side by side), read in place and never extracted.

A tar is one unit. Listing reads only its headers. An image is read from its offset when it is opened.
"""

import io
import itertools
import logging
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from t2i.config import SourceConfig
from t2i.data.sources.image import OpenedImage, decode_image
from t2i.data.sources.source import IMAGE_SUFFIXES, Entry, ReadEntries, Tally
from t2i.errors import DataError
from t2i.files import parse_json

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 2**27, 2**20
"""Larger members are left out, unread."""
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


def units_of_tars(paths: list[Path], tally: Tally, *, config: SourceConfig) -> list[ReadEntries]:
    """Make one unit per finished tar; count the unfinished ones and log their names."""
    # img2dataset writes NAME_stats.json last. If some tars have one, a tar without it is unfinished.
    stats = {path.name for folder in {path.parent for path in paths} for path in folder.glob("*_stats.json")}
    units: list[ReadEntries] = []
    for path in paths:
        if stats and f"{path.stem}_stats.json" not in stats:
            logger.warning("%s has no %s_stats.json: unfinished, left out", path, path.stem)
            tally.unread["an unfinished tar (no _stats.json)"] += 1
        else:
            units.append(partial(read_tar, path=path, config=config))
    return units


def read_tar(tally: Tally, *, path: Path, config: SourceConfig) -> Iterator[Entry]:
    """List the images of one tar in order, with keys FOLDER/TAR/KEY; of a broken tar, those before the break."""
    # With the folder's name: two downloads number their tars alike, and would lose pairs as repeated keys.
    prefix = f"{path.parent.absolute().name}/{path.stem}"
    try:
        with ListedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in itertools.groupby(_plain_members(tar), key=lambda member: _split(member)[0]):
                tally.seen += 1
                parts = {_split(member)[1]: member for member in members}
                entry = _entry(tar, path, f"{prefix}/{key}", parts, config)
                if isinstance(entry, Entry):
                    yield entry
                else:
                    tally.left_out[entry] += 1
    except BROKEN_TAR as error:
        logger.warning("%s: %s; the images before this place are used", path, error)
        tally.unread["a broken tar, from where it breaks"] += 1


def read_member(path: Path, offset: int, size: int) -> OpenedImage:
    """Decode the image at an offset of a tar."""
    with path.open("rb") as file:
        file.seek(offset)
        return decode_image(file.read(size))


def _plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over the regular files, without links, devices and sparse files."""
    end = -1
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header, which a million would make large
        if member.offset <= end or member.size < 0:
            # A forged size can lead tarfile back to an earlier header, so that listing would never end.
            raise tarfile.ReadError("its members go backwards")
        end = member.offset
        if member.isreg() and not member.issparse():
            yield member


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name, as WebDataset does: ("a/b", "seg.png")."""
    name = PurePosixPath(member.name)
    stem, _, suffix = name.name.partition(".")
    return (name.parent / stem).as_posix(), suffix.lower()


def _entry(
    tar: tarfile.TarFile, path: Path, key: str, parts: dict[str, tarfile.TarInfo], config: SourceConfig
) -> Entry | str:
    """Build the entry of one key's members, or return the reason that there is none."""
    picture = next((parts[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in parts), None)
    if picture is None:
        return "no image beside the caption in a tar"
    if picture.size > MAX_IMAGE_BYTES:
        return f"a file over {MAX_IMAGE_BYTES} bytes in a tar"
    caption_key = config.caption_key or ("txt" if "txt" in parts else "caption")
    facts: dict[str, object] = {}
    if config.pair_key or config.score_key or caption_key not in parts:
        try:
            facts = parse_json(_text(tar, parts["json"]), where=key) if "json" in parts else {}
        except DataError:
            return "a .json that cannot be read in a tar"
    caption = _text(tar, parts[caption_key]) if caption_key in parts else facts.get(caption_key)
    return Entry(key, caption, partial(read_member, path, picture.offset_data, picture.size), facts=facts)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None, "only regular files come here"
    return file.read(MAX_TEXT_BYTES).decode("utf-8", errors="replace")
