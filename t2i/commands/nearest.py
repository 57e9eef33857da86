"""Compare image rows with text rows: nearest text tokens, cosine distributions, linear CKA.

Examples:
  python eval/nearest.py runs/train
  python eval/nearest.py runs/train --before runs/train/checkpoints/step_000200

Random rows are the control: image rows that are no nearer to text than they are do not mean text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from t2i.cli import parse

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class NearestCommand:
    """Which model, and which it came from."""

    ckpt: tyro.conf.Positional[str]
    """A run folder, a checkpoint, an exported folder or a hub name, with image codes."""
    before: str | None = None
    """An earlier CKPT with the same codes: adds linear CKA of image rows before and after."""
    num_shown: Annotated[int, Ge(0)] = 8
    """Codes whose nearest tokens are printed."""
    out: Path | None = None
    """File of the results; by default nearest.json in the run or exported folder."""


def main() -> None:
    command = parse(NearestCommand, description=__doc__ or "")
    from t2i.measure.embeddings import ROW_KINDS, compare_rows, write_nearest
    from t2i.runs.loading import open_model

    model = open_model(command.ckpt, needs_images=False)
    results = compare_rows(
        model, before=open_model(command.before, needs_images=False) if command.before else None
    )
    path = write_nearest(results, model=model, out=command.out)
    for side, found in results.items():
        median = {kind: found.quantiles(kind)["0.50"] for kind in ROW_KINDS}
        print(
            f"{side} rows: median cosine to the nearest text row: image {median['image']:.3f}, random"
            f" {median['random']:.3f}, text {median['text']:.3f}; a random row is nearer in"
            f" {found.random_nearer:.1%} of draws (50%: no difference)"
        )
        if found.cka is not None:
            print(f"  linear CKA of image rows before and after: {found.cka:.3f}")
        for code, tokens in list(enumerate(found.nearest_tokens))[: command.num_shown]:
            print(f"  code {code}: {'  '.join(map(repr, tokens))}")
    print(f"All of it: {path}")
