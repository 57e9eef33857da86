"""Rows that hold one sequence each, so that attention is causal without a mask.

By their positions, transformers looks for several sequences in a row. 4.57 then makes a mask (B, 1, S, S) in every
pass, and 5 waits for the GPU. With a mask SDPA cannot take its fastest kernels, and keys and values are repeated for
each query head. The name of the search is private; it was read in transformers 4.57.6 and 5.24.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils

SEARCH = "find_packed_sequence_indices"
_own_search = getattr(masking_utils, SEARCH, None)


@contextmanager
def unpacked() -> Iterator[None]:
    """Let transformers take every row inside the block as one sequence, whose positions follow each other."""
    if _own_search is None:  # a release that does not look for them
        yield
        return
    setattr(masking_utils, SEARCH, _none)
    try:
        yield
    finally:
        # Not what the block found: it may have begun inside that of another thread.
        setattr(masking_utils, SEARCH, _own_search)


def _none(position_ids: Tensor) -> None:
    """Find no second sequence."""
