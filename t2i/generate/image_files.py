"""Captions to PNG files, whatever draws them: fixed batches, nothing drawn twice, settings beside the images."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from t2i.config import SampleConfig
from t2i.files import whole_file
from t2i.generate.beside import SETTINGS
from t2i.generate.captions import captions_sha256
from t2i.generate.claim import LATER, claim_folder

PLACE = "place"
"""Key of a PNG file for the image's index in its drawing: it was sampled with the settings' seed + this, unless it
names a seed of its own."""
CANDIDATE, IMAGE_SEED = "candidate", "image_seed"
"""Keys of a PNG file that is the best of several: which candidate it is, counted from 0, and the seed of that one."""


def draw_images(
    captions: dict[str, str],
    *,
    out: Path,
    draw: Callable[[int], list[Image.Image]],
    settings: dict[str, object],
    checkpoint: Path,
    batch_size: int,
    rank: int,
    world_size: int,
    description: str,
    record: str = SETTINGS,
) -> list[Path]:
    """Draw every caption to out/NAME.png by `draw`, which draws the batch that begins at an index.

    Args:
        draw: its images carry in `info` what their files say of them alone.
        settings: all that decides the images; see drawing_settings.
        checkpoint: what draws, for the PNG files.
    """
    names = list(captions)
    paths = [out / f"{name}.png" for name in names]
    claim_folder(out / record, paths, settings=settings)
    facts = {"checkpoint": str(checkpoint.resolve()), **settings}

    def write(images: list[Image.Image], start: int) -> None:
        for place, image in enumerate(images, start):
            # The settings' seed is the first image's, so an image names its place too.
            own = {"caption": captions[names[place]], PLACE: place, **facts}
            _write(paths[place], image, own | {str(key): said for key, said in image.info.items()})

    # A batch with one missing image is drawn whole: its other images decide the shape of the products.
    missing = [
        start
        for start in range(0, len(names), batch_size)[rank::world_size]
        if not all(path.exists() for path in paths[start : start + batch_size])
    ]
    with ThreadPoolExecutor(1) as beside:  # compresses and writes one batch while the next is drawn
        writing: Future[None] | None = None
        for start in tqdm(missing, unit="batch", desc=description, disable=rank != 0):
            images = draw(start)
            if writing:
                writing.result()  # a full disk ends the drawing one batch later, not after the last
            writing = beside.submit(write, images, start)
        if writing:
            writing.result()
    return paths


def settings_of(
    captions: dict[str, str], *, weights: str, dtype: str, config: SampleConfig, batch_size: int
) -> dict[str, object]:
    """Return what decides the images of any model, as plain JSON."""
    return {
        "weights": weights,
        # Left out where they change nothing: folders from before there were such settings can be continued.
        **{
            key: value
            for key, value in sampler_settings(config).items()
            if key not in LATER or LATER[key] != value
        },
        # Matrix products depend on the batch's shape in their last bits, so the batch size is part of an image.
        "batch_size": batch_size,
        "captions_sha256": captions_sha256(captions),
        **({} if dtype == "float32" else {"dtype": dtype}),
    }


def sampler_settings(config: SampleConfig) -> dict[str, object]:
    """Return the sampler's settings that decide an image."""
    settings = asdict(config)
    # A window changes no code but where rounding decides. In 16 bits it often does, and there auto is 1.
    if config.window in ("auto", 1):
        del settings["window"]
    return settings


def png_text(facts: Mapping[str, object]) -> PngInfo:
    """Return what a PNG file is to carry as text."""
    text = PngInfo()
    for key, value in facts.items():
        text.add_text(key, str(value))
    return text


def _write(path: Path, image: Image.Image, facts: dict[str, object]) -> None:
    # That an image exists must mean that it is whole, for it is never drawn again.
    with whole_file(path) as written:
        image.save(written, format="PNG", pnginfo=png_text(facts))
