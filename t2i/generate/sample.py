"""Captions to PNG files: fixed batches, a seed a caption, nothing drawn twice."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.files import read_json, write_json
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.runs.loading import Checkpoint
from t2i.tokens.image import pictures_of
from t2i.tokens.sequence import caption_room, prompt

SETTINGS = "settings.json"
BATCH_SIZE = 32


def draw_codes(
    checkpoint: Checkpoint, captions: Sequence[str], *, config: SampleConfig, first_seed: int | None = None
) -> Tensor:
    """Sample the codes (B, K) of captions; caption i is drawn with first_seed + i.

    Raises:
        UserError: the model draws no pictures, or not by a compiled step.
    """
    layout, model = checkpoint.layout, checkpoint.model
    num_codes, mode = model.config.codes_per_image, model.config.sequence_mode
    if mode == "text-only":
        raise UserError(f"{checkpoint.folder} was trained on text alone; it draws no pictures.")
    if config.compile and not hasattr(model, "begin_decoding"):
        kind = type(model).__name__
        raise UserError(
            f"--compile: {checkpoint.folder} is a {kind}; only open_lm's models have a step to compile."
        )
    length = model.config.sequence_length or model.config.max_position_embeddings
    room = caption_room(mode=mode, seq_len=length, num_codes=num_codes)
    texts = [checkpoint.text_tokenizer.encode(caption)[:room] for caption in captions]
    start = config.seed if first_seed is None else first_seed
    return sample_codes(
        model,
        [prompt(text, layout=layout, mode=mode).tolist() for text in texts],
        empty_prompt=prompt(torch.tensor([]), layout=layout, mode=mode).tolist(),
        image_ids=layout.image_rows,
        num_codes=num_codes,
        seeds=[start + index for index in range(len(captions))],
        guidance_scale=config.guidance_scale,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        is_compiled=config.compile,
    )


def decoded(checkpoint: Checkpoint, codes: Tensor) -> list[Image.Image]:
    """Decode codes (B, K) to pictures."""
    pictures = pictures_of(checkpoint.image_tokenizer.decode(codes)).cpu().numpy()
    return [Image.fromarray(picture) for picture in pictures]


def draw_folder(
    checkpoint: Checkpoint,
    captions: dict[str, str],
    *,
    out: Path,
    config: SampleConfig,
    batch_size: int = BATCH_SIZE,
    rank: int = 0,
    world_size: int = 1,
    description: str = "draw",
) -> list[Path]:
    """Draw every caption to out/NAME.png and return all paths in order; pictures that exist are kept.

    Batches are fixed by index and ranks take whole batches, so pictures do not depend on the number of ranks.

    Args:
        captions: file names without ending (which may name folders inside `out`), and their captions.

    Raises:
        UserError: `out` holds pictures of other weights, captions or settings.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; wanted is at least 1.")
    settings = {
        "weights": checkpoint.weights,
        **{key: value for key, value in asdict(config).items() if key != "compile" or value},
        "batch_size": batch_size,
        "captions_sha256": captions_sha256(captions),
    }
    names = list(captions)
    paths = [out / f"{name}.png" for name in names]
    out.mkdir(parents=True, exist_ok=True)
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not (out / SETTINGS).exists():  # which is written before any picture
        raise UserError(f"{there} was not drawn here: {out} has no {SETTINGS}. Choose another --out.")
    _same_settings(out / SETTINGS, settings)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    starts = [
        start
        for start in range(0, len(names), batch_size)[rank::world_size]
        if not all(path.exists() for path in paths[start : start + batch_size])
    ]
    facts = {"checkpoint": str(checkpoint.folder.resolve()), **settings}

    def write(pictures: list[Image.Image], start: int) -> None:
        for path, name, picture in zip(paths[start:], names[start:], pictures, strict=False):
            _write(path, picture, {"caption": captions[name], **facts})

    with ThreadPoolExecutor(1) as beside:  # compresses and writes one batch while the next is drawn
        writing: Future[None] | None = None
        for start in tqdm(starts, unit="batch", desc=description, disable=rank != 0):
            texts = [captions[name] for name in names[start : start + batch_size]]
            filled = batch_size - len(texts) if config.compile and len(names) > batch_size else 0  # one shape
            codes = draw_codes(
                checkpoint, texts + [""] * filled, config=config, first_seed=config.seed + start
            )
            pictures = decoded(checkpoint, codes[: len(texts)])
            if writing:
                writing.result()
            writing = beside.submit(write, pictures, start)
        if writing:
            writing.result()
    return paths


def caption_lines(captions: dict[str, str]) -> str:
    """Write a list of captions down, a JSON object a line; its hash names the list."""
    return "".join(json.dumps({"name": name, "caption": text}) + "\n" for name, text in captions.items())


def captions_sha256(captions: dict[str, str]) -> str:
    """Hash a list of captions with its names and its order (hex SHA-256 of caption_lines)."""
    return hashlib.sha256(caption_lines(captions).encode()).hexdigest()


def draw_grid(checkpoint: Checkpoint, captions: Sequence[str], *, columns: int = 8) -> Image.Image:
    """Draw captions with the default settings onto one sheet; the model is left in the mode it was in."""
    was_training = checkpoint.model.training
    checkpoint.model.eval()
    pictures = decoded(checkpoint, draw_codes(checkpoint, captions, config=SampleConfig()))
    checkpoint.model.train(was_training)
    return grid(pictures, columns=columns)


def grid(pictures: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Lay pictures of one size out in rows, on white."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, (x, y) in zip(range(len(pictures)), _places(columns), strict=False):
        sheet.paste(pictures[place], (x * width, y * height))
    return sheet


def _places(columns: int) -> Iterator[tuple[int, int]]:
    y = 0
    while True:
        yield from ((x, y) for x in range(columns))
        y += 1


def _same_settings(file: Path, settings: dict[str, object]) -> None:
    if file.exists():
        found = read_json(file)
        changed = [
            f"{key}: {found.get(key)} there, {settings[key]} asked"
            for key in settings
            if found.get(key) != settings[key]
        ]
        if changed:
            raise UserError(
                f"{file.parent} holds pictures of other settings ({'; '.join(changed)}). Choose another --out."
            )
        return
    write_json(file, settings)  # each rank writes the same


def _write(path: Path, picture: Image.Image, facts: dict[str, object]) -> None:
    metadata = PngInfo()
    for key, value in facts.items():
        metadata.add_text(key, str(value))
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, format="PNG", pnginfo=metadata)
    temporary.replace(path)
