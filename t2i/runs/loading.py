"""Anything a CKPT may be: a run folder, one checkpoint of it, an exported folder, a hub name."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import PreTrainedModel

from t2i.errors import UserError
from t2i.files import sha256_of
from t2i.model.backbone import load_model, weight_files
from t2i.runs.checkpoint_store import CHECKPOINTS, newest_readable
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, check_round_trip
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

IMAGE_TOKENIZER = "image_tokenizer"
DATA_MANIFEST = "data_manifest.json"
"""What the model was trained on: the manifest of its shards, kept beside it."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that turns captions into pictures."""

    folder: Path
    """The Hugging Face folder that the weights came from."""
    run_dir: Path | None
    """Its run, for a run folder or one of its checkpoints; None for an exported folder."""
    model: PreTrainedModel
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    layout: VocabLayout
    weights: str = "in memory"
    """SHA-256 of the weights on disk, or what else the weights are."""

    def measures_folder(self, name: str) -> Path:
        """Name the folder of this checkpoint's measures: NAME/step_NNNNNN in its run, NAME in an exported folder."""
        return self.folder / name if self.run_dir is None else self.run_dir / name / self.folder.name

    def image_size(self) -> int:
        """Count the pixels a side of the pictures it draws."""
        return int(math.isqrt(self.model.config.codes_per_image) * self.image_tokenizer.downscale)


def find(name: str) -> tuple[Path, Path | None]:
    """Resolve a CKPT to its Hugging Face folder and its run folder, if it has one.

    Raises:
        UserError: it is nothing that a CKPT may be.
    """
    path = Path(name)
    if (path / CHECKPOINTS).is_dir():
        folder = newest_readable(path)
        if folder is None:
            raise UserError(f"{path} has no checkpoint yet.")
        return folder, path
    if (path / "config.json").is_file():
        is_checkpoint = path.resolve().parent.name == CHECKPOINTS
        return path, path.resolve().parent.parent if is_checkpoint else None
    refusal = f"{name} is no run folder, checkpoint, exported folder or hub name (USER/NAME)"
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{refusal}.")
    try:
        return Path(snapshot_download(name)), None
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(f"{refusal}: {str(error).splitlines()[0]}") from error


def home(model: "LanguageModel") -> Path:
    """Return the folder that a model's measures belong to: its run, else its own."""
    return model.run_dir or model.folder


@dataclass(frozen=True)
class LanguageModel:
    """A model and its text tokenizer, with image codes or without."""

    folder: Path
    run_dir: Path | None
    """Its run, for a run folder or one of its checkpoints; None for any other folder."""
    model: PreTrainedModel
    text_tokenizer: TextTokenizer
    layout: VocabLayout
    """Of a language model alone: all of its rows are text, codebook_size is 0."""


def open_language_model(name: str, *, device: torch.device | str = "cpu") -> LanguageModel:
    """Load a CKPT for measuring text; it may be a language model that has not met pictures.

    Raises:
        UserError: it is no CKPT, or has no tokenizer.
    """
    folder, run_dir = find(name)
    text_tokenizer = TextTokenizer.load(folder)
    model = load_model(folder).eval().to(device)
    known = getattr(model.config, "vocab_layout", None)
    if known is not None:
        layout = VocabLayout(**known)
    else:
        layout = VocabLayout(model.config.vocab_size, text_tokenizer.num_tokens, codebook_size=0)
    return LanguageModel(folder, run_dir, model, text_tokenizer, layout)


def open_checkpoint(name: str, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a CKPT for sampling and measuring, without DeepSpeed and without pickles.

    Raises:
        UserError: it is no CKPT, or a model without image codes.
        DataError: the image tokenizer beside it is not the one that it learned with.
    """
    folder, run_dir = find(name)
    model = load_model(folder).eval().to(device)
    if getattr(model.config, "vocab_layout", None) is None:
        raise UserError(
            f"{folder} is a language model without image codes: its config.json has no vocab_layout."
        )
    home = run_dir or folder
    image_tokenizer = ImageTokenizer.load(home / IMAGE_TOKENIZER, device=device)
    if (home / ROUND_TRIP).is_file():
        check_round_trip(image_tokenizer, home / ROUND_TRIP)
    return Checkpoint(
        folder=folder,
        run_dir=run_dir,
        model=model,
        text_tokenizer=TextTokenizer.load(folder),
        image_tokenizer=image_tokenizer,
        layout=VocabLayout(**model.config.vocab_layout),
        weights=weights_sha256(folder),
    )


def weights_sha256(folder: Path) -> str:
    """Hash the weights of a Hugging Face folder: one file's own SHA-256, or that of all names and hashes.

    Raises:
        UserError: it holds none.
    """
    hashes = {file.name: sha256_of(file) for file in weight_files(folder)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(
        "".join(f"{name} {digest}\n" for name, digest in hashes.items()).encode()
    ).hexdigest()
