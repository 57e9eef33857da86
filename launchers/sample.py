"""Draw pictures from captions.

Examples:
  python launchers/sample.py runs/train --prompts "grinning face" "red apple" --out pictures
  python launchers/sample.py runs/train --prompts captions.txt --out pictures --guidance-scale 2
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from t2i.cli import parse
from t2i.config import SampleConfig
from t2i.errors import UserError, run_command


@dataclass(frozen=True)
class SampleCommand:
    """Which model draws which captions."""

    ckpt: tyro.conf.Positional[str]
    """A run folder, a checkpoint, an exported folder or a hub name."""
    prompts: tuple[str, ...]
    """Captions, or one text file with a caption a line."""
    out: Path
    """Folder of the PNG files."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def captions_of(prompts: tuple[str, ...]) -> list[str]:
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        path = Path(prompts[0])
        if not path.is_file():
            raise UserError(f"--prompts {path} is no file.")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return list(prompts)


def main() -> None:
    command = parse(SampleCommand, description=__doc__ or "")
    captions = captions_of(command.prompts)
    import torch

    from t2i.generate.draw import draw_folder
    from t2i.runs.ckpt import open_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = open_checkpoint(command.ckpt, device=device)
    names = {f"{index:05d}": caption for index, caption in enumerate(captions)}
    paths = draw_folder(checkpoint, names, out=command.out, config=command.sample)
    print(f"{len(paths)} pictures in {command.out}; each carries its caption and settings.")


if __name__ == "__main__":
    run_command(main)
