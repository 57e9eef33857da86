"""Which words of held-out captions training captions have too, from the shards of a run."""

import re
from pathlib import Path

from t2i.data.shards.manifest import MANIFEST, TRAIN, are_same_shards, read_manifest_file
from t2i.data.shards.reader import read_split
from t2i.errors import DataError
from t2i.runs.loading import DATA_MANIFEST
from t2i.runs.run_folder import read_settings

MOST_CAPTIONS = 200_000
"""Training captions that a report waits for."""
WORD = re.compile(r"\w+")


def known_words(run_dir: Path) -> dict[str, float]:
    """Compute for each held-out split which share of its captions' distinct words training captions have.

    Empty where the run's shards are not here any more, are not those that it was trained on, or are too many to read.
    """
    folder = Path(read_settings(run_dir).get("data", {}).get("shards", ""))
    kept, found = run_dir / DATA_MANIFEST, folder / MANIFEST
    if not kept.is_file() or not found.is_file():
        return {}
    counts = read_manifest_file(kept).counts
    if counts.get(TRAIN, 0) > MOST_CAPTIONS:
        return {}
    try:
        if not are_same_shards(kept, found):
            return {}
        words = {split: _words(folder, split) for split in counts}
    except DataError:  # a report is made of what can be read
        return {}
    trained = words.pop(TRAIN, set())
    return {split: len(one & trained) / len(one) for split, one in words.items() if one}


def _words(folder: Path, split: str) -> set[str]:
    captions = (sample.get("caption", "") for sample in read_split(folder, split))
    return {word for caption in captions for word in WORD.findall(caption.casefold())}
