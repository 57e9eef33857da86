"""Settings of shards: which pairs of a source are read, and how they are encoded."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from t2i.errors import UserError
from t2i.settings import OR_ZERO, check_values

EMBEDDED_VIEWS = 8
"""PrepareConfig.views of the embedded images, which are only about 3,500."""


@dataclass(frozen=True)
class SourceConfig:
    """Which pairs of a source are read. Pairs that are left out are counted in the manifest, by reason."""

    # Empty for keys whose default depends on the kind of source, which is known only once it is opened.
    caption_key: str = ""
    """Column or JSON key of the caption, or its file extension in folders and tars. Empty: `txt` there, else `text` or
    `caption`. `label`: in folders without captions, the name of the folder that an image is in."""
    captions: Literal["first", "all"] = "first"
    """Of several captions of one image: the first, or a pair of each. With `all` each line of a .txt is a caption; with
    `first` its lines become one."""
    caption_encoding: str = "cp1252"
    """Encoding of captions that are neither UTF-8 nor marked as UTF-16, such as gbk or shift_jis. They are counted."""
    image_key: str = ""
    """Column of the images in parquet and Hugging Face datasets, or of their names in metadata. Empty: one of their
    usual names."""
    pair_key: str = ""
    """Column or JSON key that identifies a pair, such as url; later pairs with the same value are left out. Empty: a
    pair is identified by its position."""
    hub_split: str = "train"
    """Split of a Hugging Face dataset."""
    hub_subset: str = ""
    """Subset (configuration) of a Hugging Face dataset; empty for its default."""
    icon_size: Annotated[int, Ge(16), Le(16_384)] = 256
    """Pixels per side at which vector icons (iconify:) are drawn, before they are resized. At 64, drawing is about five
    times as fast."""
    # 2: images of one pixel count visits of web pages; many are in sets that were gathered from the web.
    min_side: Annotated[int, Ge(0)] = 2
    """Minimum length of an image's shorter side, in pixels."""
    max_aspect: Annotated[float, Ge(1), OR_ZERO] = 0.0
    """Maximum ratio of the longer side to the shorter; 0 for any."""
    # 1: an empty caption would be the null caption, which caption_dropout makes on its own.
    min_caption: Annotated[int, Ge(0)] = 1
    """Minimum number of characters in a caption."""
    max_caption: Annotated[int, Ge(0)] = 0
    """Maximum number of characters in a caption; 0 for any."""
    score_key: str = ""
    """Column or JSON key of a score, such as aesthetic or similarity."""
    # None and not 0 for any: scores may be negative.
    min_score: float | None = None
    """Minimum score (see score_key); None for any."""

    def __post_init__(self) -> None:
        check_values(self)
        try:
            "a".encode(self.caption_encoding)
        except LookupError as error:
            raise UserError(
                f"--caption-encoding is {self.caption_encoding!r}; expected one that Python knows, such as cp1252,"
                " gbk or shift_jis."
            ) from error
        if 0 < self.max_caption < self.min_caption:
            raise UserError(
                f"--max-caption is {self.max_caption}; expected at least --min-caption {self.min_caption}."
            )
        if self.min_score is not None and not self.score_key:
            raise UserError(f"--min-score is {self.min_score}, but --score-key names no column or JSON key.")


@dataclass(frozen=True)
class PrepareConfig:
    """How shards are made."""

    # 64 for the embedded images: they become 64 codes, which a small model learns on two CPU cores.
    image_size: Annotated[int, Ge(1), Le(16_384)] = 64
    """Pixels per side, after a centre crop (paper: 256)."""
    views: Annotated[int, Ge(1), Le(1_000)] = 1
    """Views of each training image, against overfitting: the image, and copies shifted by up to a sixteenth of its
    side."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Images per batch of the image tokenizer."""
    # A killed preparation repeats the units that were under way, at most one per rank.
    unit_pairs: Annotated[int, Ge(1), Le(1_000_000_000)] = 512
    """Pairs per resumable unit of work, which is also one shard file per split. A tar is always one unit."""
    max_broken: Annotated[float, Ge(0), Le(1)] = 0.1
    """Maximum share of broken images; with more, no shards are made. They are listed in broken.jsonl."""
    workers: Annotated[int, Ge(0), Le(1_000)] = 0
    """Processes per rank that read, crop and resize while the rank itself encodes; 0 for none."""

    def __post_init__(self) -> None:
        check_values(self)
