"""Captions to PNG files: fixed batches, a seed per caption, nothing drawn twice."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.files import read_json, write_json
from t2i.generate.beside import SETTINGS
from t2i.generate.grid import grid
from t2i.model.backbone import trained_seq_len
from t2i.model.open_lm.reading_open_lm import compiles
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.runs.loading import OpenedModel
from t2i.settings import MAX_WHOLE
from t2i.tokens.image import ImageTokenizer, images_of
from t2i.tokens.sequence import caption_room, prompt
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
"""Captions drawn together unless the caller says otherwise."""
MOST_GUIDANCE = 5.0
"""Guidance above it ruins images: hidden states are led out of what the LM head was trained on."""
HASHES = {"weights": "other weights", "captions_sha256": "other captions"}
"""Settings whose values say nothing to a reader, and what is said where they differ."""


@dataclass(frozen=True)
class Drawer:
    """All that turns captions into images; it needs no checkpoint, so a run can draw with the model in training."""

    model: PreTrainedModel
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    layout: VocabLayout
    settings: SampleConfig = field(default_factory=SampleConfig)


def drawer_of(opened: OpenedModel, *, settings: SampleConfig) -> Drawer:
    """Take what draws out of a model that was opened for images.

    Raises:
        UserError: the model draws no images, or not by a compiled step.
    """
    if opened.model.config.sequence_mode == "text-only":
        raise UserError(f"{opened.folder} was trained on text alone; it draws no images.")
    _warn_of_guidance(settings.guidance_scale)
    if settings.compile and not compiles(opened.model):
        kind = type(opened.model).__name__
        raise UserError(
            f"--compile: {opened.folder} is a {kind}, whose step cannot be compiled as a whole with a KV cache of"
            " fixed shape; expected open_lm, or a class such as Llama's, Qwen2's or Qwen3's. Leave --compile out."
        )
    return Drawer(
        opened.model, opened.text_tokenizer, opened.needed_image_tokenizer(), opened.layout, settings
    )


@functools.cache  # once per process, though a score draws several rows
def _warn_of_guidance(scale: float) -> None:
    # By the variable: whoever draws a share of the images says nothing of what all do.
    if scale > MOST_GUIDANCE and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "--guidance-scale is %g: above %g images become garish and lose their shapes. Useful are 1.5 to 4; the 6"
            " to 8 of diffusion models are another scale.",
            scale,
            MOST_GUIDANCE,
        )


def draw_codes(drawer: Drawer, captions: Sequence[str], *, first_seed: int | None = None) -> Tensor:
    """Sample the codes (B, K) of captions.

    Args:
        first_seed: caption i is drawn with first_seed + i; None for the settings' own seed.
    """
    layout, model, settings = drawer.layout, drawer.model, drawer.settings
    num_codes, mode = model.config.codes_per_image, model.config.sequence_mode
    # Captions are cut to what a sequence had room for in training: later positions were never trained.
    room = _room(model)
    texts = [drawer.text_tokenizer.encode(caption)[:room] for caption in captions]
    start = settings.seed if first_seed is None else first_seed
    with own_attention():
        return sample_codes(
            model,
            [prompt(text, layout=layout, mode=mode).tolist() for text in texts],
            # The null caption of guidance is the one that caption dropout trains: both markers, nothing between.
            empty_prompt=prompt(torch.tensor([]), layout=layout, mode=mode).tolist(),
            image_ids=layout.image_rows,
            num_codes=num_codes,
            # A seed belongs to a caption's index, not to a rank or a batch, so any number of processes draws the same.
            seeds=[(start + index) % MAX_WHOLE for index in range(len(captions))],
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            is_compiled=settings.compile,
        )


def own_attention() -> AbstractContextManager[None]:
    """Leave out cuDNN's attention while codes are drawn one by one."""
    # torch prefers it in bf16 on newer GPUs, and it prepares a plan for each new shape, which takes tens of
    # milliseconds. Here the keys grow by one per code: a thousand plans, most of a minute, for each length of prompt.
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _room(model: PreTrainedModel) -> int:
    """Count the tokens of a caption that a sequence had room for in training."""
    config = model.config
    return caption_room(
        mode=config.sequence_mode, seq_len=trained_seq_len(model), num_codes=config.codes_per_image
    )


def _warn_of_long_captions(drawer: Drawer, captions: Iterable[str]) -> None:
    room = _room(drawer.model)
    long = [text for text in captions if len(drawer.text_tokenizer.encode(text)) > room]
    if long and drawer.model.config.sequence_mode == "text-to-image":
        logger.warning(
            "%d captions have more than the %d tokens that the model was trained with, and are cut there; the first"
            " begins %r.",
            len(long),
            room,
            long[0][:60],
        )


def decode_images(image_tokenizer: ImageTokenizer, codes: Tensor) -> list[Image.Image]:
    """Decode codes (B, K) to images."""
    pixels = images_of(image_tokenizer.decode(codes)).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(image) for image in pixels]


