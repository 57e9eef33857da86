"""Make an image tokenizer from a source of images: train it, measure it on held-out images, write its card."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from t2i.config import TokenizerConfig
from t2i.data.prepare.arguments import changed_from_defaults
from t2i.data.prepare.part_folder import locked
from t2i.data.sources import UNREADABLE, Source
from t2i.data.sources.listing import list_source
from t2i.data.sources.source import first_of_each_image
from t2i.disk import share
from t2i.errors import DataError, UserError
from t2i.files import check_writable, hash_uniform, read_json, values_sha256, write_json
from t2i.image_tokenizer.alignment import (
    CaptionTarget,
    Target,
    VisionTarget,
    encoder_sha256,
    load_encoder,
)
from t2i.image_tokenizer.card import CARD, card_text
from t2i.image_tokenizer.quality import Reconstruction, evaluate_tokenizer
from t2i.image_tokenizer.start import Start, open_start, shaped_as
from t2i.image_tokenizer.train import STATE_FILE, check_settings, train_image_tokenizer, with_defaults
from t2i.image_tokenizer.vision_encoder import VisionEncoder
from t2i.measure.extractor import metric_key
from t2i.measure.features import load_features
from t2i.measure.heldout_images import how_to_hold_out
from t2i.measure.images import readable
from t2i.runs.run_folder import plain
from t2i.tokens.image import ImageTokenizer, centre_crop_resize

logger = logging.getLogger(__name__)

FEATURES = "efficientnet_lite0"
CONFIG, MADE, GRID, LOCK = "config.json", "made.json", "reconstructions.png", ".lock"
LEAST_IMAGES = 2
"""Images that a Frechet distance can be measured on at all."""


def make_tokenizer(source: Source, *, out: Path, config: TokenizerConfig, command: str) -> Reconstruction:
    """Train an image tokenizer on the training split of a source and store it in fp16 at `out`.

    A tokenizer that is there already, of the same source and settings, is kept as it is.

    Args:
        command: the command that made it, for the card.

    Raises:
        UserError: `out` cannot be written, is used by another process, or holds another tokenizer or the state of a
            training with other settings; config.align_to is no encoder.
        DataError: there are no images to train on, or too few to measure it on.
    """
    start = open_start(config)
    config = shaped_as(config, start)
    begun_with = "" if start is None else start.fingerprint
    asked = {
        "source": source.name,
        "split_rule": source.split_rule,
        "settings": with_defaults(plain(config)),
        "reading": changed_from_defaults(source.config),
        "listed": list_source(source).fingerprint,
        **({"encoder": encoder_sha256(config.align_to)} if config.align_to else {}),
        "begun_with": begun_with,
    }
    if (out / CONFIG).exists():
        return _made_before(out, asked)
    check_writable(out)
    check_settings(out / STATE_FILE, config=config, begun_with=begun_with)
    is_begun = (out / STATE_FILE).exists() or (out / ".part").exists()
    if not is_begun and (there := [name for name in (CARD, GRID) if (out / name).exists()]):
        raise UserError(
            f"{out} has a {there[0]} of another kind, which would be replaced; choose another --out."
        )
    # Before hours of training: without held-out images nothing could be said of its result.
    heldout = first_of_each_image(pair for pair in source.pairs if pair.split == "heldout")
    _check_enough(sum(1 for _ in islice(readable(heldout), LEAST_IMAGES)), source=source, split="heldout")
    with locked(out / LOCK, folder=out):
        if (out / CONFIG).exists():  # another process finished it since
            return _made_before(out, asked)
        return _make(source, out=out, config=config, start=start, command=command, asked=asked)


def _make(
    source: Source,
    *,
    out: Path,
    config: TokenizerConfig,
    start: Start | None,
    command: str,
    asked: Mapping[str, object],
) -> Reconstruction:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Before minutes of reading images.
    encoder = load_encoder(config.align_to, device=device) if config.align_to else None
    images, captions = read_captioned(source, split="train", image_size=config.image_size)
    target: Target | None = None
    # Not of the embeddings, whose last bits are the device's.
    aligned_with = values_sha256([captions, asked["encoder"]]) if encoder is not None else ""
    if isinstance(encoder, VisionEncoder):
        target = VisionTarget(encoder)
    elif encoder is not None:
        target = CaptionTarget(encoder.embed(captions).to(device))
        del encoder
    model = train_image_tokenizer(
        images, config=config, out=out, start=start, target=target, aligned_with=aligned_with
    )
    # Aside: while `out` has no config.json, the same command resumes the training.
    part = out / ".part"
    model.half().save_pretrained(part)
    share(part)
    # Measured from the folder, so that the card describes the weights as they are stored.
    measures = measure_folder(part, source=source, image_size=config.image_size, grid=part / GRID)
    (part / CARD).write_text(
        card_text(
            source,
            measures,
            config,
            num_trained=len(images),
            norm_type=model.config.norm_type,
            begun_with=str(asked["begun_with"]),
            command=command,
            features=metric_key(FEATURES),
        )
    )
    write_json(part / MADE, {**asked, "measures": asdict(measures)})
    if (out / CONFIG).exists():  # on a disk without locks another process may have been quicker
        shutil.rmtree(part)
        return _made_before(out, asked)
    # Files, not the folder: `out` holds the training's state, which is removed last. Before it comes config.json, which
    # says that all is there: a kill before it leaves a training that the same command finishes.
    for path in sorted(part.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(out / path.name)
    part.rmdir()
    (out / STATE_FILE).unlink(missing_ok=True)
    return measures


def _made_before(out: Path, asked: Mapping[str, object]) -> Reconstruction:
    """Return the measures of the tokenizer at `out`, if it is the one that is asked for.

    Raises:
        UserError: it is another, or does not say.
    """
    made = read_json(out / MADE) if (out / MADE).exists() else {}
    # Those that were made before these were written down do not say what their source consisted of.
    known = {key: asked[key] for key in ("reading", "listed", "encoder") if key in asked} | made
    known = {"begun_with": ""} | known | {"settings": with_defaults(made.get("settings", {}))}
    if {key: known.get(key) for key in asked} != asked:
        raise UserError(f"--out {out} already holds a tokenizer of other images or settings; choose another.")
    logger.warning("%s holds this tokenizer already: nothing to do.", out)
    return Reconstruction(**made["measures"])


def measure_folder(
    folder: Path,
    *,
    source: Source,
    image_size: int,
    grid: Path,
    split: str = "heldout",
    num_images: int | None = None,
) -> Reconstruction:
    """Measure a tokenizer folder on a source's images, and save a grid of originals above reconstructions.

    Args:
        split: a split of the source, or "all".
        num_images: the number to measure, chosen by a hash of their keys; None for all.

    Raises:
        UserError: the folder is not a tokenizer, or image_size is no multiple of its stride.
        DataError: fewer than LEAST_IMAGES of the split could be decoded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = ImageTokenizer.load(folder, device=device)
    # Called for its check, before minutes of reading.
    tokenizer.num_codes(image_size)
    images = read_images(source, split=split, image_size=image_size, num_images=num_images)
    _check_enough(len(images), source=source, split=split)
    extractor = load_features(FEATURES, device=device)
    measures, back = evaluate_tokenizer(tokenizer, images, extractor=extractor)
    step = max(1, len(images) // 32)
    shown, columns = min(32, len(images) // step), min(8, len(images))
    rows = []
    for start in range(0, shown // columns * columns, columns):
        for side in (images[::step], back[::step]):
            rows.append(np.concatenate(list(side[start : start + columns]), axis=1))
    Image.fromarray(np.concatenate(rows)).save(grid)
    return measures


def read_images(source: Source, *, split: str, image_size: int, num_images: int | None = None) -> np.ndarray:
    """Decode the images of a split, or of "all", cropped and resized: uint8 (N, H, W, 3), without broken ones.

    Raises:
        DataError: none could be decoded.
    """
    return read_captioned(source, split=split, image_size=image_size, num_images=num_images)[0]


def read_captioned(
    source: Source, *, split: str, image_size: int, num_images: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """Decode images as read_images does, each once; also return the first caption of each."""
    pairs = first_of_each_image(pair for pair in source.pairs if split in ("all", pair.split))
    if num_images is not None:
        # By a hash: the same images each time, and not those that a sorted source begins with.
        pairs = sorted(pairs, key=lambda pair: hash_uniform("pictures", pair.key))[:num_images]
    images, captions = [], []
    for pair in tqdm(pairs, unit="image", desc=f"read {split}"):
        try:
            images.append(np.asarray(centre_crop_resize(pair.open().image, size=image_size)))
        except UNREADABLE:
            continue
        captions.append(pair.caption)
    if not images:
        raise DataError(f"{source.name} has no {split} image that can be decoded.")
    return np.stack(images), captions


def _check_enough(found: int, *, source: Source, split: str) -> None:
    """Refuse to measure on fewer than LEAST_IMAGES."""
    if found < LEAST_IMAGES:
        hint = how_to_hold_out(source, count=LEAST_IMAGES, again="") if split == "heldout" else ""
        raise DataError(
            f"{source.name} has {found} {split} images that can be decoded; a tokenizer is measured on at least"
            f" {LEAST_IMAGES}. {hint}".rstrip()
        )
