"""Anything a CKPT may be: a run folder, one checkpoint of it, an exported folder, a hub name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from t2i.errors import UserError
from t2i.model.modeling_open_lm import OpenLMForCausalLM
from t2i.runs.checkpoints import CHECKPOINTS, choose
from t2i.tokens.image import ImageTokenizer
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
    model: OpenLMForCausalLM
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    layout: VocabLayout


def find(name: str) -> tuple[Path, Path | None]:
    """Resolve a CKPT to its Hugging Face folder and its run folder, if it has one.

    Raises:
        UserError: it is nothing that a CKPT may be.
    """
    path = Path(name)
    if (path / CHECKPOINTS).is_dir():
        folder = choose(path)
        if folder is None:
            raise UserError(f"{path} has no checkpoint yet.")
        return folder, path
    if (path / "config.json").is_file():
        is_checkpoint = path.resolve().parent.name == CHECKPOINTS
        return path, path.resolve().parent.parent if is_checkpoint else None
    if not path.exists() and name.count("/") == 1 and not name.startswith((".", "/")):
        return Path(snapshot_download(name)), None
    raise UserError(f"{name} is no run folder, checkpoint, exported folder or hub name (USER/NAME).")


def home(model: "LanguageModel") -> Path:
    """Return the folder that a model's measures belong to: its run, else its own."""
    return model.run_dir or model.folder


@dataclass(frozen=True)
class LanguageModel:
    """A model and its text tokenizer, with image codes or without."""

    folder: Path
    run_dir: Path | None
    """Its run, for a run folder or one of its checkpoints; None for any other folder."""
    model: OpenLMForCausalLM
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
    model = OpenLMForCausalLM.from_pretrained(folder).eval().to(device)
    if model.config.vocab_layout is not None:
        layout = VocabLayout(**model.config.vocab_layout)
    else:
        layout = VocabLayout(model.config.vocab_size, text_tokenizer.num_tokens, codebook_size=0)
    return LanguageModel(folder, run_dir, model, text_tokenizer, layout)


def open_checkpoint(name: str, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a CKPT for sampling and measuring, without DeepSpeed and without pickles.

    Raises:
        UserError: it is no CKPT, or a model without image codes.
    """
    folder, run_dir = find(name)
    model = OpenLMForCausalLM.from_pretrained(folder).eval().to(device)
    if model.config.vocab_layout is None:
        raise UserError(
            f"{folder} is a language model without image codes: its config.json has no vocab_layout."
        )
    return Checkpoint(
        folder=folder,
        run_dir=run_dir,
        model=model,
        text_tokenizer=TextTokenizer.load(folder),
        image_tokenizer=ImageTokenizer.load((run_dir or folder) / IMAGE_TOKENIZER, device=device),
        layout=VocabLayout(**model.config.vocab_layout),
    )