def draw_folder(
    opened: OpenedModel,
    captions: dict[str, str],
    *,
    out: Path,
    config: SampleConfig,
    batch_size: int = BATCH_SIZE,
    rank: int = 0,
    world_size: int = 1,
    description: str = "draw",
    record: str = SETTINGS,
) -> list[Path]:
    """Draw every caption to out/NAME.png and return all paths in order; images that exist are kept.

    Batches are fixed by index and ranks take whole batches, so images do not depend on the number of ranks.

    Args:
        captions: file names without ending (which may name folders inside `out`), and their captions.
        record: file in `out` for the settings.

    Raises:
        UserError: the model cannot draw so, or `out` holds images of other weights, captions or settings.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected a number >= 1.")
    drawer = drawer_of(opened, settings=config)
    settings = drawing_settings(captions, opened=opened, config=config, batch_size=batch_size)
    names = list(captions)
    paths = [out / f"{name}.png" for name in names]
    _claim_folder(out / record, paths, settings=settings)
    if rank == 0:
        _warn_of_long_captions(drawer, captions.values())
    facts = {"checkpoint": str(opened.folder.resolve()), **settings}

    def write(images: list[Image.Image], start: int) -> None:
        for path, name, image in zip(paths[start:], names[start:], images, strict=False):
            _write(path, image, {"caption": captions[name], **facts})

    texts = list(captions.values())
    # A batch with one missing image is drawn whole: its other images decide the shape of the products.
    missing = [
        start
        for start in range(0, len(names), batch_size)[rank::world_size]
        if not all(path.exists() for path in paths[start : start + batch_size])
    ]
    with ThreadPoolExecutor(1) as beside:  # compresses and writes one batch while the next is drawn
        writing: Future[None] | None = None
        for start in tqdm(missing, unit="batch", desc=description, disable=rank != 0):
            images = _draw_batch(drawer, texts, start=start, batch_size=batch_size)
            if writing:
                writing.result()  # a full disk ends the drawing one batch later, not after the last
            writing = beside.submit(write, images, start)
        if writing:
            writing.result()
    return paths


def drawing_settings(
    captions: dict[str, str], *, opened: OpenedModel, config: SampleConfig, batch_size: int
) -> dict[str, object]:
    """Return all that decides the images of a drawing, as plain JSON."""
    return {
        "weights": opened.weights,
        # Left out where it is fp32, as are switches that are off: folders from before can be continued.
        **({} if opened.dtype == "float32" else {"dtype": opened.dtype}),
        # `compile` is left out where it is off: folders from before there was such a setting can be continued.
        **{key: value for key, value in asdict(config).items() if key != "compile" or value},
        # Matrix products depend on the batch's shape in their last bits, so the batch size is part of an image.
        "batch_size": batch_size,
        "captions_sha256": captions_sha256(captions),
    }


def _draw_batch(drawer: Drawer, texts: list[str], *, start: int, batch_size: int) -> list[Image.Image]:
    """Draw the batch of all `texts` that begins at `start`."""
    batch = texts[start : start + batch_size]
    # A compiled step has one shape: the last batch is filled up rather than compiled for again.
    is_filled = drawer.settings.compile and len(texts) > batch_size
    filled = [""] * (batch_size - len(batch)) if is_filled else []
    codes = draw_codes(drawer, batch + filled, first_seed=drawer.settings.seed + start)
    return decode_images(drawer.image_tokenizer, codes[: len(batch)])


def _claim_folder(record: Path, paths: list[Path], *, settings: dict[str, object]) -> None:
    """Make the folders, and see that images in them are of these settings, which `record` holds.

    Raises:
        UserError: they are not, or it is not known what they are of.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    there = next((path for path in paths if path.exists()), None)
    # Settings are written before any image, so an image without them is somebody else's and would be scored as ours.
    if there is not None and not record.exists():
        raise UserError(
            f"{there} was not drawn here: {record.parent} has no {record.name}. Choose another --out."
        )
    _same_settings(record, settings, num_images=len(paths))
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)


def caption_lines(captions: dict[str, str]) -> str:
    """Write a list of captions down, a JSON object per line; its hash names the list."""
    return "".join(json.dumps({"name": name, "caption": text}) + "\n" for name, text in captions.items())


def captions_sha256(captions: dict[str, str]) -> str:
    """Hash a list of captions with its names and its order (hex SHA-256 of caption_lines)."""
    return hashlib.sha256(caption_lines(captions).encode()).hexdigest()


def draw_grid(
    drawer: Drawer,
    captions: Sequence[str],
    *,
    columns: int = 8,
    beside: Sequence[Image.Image | None] = (),
) -> Image.Image:
    """Draw captions onto one sheet; the model is left in the mode it was in.

    Args:
        beside: the real image of each caption, which then stands to the right of the drawn one; None for white.
    """
    was_training = drawer.model.training
    drawer.model.eval()
    images = decode_images(drawer.image_tokenizer, draw_codes(drawer, captions))
    drawer.model.train(was_training)
    if any(beside):
        white = Image.new("RGB", images[0].size, "white")
        pairs = zip(images, beside, strict=True)
        images = [each for drawn, real in pairs for each in (drawn, real or white)]
    return grid(images, columns=columns)


def _same_settings(file: Path, settings: dict[str, object], *, num_images: int) -> None:
    if file.exists():
        found = read_json(file)
        changed = [
            HASHES.get(key, f"{key}: {found.get(key)} there, {settings[key]} asked")
            for key in settings
            if found.get(key) != settings[key]
        ]
        if changed:
            raise UserError(
                f"{file.parent} holds images of other settings ({'; '.join(changed)}). Choose another --out."
            )
        return
    write_json(
        file, {**settings, "images": num_images}
    )  # each rank writes the same, and whichever is last is kept


def _write(path: Path, image: Image.Image, facts: dict[str, object]) -> None:
    metadata = PngInfo()
    for key, value in facts.items():
        metadata.add_text(key, str(value))
    # Aside and renamed: that an image exists must mean that it is whole, for it is never drawn again.
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="PNG", pnginfo=metadata)
    temporary.replace(path)
