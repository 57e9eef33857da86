"""What a user should hear of new shards: whether anything can be measured on them, and how long sequences must be."""

import math
from collections.abc import Iterator

from t2i.data.shards.accounts import num_pairs
from t2i.data.shards.captions import seq_len_for
from t2i.data.shards.manifest import Manifest
from t2i.data.sources.splits import LEAST_HELDOUT, MOST_OF_SMALL

LEAST_SCORED = 20
"""Held-out images below which scores are refused."""


def advice_lines(manifest: Manifest, *, is_share_chosen: bool) -> Iterator[str]:
    """Say what follows from the counts of new shards.

    Args:
        is_share_chosen: no --heldout-share was given.
    """
    if manifest.caption_tokens:
        longest = max(map(int, manifest.caption_tokens))
        enough = seq_len_for(longest, manifest)
        yield f"Captions have up to {longest:,} text tokens; --data.seq-len {enough} truncates none."
    views = (manifest.prepare or {}).get("views", 1)
    total = num_pairs(manifest.counts, views=views)
    num_heldout = total - num_pairs({"train": manifest.counts["train"]}, views=views)
    share = f"--heldout-share {manifest.heldout_share:g}"
    if num_heldout < LEAST_SCORED:
        larger = math.ceil(100 * LEAST_HELDOUT / total) / 100
        is_enough = total >= LEAST_SCORED / MOST_OF_SMALL
        remedy = (
            f"use --heldout-share {larger:g} and another --out" if is_enough else "more images are needed"
        )
        yield (
            f"{num_heldout} of {total} pairs are held out ({share}). Scores need at least {LEAST_SCORED}, and held-out"
            f" losses at least 2: {remedy}."
        )
    elif is_share_chosen and "sha256" in (manifest.split_rule or "") and manifest.heldout_share > 0.02:
        yield (
            f"{num_heldout} of {total} pairs are held out: {share} was chosen, because they are few. Give it too when"
            " you prepare the source with more images: then each image keeps its split."
        )
