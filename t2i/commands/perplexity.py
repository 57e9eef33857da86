"""Measure held-out perplexity of text, image, special and all tokens, and the image loss by grid position.

What captions are worth is measured beside it: the image loss under shuffled captions and under the null caption. Each
held-out split is measured, also those under other wordings.

Examples:
  python eval/perplexity.py runs/train
  python eval/perplexity.py my_export --data.shards data/coco --num-images 512
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.config import Dtype, HeldoutData

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class PerplexityCommand:
    """The model and the held-out data."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i."""
    data: HeldoutData = field(default_factory=HeldoutData)
    num_images: Annotated[int, Ge(0)] = 0
    """Images of each held-out split, evenly spread; 0 for all."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Sequences per batch."""
    dtype: Dtype = "auto"
    """Number type of the model. auto: as it is stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    out: Path | None = None
    """Results file. Default: perplexity.json in the run or exported folder, or in demo_measures/ for demo."""


def main() -> None:
    command = parse(PerplexityCommand, description=__doc__ or "")
    import torch

    from t2i.files import check_results_file, results_file
    from t2i.measure.perplexity import PERPLEXITY, data_of, measure_perplexity, write_perplexity
    from t2i.runs.loading import open_model

    # Before a model is read, which takes minutes where it is large.
    check_results_file(command.out, name=PERPLEXITY, keys=("checkpoint", "splits"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(
        command.ckpt,
        device=device,
        needs_images=False,
        dtype=command.dtype,
        trust_remote_code=command.trust_remote_code,
    )
    path = results_file(command.out, default=model.measures / PERPLEXITY)
    config = data_of(model, shards=command.data.shards, mode=command.data.mode)
    results = measure_perplexity(
        model, config=config, batch_size=command.batch_size, num_images=command.num_images or None
    )
    write_perplexity(results, model=model, config=config, path=path)
    for split, found in results.items():
        print(f"{split} ({found.num_pictures} images)")
        for kind in ("text", "image", "special", "total"):
            if cost := getattr(found, kind):
                print(f"  {kind:8s} {cost.nats:.4f} nats, perplexity {cost.perplexity:.2f}")
        if found.places and found.places.bits_per_pixel is not None:
            print(f"  {found.places.bits_per_pixel:.4f} bits per pixel")
        if found.captions and found.captions.own is not None and found.captions.wrong is not None:
            own, wrong, null = found.captions.own, found.captions.wrong, found.captions.empty
            print(
                f"  image loss by caption: matched {own:.4f}, shuffled {wrong:.4f}, null {null:.4f};"
                f" a caption is worth {wrong - own:.4f} nats per code"
            )
    print(f"All of it: {path}")
