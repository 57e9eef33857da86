"""Measure what a model has kept of its language: text perplexity, leaked probability, completions.

Examples:
  python eval/forgetting.py runs/train --reference runs/pretrained --text data/docstrings
  python eval/forgetting.py my_export --text notes.txt --captions data/openmoji64

Perplexity is given over the whole vocabulary and among text rows alone; what lies between leaks to image codes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from t2i.cli import parse

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class ForgettingCommand:
    """Which model, against which, on which text."""

    ckpt: tyro.conf.Positional[str]
    """A run folder, a checkpoint, an exported folder or a hub name."""
    text: str
    """Text shards (their held-out split), a .txt file, a folder of them, or a Hugging Face dataset name."""
    reference: str | None = None
    """The language model before training, a CKPT too; without it there is nothing to compare with."""
    captions: Path | None = None
    """Shards of pictures whose held-out captions are measured beside the text."""
    prompts: tuple[str, ...] = ()
    """Texts to complete; by default the paper's two."""
    seq_len: Annotated[int, Ge(2)] = 96
    """Tokens a sequence of text that is packed here."""
    num_sequences: Annotated[int, Ge(1)] = 256
    """Sequences measured at most."""
    max_new_tokens: Annotated[int, Ge(1)] = 40
    """Tokens a completion."""
    out: Path | None = None
    """File of the results; by default forgetting.json in the run or model folder."""


def main() -> None:
    command = parse(ForgettingCommand, description=__doc__ or "")
    from t2i.measure.forgetting import PROMPTS, measure_forgetting, write_forgetting

    results = measure_forgetting(
        {"model": command.ckpt, **({"reference": command.reference} if command.reference else {})},
        texts={"text": command.text, **({"captions": str(command.captions)} if command.captions else {})},
        prompts=command.prompts or PROMPTS,
        seq_len=command.seq_len,
        num_sequences=command.num_sequences,
        max_new_tokens=command.max_new_tokens,
    )
    path = write_forgetting(results, ckpt=command.ckpt, out=command.out)
    for name, found in results.models.items():
        for kind, cost in found.costs.items():
            print(
                f"{name:10s} {kind:9s} perplexity {cost.perplexity:10.2f}, among text rows"
                f" {cost.perplexity_text_rows:10.2f}, leaked {cost.leaked:.2%} ({cost.num_tokens} tokens)"
            )
    for index, prompt in enumerate(results.prompts):
        print(f"\n{prompt}")
        for name, found in results.models.items():
            print(f"  {name}: {found.completions[index]!r}")
    print(f"\nAll of it: {path}")
