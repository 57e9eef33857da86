"""Measure how text, image and special tokens share the tokens, the loss and the gradient norm.

Examples:
  python eval/gradients.py runs/train
  python eval/gradients.py runs/train/checkpoints/step_000200 --num-sequences 256
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.config import HeldoutData

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class GradientsCommand:
    """The model and the held-out data."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i;
    with image codes."""
    data: HeldoutData = field(default_factory=HeldoutData)
    num_sequences: Annotated[int, Ge(1), Le(1_000_000_000)] = 64
    """Held-out pairs that are measured."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    out: Path | None = None
    """Results file. Default: gradients.json in the run or exported folder, or in demo_measures/ for demo."""


def main() -> None:
    command = parse(GradientsCommand, description=__doc__ or "")
    import torch

    from t2i.files import check_results_file, results_file
    from t2i.measure.gradients import GRADIENTS, gradient_shares, heldout_sequences, write_gradients
    from t2i.measure.perplexity import data_of
    from t2i.runs.loading import open_model

    # Before a model is read, which takes minutes where it is large.
    check_results_file(command.out, name=GRADIENTS, keys=("checkpoint", "cosine_text_image"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(
        command.ckpt,
        device=device,
        needs_images=False,
        dtype="float32",  # whatever is stored: gradients of bf16 weights round at every layer
        trust_remote_code=command.trust_remote_code,
    )
    path = results_file(command.out, default=model.measures / GRADIENTS)
    config = data_of(model, shards=command.data.shards, mode=command.data.mode)
    ids = heldout_sequences(model, config=config, num_sequences=command.num_sequences)
    results = gradient_shares(model, ids)
    write_gradients(results, model=model, path=path)
    for kind, one in results.by_kind().items():
        print(
            f"{kind:8s} {one.token_share:7.2%} of tokens, {one.loss_share:7.2%} of the loss,"
            f" {one.norm_share:7.2%} of the gradients' norms ({one.norm:.4g}; layers {one.norm_layers:.4g})"
        )
    cosine = results.cosine_text_image
    found = "unknown, as one of them is 0" if cosine is None else f"{cosine:+.3f}"
    print(f"cosine of text's gradient and image's: {found}\nAll of it: {path}")
