"""Measure what a model has kept of its language: text perplexity, leaked probability, completions.

Examples:
  python eval/forgetting.py runs/train --reference runs/pretrained --text data/docstrings
  python eval/forgetting.py my_export --text notes.txt --captions data/openmoji64

Perplexity is given over the whole vocabulary and over the text vocabulary alone. The difference leaks to image codes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from t2i.cli import CKPT, Ckpt, parse
from t2i.config import Dtype
from t2i.errors import UserError

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.


@dataclass(frozen=True)
class ForgettingCommand:
    """The model, its reference and the text."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i."""
    text: str
    """Text shards (their held-out split), a .txt file, a folder of them, or a Hugging Face dataset (hf:USER/NAME)."""
    reference: Annotated[str | None, CKPT] = None
    """The language model before training, also a CKPT. Without it nothing is compared."""
    captions: Path | None = None
    """Image shards whose held-out captions are measured beside the text."""
    prompts: tuple[str, ...] = ()
    """Prompts to complete. Default: the paper's two (Table 1)."""
    chat: bool = False
    """Ask the prompts by the tokenizer's chat template, as a user of a chat model does."""
    seq_len: Annotated[int, Ge(2), Le(1_000_000)] = 96
    """Tokens per sequence, where the text is packed by this command."""
    num_sequences: Annotated[int, Ge(1), Le(1_000_000_000)] = 256
    """At most so many sequences are measured."""
    max_new_tokens: Annotated[int, Ge(1), Le(100_000)] = 40
    """Tokens per completion."""
    dtype: Dtype = "auto"
    """Number type of the model. auto: as it is stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    out: Path | None = None
    """Results file. Default: forgetting.json in the run or model folder, or in demo_measures/ for demo."""


def main() -> None:
    command = parse(ForgettingCommand, description=__doc__ or "")
    from t2i.data.shards.manifest import MANIFEST
    from t2i.files import check_results_file, results_file, why_lacking, write_json
    from t2i.measure.forgetting import FORGETTING, PROMPTS, check_text, measure_forgetting
    from t2i.runs.loading import find, measures_home

    # All of it before the first model is measured: a slip in the last flag would cost what the others took.
    check_results_file(command.out, name=FORGETTING, keys=("prompts", "models"))
    folder, run_dir = find(command.ckpt)
    path = results_file(command.out, default=measures_home(run_dir or folder) / FORGETTING)
    if command.reference:
        find(command.reference)
    check_text(command.text, name="--text")
    if command.captions is not None and not (command.captions / MANIFEST).is_file():
        raise UserError(
            f"--captions {command.captions} is no folder of shards: {why_lacking(command.captions, MANIFEST)}. Captions"
            " of images that were not prepared are --text."
        )
    results = measure_forgetting(
        {"model": command.ckpt, **({"reference": command.reference} if command.reference else {})},
        texts={"text": command.text, **({"captions": str(command.captions)} if command.captions else {})},
        prompts=command.prompts or PROMPTS,
        seq_len=command.seq_len,
        num_sequences=command.num_sequences,
        max_new_tokens=command.max_new_tokens,
        is_chat=command.chat,
        dtype=command.dtype,
        trust_remote_code=command.trust_remote_code,
    )
    write_json(path, results.to_json())
    for name, found in results.models.items():
        for kind, cost in found.costs.items():
            print(
                f"{name:10s} {kind:9s} perplexity {cost.perplexity:10.2f}, text vocabulary"
                f" {cost.perplexity_text_rows:10.2f}, leaked {cost.leaked:.2%} ({cost.num_tokens} tokens)"
            )
    for index, prompt in enumerate(results.prompts):
        print(f"\n{prompt}")
        for name, found in results.models.items():
            print(f"  {name}: {found.completions[index]!r}")
    print(f"\nAll of it: {path}")
