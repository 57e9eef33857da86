"""img2dataset's WebDataset tars: KEY.jpg, KEY.txt and KEY.json side by side, read in place and never extracted.

A tar is one unit. Listing reads its headers only; a picture is read from its offset when it is opened.
"""

import io
import itertools
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from t2i.config import SourceConfig
from t2i.data.sources.source import IMAGE_SUFFIXES, Entry, ReadEntries, read_picture
from t2i.errors import DataError
from t2i.files import parse_json

logger = logging.getLogger(__name__)

MAX_PICTURE_BYTES, MAX_TEXT_BYTES = 2**27, 2**20
"""Larger members are left out unread."""
BROKEN_TAR = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, KeyError)
"""What tarfile raises for headers that are nonsense."""


class ListedFile(io.FileIO):
    """A tar that is read in small pieces only: a header may claim a name of gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes.

        Raises:
            tarfile.ReadError: more than any header or text has.
        """
        if size is None or not 0 <= size <= MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)


def units_of_tars(paths: list[Path], left_out: Counter[str], *, config: SourceConfig) -> list[ReadEntries]:
    """Make a unit of each finished tar; count and name the unfinished ones.

    img2dataset writes NAME_stats.json last: where some tars have one, a tar without is unfinished.
    """
    stats = {path.name for folder in {path.parent for path in paths} for path in folder.glob("*_stats.json")}
    units: list[ReadEntries] = []
    for path in paths:
        if stats and f"{path.stem}_stats.json" not in stats:
            logger.warning("%s has no %s_stats.json: unfinished, left out", path, path.stem)
            left_out["an unfinished tar (no _stats.json)"] += 1
        else:
            units.append(partial(read_tar, path=path, config=config))
    return units


def read_tar(left_out: Counter[str], *, path: Path, config: SourceConfig) -> Iterator[Entry]:
    """List the pictures of one tar in its order, with keys FOLDER/TAR/KEY; of a broken tar, what is whole of it."""
    prefix = f"{path.parent.absolute().name}/{path.stem}"
    try:
        with ListedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in itertools.groupby(_plain_members(tar), key=lambda member: _split(member)[0]):
                parts = {_split(member)[1]: member for member in members}
                entry = _entry(tar, path, f"{prefix}/{key}", parts, config)
                if isinstance(entry, Entry):
                    yield entry
                else:
                    left_out[entry] += 1
    except BROKEN_TAR as error:
        logger.warning("%s: %s; what is whole of it is used", path, error)
        left_out["a broken tar, from where it breaks"] += 1


def read_member(path: Path, offset: int, size: int) -> Image.Image:
    """Read the picture that lies at a place in a tar."""
    with path.open("rb") as file:
        file.seek(offset)
        return read_picture(file.read(size))


def _plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Go through the regular files; links, devices and sparse files are passed over, and no header is kept."""
    end = -1
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # or a million headers would stay in memory
        if member.offset <= end or member.size < 0:
            raise tarfile.ReadError("its members go backwards")  # and would be listed for ever
        end = member.offset
        if member.isreg() and not member.issparse():
            yield member


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Cut a member's name at its base name's first dot, as WebDataset does: ("a/b", "seg.png")."""
    name = PurePosixPath(member.name)
    stem, _, suffix = name.name.partition(".")
    return (name.parent / stem).as_posix(), suffix.lower()


def _entry(
    tar: tarfile.TarFile, path: Path, key: str, parts: dict[str, tarfile.TarInfo], config: SourceConfig
) -> Entry | str:
    """Build the entry of one key's members, or say why there is none."""
    picture = next((parts[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in parts), None)
    if picture is None:
        return "no picture beside the caption in a tar"
    if picture.size > MAX_PICTURE_BYTES:
        return f"a file over {MAX_PICTURE_BYTES} bytes in a tar"
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
