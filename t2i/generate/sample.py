"""Captions to PNG files: fixed batches, a seed per caption, nothing drawn twice."""

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.generate.beside import SETTINGS
from t2i.generate.best_of import Ranker, caption_gains, keep_best
from t2i.generate.grid import grid
from t2i.generate.image_files import CANDIDATE, IMAGE_SEED, draw_images, settings_of
from t2i.generate.others.family import AnyTokenizer
from t2i.model.backbone import trained_seq_len
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.model.open_lm.reading_open_lm import compiles
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.model.resize import bias_of
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


@dataclass(frozen=True)
class Drawer:
    """All that turns captions into images; it needs no checkpoint, so a run can draw with the model in training."""

    model: PreTrainedModel
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    layout: VocabLayout
    settings: SampleConfig = field(default_factory=SampleConfig)
    ranker: Ranker | None = None
    """Judges candidates where settings.best_by says so; None if it says otherwise."""


def drawer_of(opened: OpenedModel, *, settings: SampleConfig, ranker: Ranker | None = None) -> Drawer:
    """Take what draws out of a model that was opened for images.

    Raises:
        UserError: the model draws no images, or not by a compiled step; or a judge is missing.
    """
    if opened.model.config.sequence_mode == "text-only":
        raise UserError(f"{opened.folder} was trained on text alone; it draws no images.")
    _warn_of_guidance(settings.guidance_scale)
    if settings.compile:
        _check_compiles(opened)
    if (
        settings.best_of > 1
        and settings.best_by == "likelihood"
        and opened.model.config.sequence_mode == "image-only"
    ):
        raise UserError(
            f"--best-of is {settings.best_of}, but {opened.folder} reads no captions, so that no image fits one better."
        )
    if settings.best_by == "judge" and ranker is None:
        raise UserError("--best-by judge expects --judge-url and one of its --judges; there is none.")
    return Drawer(
        opened.model, opened.text_tokenizer, opened.needed_image_tokenizer(), opened.layout, settings, ranker
    )


