"""One number for the size of a randomly initialised model: from the first demo (6) to the paper's model (24).

Both ends are known: the first demo was tried here, and the paper names its own. In between, each quantity follows the
power law through these two points. Nothing between them was tried.
"""

import math

DEMO, PAPER = 6, 24
"""Layers of the two."""
WIDTHS = {DEMO: 192, PAPER: 2_048}
RATES = {DEMO: 1.5e-3, PAPER: 3e-4}
BATCHES = {DEMO: 3_072, PAPER: 1_032_192}
"""Tokens per step."""


def size_settings(layers: int) -> dict[str, float]:
    """Choose width, heads, learning rate and batch for a number of layers: settings by their keys."""
    # Wider with depth than in proportion: 32 per layer at the demo, 85 at the paper's.
    width = _between(WIDTHS, layers)
    head = 32 if width < 384 else 64 if width < 1_536 else 128
    # Whole heads, and a multiple of 64, which matrix products on a GPU like.
    width = round(width / max(head, 64)) * max(head, 64)
    # The larger rates of smaller models fall with the width, to the power 0.68: between 1/2 and the 1 that one theory
    # of wide networks asks for hidden matrices (arXiv:2203.03466).
    rate = RATES[DEMO] * (WIDTHS[DEMO] / width) ** _exponent(RATES, WIDTHS)
    # Tokens per step grow almost as the parameters of the layers do.
    sizes = {number: number * value**2 for number, value in WIDTHS.items()}
    grown = layers * width**2 / sizes[DEMO]
    batch = BATCHES[DEMO] * grown ** (-_exponent(BATCHES, sizes))
    return {
        "model.num_layers": layers,
        "model.hidden_size": width,
        "model.num_heads": width // head,
        "train.lr": float(f"{rate:.2g}"),
        "train.global_batch_tokens": round(batch / 1_024) * 1_024,
    }


def _between(ends: dict[int, int], layers: int) -> float:
    return float(
        ends[DEMO] * (layers / DEMO) ** (math.log(ends[PAPER] / ends[DEMO]) / math.log(PAPER / DEMO))
    )


def _exponent(values: dict[int, float] | dict[int, int], over: dict[int, int]) -> float:
    """Return p of values ~ over ** -p through both ends."""
    return -math.log(values[PAPER] / values[DEMO]) / math.log(over[PAPER] / over[DEMO])
