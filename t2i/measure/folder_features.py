"""Image features by a DINOv2 or a CLIP of the user's, in transformers' layout.

FD-DINOv2 is the Frechet distance on DINOv2 features (https://arxiv.org/abs/2306.04675, with ViT-L/14), CMMD the MMD on
those of CLIP (https://arxiv.org/abs/2401.09603, with ViT-L/14 at 336 pixels).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from cleanfid.resize import make_resizer
from torch import Tensor
from transformers import CLIPModel, Dinov2Model

from t2i.errors import UserError, first_line
from t2i.files import read_json, values_sha256
from t2i.measure.clip import image_features, whole_model
from t2i.measure.extractor import FeatureExtractor
from t2i.model.backbone import UNUSABLE
from t2i.model.foreign_folder import read_description
from t2i.runs.loading import weights_sha256

FOLDER_FEATURES = ("dinov2", "clip")
# Whatever the folder holds: transformers 5 would measure in its precision.
LOADING = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
OF_NO_MEANING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""What config.json says that changes no feature."""
Embed = Callable[[Tensor], Tensor]
"""Scaled pixels (B, 3, H, W) -> features (B, D)."""
PREPROCESSOR = "preprocessor_config.json"


def folder_features(name: str, folder: Path, *, device: torch.device) -> FeatureExtractor:
    """Open a feature network: the class token of a DINOv2 after its norm, or the image embedding of a CLIP.

    Images are resized whole by clean-fid's rule, as for every other network here, to the size of the folder's
    preprocessor, and scaled by its mean and deviation.

    Raises:
        UserError: the folder is no such model.
    """
    missing = [file for file in ("config.json", PREPROCESSOR) if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"--features-folder {folder} is no folder of transformers: {', '.join(missing)} missing."
        )
    found = read_description(folder).get("model_type")
    if found != name:
        raise UserError(f"--features-folder {folder} holds a model of type {found}; expected {name}.")
    try:
        embed, dims = _dinov2(folder, device) if name == "dinov2" else _clip(folder, device)
    except UNUSABLE as error:
        raise UserError(
            f"--features-folder {folder} cannot be loaded as {name}: {first_line(error)}"
        ) from error
    size, mean, deviation = read_preprocessing(folder / PREPROCESSOR)

    def network(pixels: Tensor) -> Tensor:
        scale = torch.tensor([mean, deviation], device=pixels.device)[
            :, None, :, None, None
        ]  # (2, 1, 3, 1, 1)
        return embed((pixels / 255 - scale[0]) / scale[1])  # (B, D)

    return FeatureExtractor(
        name=name,
        dims=dims,
        resize="clean",
        weights_sha256=weights_sha256(folder),
        resizer=make_resizer("PIL", False, "bicubic", (size, size)),
        network=network,
        device=device,
        preprocessing=_described(folder, scale=(size, mean, deviation)),
    )


def _described(folder: Path, *, scale: tuple[int, list[float], list[float]]) -> str:
    """Hash how a folder's network reads images: two folders of the same weights may say it otherwise."""
    config = {key: value for key, value in read_description(folder).items() if key not in OF_NO_MEANING}
    return values_sha256([*scale, config])


def _dinov2(folder: Path, device: torch.device) -> tuple[Embed, int]:
    model = whole_model(Dinov2Model, folder, **LOADING).to(device)
    return lambda pixels: model(pixel_values=pixels).pooler_output, model.config.hidden_size


def _clip(folder: Path, device: torch.device) -> tuple[Embed, int]:
    model = whole_model(CLIPModel, folder, **LOADING).to(device)
    return lambda pixels: image_features(model, pixels), model.config.projection_dim


def read_preprocessing(file: Path) -> tuple[int, list[float], list[float]]:
    """Read pixels per side, mean and deviation of the pixels that a network was trained on.

    Raises:
        UserError: the file says none, or sides that differ.
    """
    values = read_json(file, error=UserError)
    # A processor that does not crop has no crop_size.
    size = _side(values.get("crop_size")) or _side(values.get("size"))
    mean, deviation = values.get("image_mean"), values.get("image_std")
    if not (size and _is_three(mean) and _is_three(deviation)):
        shown = json.dumps({key: values.get(key) for key in ("crop_size", "size", "image_mean", "image_std")})
        raise UserError(f"{file} says {shown}; expected a size, three means and three deviations.")
    return size, cast(list[float], mean), cast(list[float], deviation)


def _side(size: object) -> int:
    """Return the pixels per side of a square; 0 where it is none."""
    if isinstance(size, dict):
        sides = {size.get(name) for name in ("height", "width")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else 0


def _is_three(values: object) -> bool:
    return (
        isinstance(values, list) and len(values) == 3 and all(isinstance(one, int | float) for one in values)
    )
