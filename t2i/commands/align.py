"""Align new image embeddings with a language model's text embeddings before training (paper, Figure 7).

Examples:
  python launchers/align.py --model runs/pretrained --out runs/aligned
  deepspeed launchers/align.py --model open_lm_1b --data.shards data/coco --data.seq-len 1152 --out runs/aligned

Then train with them: launchers/train.py --model.init MODEL --model.new-embeddings OUT/rows.safetensors
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from t2i.cli import CKPT, parse
from t2i.config import AlignConfig, AlignRun, DataConfig
from t2i.errors import Stopped


@dataclass(frozen=True)
class AlignCommand:
    """The language model and the captioned images."""

    model: Annotated[str, CKPT]
    """Language model: a run, a checkpoint of it, an exported or converted folder, hf:USER/NAME."""
    out: Path
    """Folder for rows.safetensors, metrics.jsonl, align.json and hits.json."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    data: DataConfig = field(default_factory=lambda: DataConfig(caption_dropout=0.0))
    align: AlignConfig = field(default_factory=AlignConfig)
    config: Path | None = None
    """YAML file of flags; flags on the command line override it."""


def main() -> None:
    command = parse(AlignCommand, description=__doc__ or "")
    from t2i.distributed.launch import start_processes

    start_processes()
    from t2i.train.align import ROWS_FILE, align

    run = AlignRun(
        run_dir=command.out,
        data=command.data,
        model=command.model,
        trust_remote_code=command.trust_remote_code,
        align=command.align,
    )
    try:
        summary = align(run)
    except Stopped:
        if os.environ["LOCAL_RANK"] != "0":  # all ranks stop, and one of a machine says it
            sys.exit(Stopped.exit_code)
        raise
    for name, found in summary.items():
        print(
            f"{name}: of {found['num_pairs']} held-out pairs {found['image_to_text']:.1%} of images find their"
            f" caption, {found['text_to_image']:.1%} of captions their image; chance is {found['chance']:.1%}"
        )
    print(f"Use them with --model.init {command.model} --model.new-embeddings {command.out / ROWS_FILE}")
