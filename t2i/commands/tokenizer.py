"""Train an image tokenizer on your own images, or measure one.

Examples:
  python launchers/tokenizer.py train --source openmoji --out tokenizers/mine
  python launchers/tokenizer.py train --source my_images --init-from tokenizers/movqgan_270m --image-size 256
    --lr 1e-4 --out tokenizers/fine_tuned
  python launchers/tokenizer.py evaluate --tokenizer tokenizers/mine --source openmoji --out measured
  python launchers/tokenizer.py evaluate --tokenizer tokenizers/movqgan_270m --source my_images --split all
    --image-size 256 --out measured_256

Run the same command to resume a stopped training.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Le, Lt

from t2i.cli import parse
from t2i.config import ASSETS, SourceConfig, TokenizerConfig
from t2i.verbs import own_command_line


@dataclass(frozen=True)
class Train:
    """Train a VQModel: one with spatial norms (MoVQGAN's family), or the one that --init-from names."""

    out: Path
    """Folder of the tokenizer, in diffusers format."""
    source: str = "openmoji"
    """Any source of images that prepare takes."""
    heldout_share: Annotated[float | None, Ge(0), Lt(1)] = None
    """Share of images that it is measured on and not trained on. Default: 2%, or more of a small source. openmoji and
    COCO have their own rules."""
    reading: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a tokenizer folder on images: PSNR, SSIM, codes in use, Frechet distance."""

    out: Path
    """New folder for measures.json and reconstructions.png."""
    tokenizer: Path = ASSETS / "image_tokenizer"
    """diffusers VQModel folder."""
    source: str = "openmoji"
    """Any source of images that prepare takes."""
    reading: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    heldout_share: Annotated[float | None, Ge(0), Lt(1)] = None
    """Share of images that are held out, as where the tokenizer was trained. Default: 2%, or more of a small source."""
    split: Literal["heldout", "train", "all"] = "heldout"
    """Which images of the source; all, if the tokenizer was not trained on them."""
    num_images: Annotated[int, Ge(2)] = 5_000
    """At most so many, chosen by the hash of their key."""
    image_size: Annotated[int, Ge(16), Le(16_384)] = 64
    """Pixels per side, a multiple of the pixels per code. Released tokenizers were trained at 256."""


def main() -> None:
    command = parse(Train | Evaluate, description=__doc__ or "")  # type: ignore[arg-type]
    from t2i.data.sources import open_source
    from t2i.files import new_folder
    from t2i.image_tokenizer.make import FEATURES, make_tokenizer, measure_folder
    from t2i.measure.extractor import metric_key

    source = open_source(command.source, heldout_share=command.heldout_share, config=command.reading)
    if isinstance(command, Train):
        measures = make_tokenizer(
            source, out=command.out, config=command.tokenizer, command=own_command_line()
        )
    else:
        with new_folder(command.out) as part:
            measures = measure_folder(
                command.tokenizer,
                source=source,
                image_size=command.image_size,
                grid=part / "reconstructions.png",
                split=command.split,
                num_images=command.num_images,
            )
            settings = {"tokenizer": str(command.tokenizer), "source": command.source, "split": command.split}
            settings["features"] = FEATURES
            found = {**settings, "image_size": command.image_size, **asdict(measures)}
            (part / "measures.json").write_text(json.dumps(found, indent=1))
    print(
        f"PSNR {measures.psnr:.2f} dB, SSIM {measures.ssim:.4f}, {measures.codes_in_use:.0%} of the codes in use"
    )
    print(f"{metric_key(FEATURES)} of the reconstructions {measures.distance:.3f}")
    print(f"on {measures.num_pictures} images; look at {command.out / 'reconstructions.png'}.")
