"""CLIP score: how near images and captions are in the embedding space of a CLIP model that the user provides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from t2i.errors import UserError, first_line
from t2i.files import values_sha256
from t2i.measure.images import batches, read_image
from t2i.model.backbone import UNUSABLE
from t2i.model.foreign_folder import read_description
from t2i.runs.loading import weights_sha256

RULE = "mean of 100 max(cos, 0); captions cut at the tokenizer's length"
CLIP_BATCH = 32
READ_BY = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")
"""Settings of a processor that decide the pixels."""


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP, with what a result file says about it."""

    name: str
    weights_sha256: str
    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    processor: CLIPImageProcessor
    preprocessing: str = ""
    """Hash of how images are read, and of the model's description."""


def load_clip(folder: Path, *, device: torch.device | str = "cpu") -> Clip:
    """Open a CLIP folder of transformers' layout (as openai/clip-vit-large-patch14 has it).

    Raises:
        UserError: the folder is not such a folder.
    """
    needed = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    # Asked of the folder first: transformers would look for what is missing on the hub.
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--clip {folder} is no CLIP folder of transformers: {', '.join(missing)} missing.")
    if (kind := read_description(folder).get("model_type")) != "clip":
        raise UserError(
            f"--clip {folder} cannot be loaded as a CLIP: its config.json is of {kind}; expected clip."
        )
    plain = {"local_files_only": True, "trust_remote_code": False}
    try:
        # Whatever the folder holds: transformers 5 would measure in its precision.
        model = whole_model(CLIPModel, folder, dtype=torch.float32, **plain)
        tokenizer = AutoTokenizer.from_pretrained(folder, **plain)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except UNUSABLE as error:
        raise UserError(f"--clip {folder} cannot be loaded as a CLIP: {first_line(error)}") from error
    return Clip(
        name=folder.resolve().name,
        weights_sha256=weights_sha256(folder),
        model=model.to(device),
        tokenizer=tokenizer,
        processor=processor,
        preprocessing=_described(processor, folder),
    )


def whole_model(kind: type[Any], folder: Path, **loading: Any) -> Any:
    """Load a frozen network of transformers', and all of it.

    Raises:
        ValueError: weights are missing or have another shape.
    """
    model, report = kind.from_pretrained(folder, output_loading_info=True, **loading)
    # transformers only warns of missing weights, and initialises them randomly.
    strange = {
        key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report[key]
    }
    if strange:
        raise ValueError(f"its weights do not fit its config.json: {strange!s:.300}")
    return model.eval().requires_grad_(False)


def _described(processor: CLIPImageProcessor, folder: Path) -> str:
    read = {key: getattr(processor, key, None) for key in READ_BY}
    description = read_description(folder)
    described = [description.get(key) for key in ("text_config", "vision_config")]
    return values_sha256([read, described])


@torch.inference_mode()
def embed_images(images: Iterable[np.ndarray | Path], clip: Clip) -> Tensor:
    """Embed files or uint8 images (H, W, 3): (N, D) float32 of length 1, on the CPU."""
    embedded = []
    for batch in batches(tqdm(images, desc="CLIP of images", unit="image"), size=CLIP_BATCH):
        opened = [read_image(image) if isinstance(image, Path) else image for image in batch]
        # Resize, crop and scaling come from the CLIP's own preprocessor_config.json, as its training had them.
        pixels = clip.processor(images=opened, return_tensors="pt")["pixel_values"]
        embedded.append(image_features(clip.model, pixels.to(clip.model.device)))
    return _unit(torch.cat(embedded))


@torch.inference_mode()
def embed_captions(captions: Sequence[str], clip: Clip) -> Tensor:
    """Embed captions: (N, D) float32 of length 1, on the CPU."""
    embedded = []
    for batch in batches(tqdm(captions, desc="CLIP of captions", unit="caption"), size=CLIP_BATCH):
        tokens = clip.tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(
            clip.model.device
        )
        embedded.append(
            _features_of(
                clip.model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            )
        )
    return _unit(torch.cat(embedded))


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed scaled pixels (B, 3, H, W): (B, D), not of length 1."""
    return _features_of(model.get_image_features(pixel_values=pixels))


def clip_score(images: Tensor, captions: Tensor) -> float:
    """Compute RULE on embedded images and captions (N, D), one caption per image.

    Source: https://arxiv.org/abs/2104.08718, with the weight 100 that text-to-image papers report.
    """
    # A negative cosine counts as 0, as in the paper: below that, how unrelated two things are says nothing.
    return 100 * (images * captions).sum(-1).clamp(min=0).mean().item()


def _features_of(found: Tensor | ModelOutput) -> Tensor:
    """Take the features (B, D) out of what a CLIP returns: transformers 4 gives them, transformers 5 an output."""
    return found if isinstance(found, Tensor) else found["pooler_output"]


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)
