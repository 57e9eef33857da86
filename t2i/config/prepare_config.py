"""Settings of shards: what is read of a source, and how it is encoded."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from t2i.errors import UserError
from t2i.settings import OR_ZERO, check_values

EMBEDDED_VIEWS = 8
"""PrepareConfig.views of the embedded images, which are only some 3,500."""


@dataclass(frozen=True)
class SourceConfig:
    """What is read of a source. Pairs that are left out are counted in the manifest, by reason."""

    caption_key: str = ""
    """Column, JSON key or file ending in a tar of the caption; empty for `txt` in tars, else `text` or `caption`."""
    image_key: str = ""
    """Column of the images in parquet and Hugging Face datasets; empty for their usual names."""
    pair_key: str = ""
    """Column or JSON key that names a pair, such as url; later pairs of the same name are left out. Empty: each pair is
    named by its place."""
    hub_split: str = "train"
    """Split of a Hugging Face dataset."""
    hub_subset: str = ""
    """Subset (configuration) of a Hugging Face dataset; empty for its default."""
    min_side: Annotated[int, Ge(0)] = 0
    """Smallest shorter side of an image, in pixels."""
    max_aspect: Annotated[float, Ge(1), OR_ZERO] = 0.0
    """Largest ratio of the longer side to the shorter; 0 for any."""
    min_caption: Annotated[int, Ge(0)] = 1
    """Fewest characters of a caption."""
    max_caption: Annotated[int, Ge(0)] = 0
    """Most characters of a caption; 0 for any."""
    score_key: str = ""
    """Column or JSON key of a score, such as aesthetic or similarity."""
    min_score: float | None = None
    """Smallest score of score_key that is kept; None for any."""

    def __post_init__(self) -> None:
        check_values(self)
        if 0 < self.max_caption < self.min_caption:
            raise UserError(
                f"--max-caption is {self.max_caption}; expected at least --min-caption {self.min_caption}."
            )
        if self.min_score is not None and not self.score_key:
            raise UserError(f"--min-score is {self.min_score}, but --score-key names no column or JSON key.")


@dataclass(frozen=True)
class PrepareConfig:
    """How shards are made."""

    image_size: Annotated[int, Ge(1), Le(16_384)] = 64
    """Pixels per side, after a centre crop (paper: 256)."""
    views: Annotated[int, Ge(1), Le(1_000)] = 1
    """Copies of each training image: as it is, and shifted by up to a sixteenth of its side. Against overfitting."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Images per batch of the image tokenizer."""
    unit_pairs: Annotated[int, Ge(1), Le(1_000_000_000)] = 512
    """Pairs per resumable unit of work, which is also one shard file per split. A tar is always one unit."""
    max_broken: Annotated[float, Ge(0), Le(1)] = 0.1
    """Largest share of broken images; with more, nothing is made. They are listed in broken.jsonl."""
    workers: Annotated[int, Ge(0), Le(1_000)] = 0
    """Processes per rank that read, crop and resize while the rank itself encodes; 0 for none."""

    def __post_init__(self) -> None:
        check_values(self)
