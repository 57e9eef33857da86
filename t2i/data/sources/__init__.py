"""Sources of (image, caption) pairs, all opened by open_source.

`opening.py` decides what a name stands for. Each other file reads one kind of source and lists its entries. `source.py`
turns entries into pairs.
"""

from t2i.data.sources.caption import LeftOut
from t2i.data.sources.image import UNREADABLE, OpenedImage, decode_image
from t2i.data.sources.opening import open_source, reopen_source
from t2i.data.sources.source import GivenIds, Listed, Pair, Source, Tally, Unit

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
