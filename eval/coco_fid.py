"""Score a model's pictures beside their yardsticks.

Examples:
  python eval/coco_fid.py runs/train
  python eval/coco_fid.py runs/train --features inception --inception inception-2015-12-05.pt

Without Inception's weights the distance is measured on EfficientNet-Lite0 features, and is not called FID.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from t2i.cli import parse
from t2i.config import SampleConfig
from t2i.errors import run_command


@dataclass(frozen=True)
class ScoreCommand:
    """Which model, on which features."""

    ckpt: tyro.conf.Positional[str]
    """A run folder, a checkpoint, an exported folder or a hub name."""
    out: Path | None = None
    """Folder of the pictures and scores.json; by default eval/ in the run or exported folder."""
    num_samples: int | None = None
    """Pictures a row; by default half of the held-out ones."""
    features: Literal["efficientnet_lite0", "inception"] = "efficientnet_lite0"
    inception: Path | None = None
    """Inception-2015-12-05 weights; by default clean-fid's address, hash-checked."""
    resize: Literal["clean", "legacy_tensorflow"] = "clean"
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def main() -> None:
    command = parse(ScoreCommand, description=__doc__ or "")
    import torch

    from t2i.measure.coco import score
    from t2i.measure.features import load_features
    from t2i.runs.ckpt import open_checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_features(
        command.features, weights=command.inception, resize=command.resize, device=device
    )
    checkpoint = open_checkpoint(command.ckpt, device=device)
    out = command.out or (checkpoint.run_dir or checkpoint.folder) / "eval"
    scores = score(
        checkpoint, out=out, extractor=extractor, sample=command.sample, num_samples=command.num_samples
    )
    for values in scores["rows"].values():
        numbers = "  ".join(f"{key} {value:10.4f}" for key, value in values.items() if key != "what")
        print(f"{values['what']:48s} {numbers}")
    for split, meter in scores["captions_heard"].items():
        print(
            f"{split}: image loss {meter['own']:.3f} nats a code, wrong caption {meter['wrong']:.3f},",
            end=" ",
        )
        print(f"empty {meter['empty']:.3f} ({meter['num_pictures']} pictures)")
    print(f"{scores['n']} pictures a row. {scores['note']}\nAll of it: {out / 'scores.json'}")


if __name__ == "__main__":
    run_command(main)
