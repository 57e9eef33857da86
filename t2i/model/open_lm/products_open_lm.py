"""Products with weights that oneDNN packs, for few rows at a time.

This file is uploaded with exported models, so it imports only torch.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def product(weight: Tensor, *, num_rows: int) -> Callable[[Tensor], Tensor]:
    """Prepare x (num_rows, D) -> x weight^T.

    In fp32 on x86 processors, oneDNN packs the weight in its own blocks: half the time at 2 rows, a third at 16.
    """
    if not has_blocks(weight):
        return functools.partial(F.linear, weight=weight)
    # Not public, but torch's own compiler calls it. Packed once here, and used by every step.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, None, "none", [], "")


def has_blocks(weight: Tensor) -> bool:
    """Tell whether oneDNN can pack a weight here."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return (
        is_plain and torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
    )