def _check_compiles(opened: OpenedModel) -> None:
    kind = type(opened.model).__name__
    if not ClassForm.of(opened.model).is_plain(bias_of(opened.model)):
        raise UserError(
            f"--compile: {opened.folder} is a {kind}, which scales, caps or shifts its logits, and that is not compiled"
            " here. Leave --compile out."
        )
    if not compiles(opened.model):
        raise UserError(
            f"--compile: {opened.folder} is a {kind}, whose step cannot be compiled as a whole with a KV cache of"
            " fixed shape; expected open_lm, or a class such as Llama's, Qwen2's or Qwen3's. Leave --compile out."
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
    prompts, null_prompt = _prompts(drawer, captions)
    start = settings.seed if first_seed is None else first_seed
    return sample_codes(
        model,
        prompts,
        empty_prompt=null_prompt,
        image_ids=layout.image_rows,
        num_codes=model.config.codes_per_image,
        # A seed belongs to a caption's index, not to a rank or a batch, so any number of processes draws the same.
        seeds=[(start + index) % MAX_WHOLE for index in range(len(captions))],
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        is_compiled=settings.compile,
        window=settings.window,
    )


def _prompts(drawer: Drawer, captions: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Build the prompts of captions, and that of the null caption."""
    layout, mode = drawer.layout, drawer.model.config.sequence_mode
    # Captions are cut to what a sequence had room for in training: later positions were never trained.
    room = room_for_captions(drawer.model)
    texts = [drawer.text_tokenizer.encode(caption)[:room] for caption in captions]
    # The null caption of guidance is the one that caption dropout trains: both markers, nothing between.
    null_prompt = prompt(torch.tensor([]), layout=layout, mode=mode).tolist()
    return [prompt(text, layout=layout, mode=mode).tolist() for text in texts], null_prompt


def room_for_captions(model: PreTrainedModel) -> int:
    """Count the tokens of a caption that a sequence had room for in training; 0 of a model without captions."""
    config = model.config
    if config.sequence_mode == "image-only":
        return 0
    return caption_room(
        mode=config.sequence_mode, seq_len=trained_seq_len(model), num_codes=config.codes_per_image
    )


def _warn_of_long_captions(drawer: Drawer, captions: Iterable[str]) -> None:
    room = room_for_captions(drawer.model)
    long = [text for text in captions if len(drawer.text_tokenizer.encode(text)) > room]
    if long and drawer.model.config.sequence_mode == "image-only":
        logger.warning("The model was trained without captions and reads none: its images fit no caption.")
    elif long:
        logger.warning(
            "%d captions have more than the %d tokens that the model was trained with, and are cut there; the first"
            " begins %r.",
            len(long),
            room,
            long[0][:60],
        )


def decode_images(image_tokenizer: AnyTokenizer, codes: Tensor) -> list[Image.Image]:
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
    ranker: Ranker | None = None,
) -> list[Path]:
    """Draw every caption to out/NAME.png and return all paths in order; images that exist are kept.

    Batches are fixed by index and ranks take whole batches, so images do not depend on the number of ranks.

    Args:
        captions: file names without ending (which may name folders inside `out`), and their captions.
        record: file in `out` for the settings.
        ranker: for config.best_by judge.

    Raises:
        UserError: the model cannot draw so, or `out` holds images of other weights, captions or settings.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected a number >= 1.")
    drawer = drawer_of(opened, settings=config, ranker=ranker)
    if rank == 0:
        _warn_of_long_captions(drawer, captions.values())
    texts = list(captions.values())
    return draw_images(
        captions,
        out=out,
        draw=lambda start: _draw_batch(drawer, texts, start=start, batch_size=batch_size),
        settings=drawing_settings(
            captions, opened=opened, config=config, batch_size=batch_size, ranker=ranker
        ),
        checkpoint=opened.folder,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        description=description,
        record=record,
    )


def drawing_settings(
    captions: dict[str, str],
    *,
    opened: OpenedModel,
    config: SampleConfig,
    batch_size: int,
    ranker: Ranker | None = None,
) -> dict[str, object]:
    """Return all that decides the images of a drawing, as plain JSON."""
    settings = settings_of(
        captions, weights=opened.weights, dtype=opened.dtype, config=config, batch_size=batch_size
    )
    settings["image_tokenizer"] = opened.needed_image_tokenizer().fingerprint()
    return settings | ({"ranked_by": ranker.name} if ranker and config.best_by == "judge" else {})


def _draw_batch(drawer: Drawer, texts: list[str], *, start: int, batch_size: int) -> list[Image.Image]:
    """Draw the batch of all `texts` that begins at `start`."""
    batch = texts[start : start + batch_size]
    # A compiled step has one shape: the last batch is filled up rather than compiled for again.
    is_filled = drawer.settings.compile and len(texts) > batch_size
    filled = [""] * (batch_size - len(batch)) if is_filled else []
    settings = drawer.settings
    drawn = (
        draw_codes(drawer, batch + filled, first_seed=settings.seed + start + turn * len(texts))[: len(batch)]
        for turn in range(settings.best_of)
    )
    if settings.best_of == 1:
        return decode_images(drawer.image_tokenizer, next(drawn))
    best = keep_best((codes, _fits(drawer, batch, codes)) for codes in drawn)
    images = decode_images(drawer.image_tokenizer, best.codes)
    for place, (image, candidate) in enumerate(zip(images, best.candidates.tolist(), strict=True), start):
        seed = (settings.seed + place + candidate * len(texts)) % MAX_WHOLE
        image.info |= {CANDIDATE: candidate, IMAGE_SEED: seed}
    return images


def _fits(drawer: Drawer, captions: list[str], codes: Tensor) -> Tensor:
    """Say how well codes (B, K) fit their captions: (B,)."""
    if drawer.ranker is not None and drawer.settings.best_by == "judge":
        return torch.tensor(drawer.ranker.rank(decode_images(drawer.image_tokenizer, codes), captions))
    prompts, null_prompt = _prompts(drawer, captions)
    return caption_gains(drawer.model, prompts, codes, null_prompt=null_prompt, layout=drawer.layout)


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
