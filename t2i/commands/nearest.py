"""Compare image embeddings with text embeddings: nearest text tokens, cosine similarity, linear CKA.

Examples:
  python eval/nearest.py runs/train
  python eval/nearest.py runs/train --before runs/train/checkpoints/step_000200

Random embeddings are the control: image embeddings no nearer to text than these carry no text meaning.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import CKPT, Ckpt, parse

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class NearestCommand:
    """The model, and an earlier one to compare with."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i;
    with image codes."""
    before: Annotated[str | None, CKPT] = None
    """An earlier CKPT with the same codes; adds linear CKA between its image embeddings and today's."""
    num_shown: Annotated[int, Ge(0), Le(1_000_000_000)] = 8
    """So many codes are printed with their nearest tokens."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    out: Path | None = None
    """Results file. Default: nearest.json in the run or exported folder, or in demo_measures/ for demo."""


def main() -> None:
    command = parse(NearestCommand, description=__doc__ or "")
    from t2i.files import check_results_file, results_file
    from t2i.measure.embeddings import NEAREST, ROW_KINDS, compare_rows, is_tied, write_nearest
    from t2i.runs.loading import open_model

    # Before a model is read, which takes minutes where it is large.
    check_results_file(command.out, name=NEAREST, keys=("checkpoint", "input"))
    open_one = partial(open_model, needs_images=False, trust_remote_code=command.trust_remote_code)
    model = open_one(command.ckpt)
    path = results_file(command.out, default=model.measures / NEAREST)
    results = compare_rows(model, before=open_one(command.before) if command.before else None)
    write_nearest(results, model=model, path=path)
    for side, found in (
        {"input and output (tied)": results["input"]}.items() if is_tied(model) else results.items()
    ):
        median = {kind: found.quantiles(kind)["0.50"] for kind in ROW_KINDS}
        print(
            f"{side}: median cosine to the nearest text embedding: image {median['image']:.3f}, random"
            f" {median['random']:.3f}, text {median['text']:.3f}; random is nearer in"
            f" {found.random_nearer:.1%} of draws (50%: no difference)"
        )
        if found.cka is not None:
            print(f"  linear CKA of image embeddings before and after: {found.cka:.3f}")
        for code, tokens in list(enumerate(found.nearest_tokens))[: command.num_shown]:
            print(f"  code {code}: {'  '.join(map(repr, tokens))}")
    print(f"All of it: {path}")
