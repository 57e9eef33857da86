"""The card of an image tokenizer: what it was trained on, and how well it reconstructs held-out images."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from t2i.config import TokenizerConfig
from t2i.data.sources import Source
from t2i.image_tokenizer.quality import Reconstruction

CARD = "README.md"
MEASURES = re.compile(r"^\| ([\d.]+) dB \| ([\d.]+) \| ([\d.]+)% \|", re.MULTILINE)
"""PSNR, SSIM and the share of codes in use, in the row of a card."""


@dataclass(frozen=True)
class CardMeasures:
    """What a card says of held-out images."""

    psnr: float
    """Decibels."""
    ssim: float
    codes_in_use: float
    """Share of the codebook that these images use at least once."""


def card_text(
    source: Source,
    measures: Reconstruction,
    config: TokenizerConfig,
    *,
    num_trained: int,
    norm_type: str,
    begun_with: str,
    command: str,
    features: str,
) -> str:
    """Write the card of an image tokenizer.

    Args:
        num_trained: images that it was trained on.
        norm_type: VQModel's.
        begun_with: fingerprint of what config.init_from names; empty for random weights.
        command: the command that made it.
        features: the name of the distance between reconstructions and images.
    """
    settings = "\n".join(f"- {key}: {value}" for key, value in asdict(config).items())
    start = (
        f"\nIt began with the weights of `{config.init_from}` (fingerprint {begun_with[:12]}). What those were trained"
        " on is not known here: their licence holds as well, and held-out images may have been among it.\n"
        if begun_with
        else ""
    )
    return f"""# Image tokenizer

diffusers `VQModel(norm_type="{norm_type}")`, trained by `{command}` on {num_trained} training images of
`{source.name}` (licence of the images: {source.licence}; split: {source.split_rule}).
{start}
Measured on {measures.num_pictures} held-out images (weights stored in fp16, computed in fp32):

| PSNR | SSIM | codes in use | {features} |
| --- | --- | --- | --- |
| {measures.psnr:.2f} dB | {measures.ssim:.4f} | {measures.codes_in_use:.1%} | {measures.distance:.2f} |

{settings}
"""


def read_card(folder: Path) -> CardMeasures | None:
    """Read the measures from the card of an image tokenizer's folder; None where it has no such card."""
    file = folder / CARD
    found = MEASURES.search(file.read_text(errors="replace")) if file.is_file() else None
    if found is None:
        return None
    psnr, ssim, in_use = map(float, found.groups())
    return CardMeasures(psnr, ssim, in_use / 100)
