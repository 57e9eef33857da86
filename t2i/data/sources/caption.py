"""Captions as sources have them: bytes, texts or lists of these, made lines of text, or refused by their type."""

import codecs
from dataclasses import dataclass

from t2i.files import lines_of

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark it begins with.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, which tell the encoding of a text."""

MAX_TEXT_BYTES = 2**20
"""Larger files of captions are left out, unread."""
FIRST_CAPTION = "the first of several captions"
JOINED_LINES = "the lines of a caption became one"
NO_CAPTION = "no caption"


class LeftOut(ValueError):
    """An entry becomes no pair, though nothing is broken; the text is the reason."""


@dataclass(frozen=True)
class TextFile:
    """The bytes of a file of captions, one or several lines."""

    data: bytes


@dataclass(frozen=True)
class CaptionLine:
    """A caption that can be used."""

    text: str
    """On one line, not empty."""
    changed: tuple[str, ...] = ()
    """What was lost or guessed, for Tally.changed."""


def read_captions(value: object, *, takes_all: bool, encoding: str) -> list[CaptionLine]:
    """Read what a source has as the caption of an image.

    Args:
        value: text, bytes, a list of these, a TextFile; None or NaN for none.
        takes_all: whether to return each of several captions, and each line of a TextFile, or the first, with its
            lines joined.
        encoding: of bytes that are neither UTF-8 nor marked.

    Raises:
        LeftOut: there is no caption, it is not text, or its encoding is another.
    """
    lines = [_line(text, encoding) for text in _texts(value, takes_all=takes_all, encoding=encoding)]
    found = [line for line in lines if line.text]
    if not found:
        raise LeftOut(NO_CAPTION)
    if takes_all or len(found) == 1:
        return found
    return [CaptionLine(found[0].text, (*found[0].changed, FIRST_CAPTION))]


def decode_text(data: bytes, *, encoding: str) -> tuple[str, tuple[str, ...]]:
    """Decode a caption's bytes; also return what was guessed.

    Raises:
        LeftOut: they are neither UTF-8, nor marked as another encoding, nor `encoding`.
    """
    mark = mark_of(data)
    if not mark:
        data = data.rstrip(b"\0")  # columns of fixed width are filled up with them
    try:
        return data.decode(mark or "utf-8"), ()
    except UnicodeDecodeError:
        pass
    # Text has no zero bytes; what has some is an image in the caption's column, or UTF-16 without its mark.
    if b"\0" in data:
        raise LeftOut("a caption of bytes that are not text")
    try:
        return data.decode(encoding), (f"a caption that is not UTF-8, read as {encoding}",)
    except UnicodeDecodeError:
        raise LeftOut(
            f"a caption that is neither UTF-8 nor {encoding} (--caption-encoding names another)"
        ) from None


def mark_of(data: bytes) -> str:
    """Return the encoding that a byte order mark tells; empty without one."""
    return next((name for mark, name in MARKS if data.startswith(mark)), "")


def encodable(text: str) -> str:
    """Escape what UTF-8 cannot hold, such as half of a surrogate pair, or a file name in another encoding."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _texts(value: object, *, takes_all: bool, encoding: str) -> list[str | bytes]:
    if isinstance(value, TextFile):
        if not takes_all:
            return [value.data]
        text, guessed = decode_text(value.data, encoding=encoding)
        # Encoded as it was, so that each line is said to be guessed.
        return [line.encode(encoding) if guessed else line for line in lines_of(text)]
    # NaN is how tables write that there is none.
    if value is None or value != value:
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, list | tuple):
        present = [one for one in value if one is not None]
        other = next((one for one in present if not isinstance(one, str | bytes)), None)
        if other is None:
            return present
        raise LeftOut(f"a caption that is a list with {_kind(other)} in it; --caption-key names another")
    raise LeftOut(f"a caption that is {_kind(value)}, not text; --caption-key names another")


def _kind(value: object) -> str:
    """Name a type as tables do."""
    kinds = {"dict": "an object of keys", "bool": "true or false", "int": "a number", "float": "a number"}
    return kinds.get(type(value).__name__, f"of type {type(value).__name__}")


def _line(text: str | bytes, encoding: str) -> CaptionLine:
    changed: tuple[str, ...] = ()
    if isinstance(text, str) and not text.isascii():
        try:
            # Tables are read with bytes of another encoding kept as lone surrogates.
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = _bytes_of(text)
    if isinstance(text, bytes):
        text, changed = decode_text(text, encoding=encoding)
    text = encodable(text).replace("\0", "").strip().lstrip("\ufeff")
    lines = [line for line in lines_of(text) if line.strip()] if "\n" in text or "\r" in text else []
    return CaptionLine(" ".join(text.split()), (*changed, JOINED_LINES) if len(lines) > 1 else changed)


def _bytes_of(text: str) -> str | bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text  # half of a surrogate pair, from JSON's \uD83D
