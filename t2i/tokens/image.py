"""The image tokenizer: diffusers' VQModel behind a small interface, and the centre crop before it.

MoVQGAN is VQModel with norm_type "spatial" (https://github.com/ai-forever/MoVQGAN).
"""

import hashlib
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i.errors import DataError, UserError, first_line
from t2i.files import read_json, why_lacking

if TYPE_CHECKING:
    from diffusers import VQModel

KIND = "VQModel"
"""The class of a tokenizer's folder, as its config.json names it."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Diffusers' name of a folder's weights."""
ROUND_TRIP = "roundtrip.safetensors"
"""Images, their codes and what they decode to, kept beside shards, runs and exports."""

SAME_TOKENIZER = 0.95
"""Share of equal codes from which two tokenizers count as the same."""


def centre_crop_resize(image: Image.Image, *, size: int) -> Image.Image:
    """Crop the centre square of the shorter side and resize it to size x size (bicubic).

    An image of that size is returned unchanged.

    Source: paper sec. 2.1 (centre crop); filter of MoVQGAN's own preprocessing.
    """
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cropped first, or the filter would see pixels outside the square; half pixels round as Pillow does.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=1)


def shifted(image: Image.Image, *, right: int, down: int) -> Image.Image:
    """Shift an image by some pixels, repeating its edge."""
    pixels = np.asarray(image)
    reach = max(abs(right), abs(down))
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    top, left = reach - down, reach - right
    return Image.fromarray(padded[top : top + image.height, left : left + image.width])


def to_pixels(images: list[Image.Image]) -> Tensor:
    """Stack RGB images of one size as float32 in [-1, 1]."""
    return pixels_of(torch.from_numpy(np.stack([np.asarray(image) for image in images])))  # (B, 3, H, W)


def pixels_of(images: Tensor) -> Tensor:
    """Scale uint8 images (B, H, W, 3) to float32 pixels (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def images_of(pixels: Tensor) -> Tensor:
    """Round pixels (B, 3, H, W) in [-1, 1] to uint8 images (B, H, W, 3)."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Have convolutions on a GPU compute in fp32 in fact: cuDNN's default rounds to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class ImageTokenizer:
    """A frozen VQModel that maps pixels (B, 3, H, W) to codes (B, K), row by row over the code grid, and back.

    Weights and the search for the nearest code stay in fp32. `dtype` is that of the convolutions.
    """

    def __init__(
        self,
        model: "VQModel",
        *,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Convolutions are fastest channels last. Rounding differs a little, so that single codes at a tie may differ.
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.folder = folder
        self.dtype = dtype
        self.downscale = 2 ** (len(model.config.block_out_channels) - 1)
        self.codebook_size: int = model.config.num_vq_embeddings

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ImageTokenizer":
        """Open a diffusers VQModel folder.

        Args:
            dtype: of the convolutions; torch.bfloat16 is faster on GPUs and changes some codes (code_agreement).

        Raises:
            UserError: the folder is not a VQModel folder, or its weights are broken or more than tensors.
        """
        if not (folder / "config.json").is_file():
            lacks = why_lacking(folder, "config.json")
            raise UserError(
                f"{folder} is no image tokenizer: {lacks}. Expected the folder of a diffusers VQModel."
            )
        kind = read_json(folder / "config.json", error=UserError).get("_class_name")
        if kind != KIND:
            raise UserError(f"{folder} is no image tokenizer: its config.json is of {kind}; expected {KIND}.")
        # Here, as it takes seconds that a rank without an image tokenizer would wait for.
        from diffusers import VQModel

        # The switch lets the decoder take codes. Older folders do not set it, and the weights do not depend on it.
        try:
            model, report = VQModel.from_pretrained(
                folder, lookup_from_codebook=True, output_loading_info=True
            )
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            pickle.UnpicklingError,
            SafetensorError,
        ) as error:
            raise UserError(f"the image tokenizer {folder} cannot be loaded: {first_line(error)}") from error
        # diffusers only warns, and draws what is missing at random.
        if strange := {key: names for key, names in report.items() if names}:
            raise UserError(
                f"the weights of the image tokenizer {folder} do not fit its config.json: {strange!s:.500}."
            )
        return cls(model, folder=folder, device=device, dtype=dtype)

    def num_codes(self, image_size: int) -> int:
        """Count the codes of one image of image_size x image_size pixels."""
        if image_size < 1 or image_size % self.downscale:
            raise UserError(
                f"image size {image_size} is no multiple of the tokenizer's {self.downscale} pixels per code."
            )
        return (image_size // self.downscale) ** 2

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) in [-1, 1] to codes (B, K), int64."""
        with self._precision():
            pixels = pixels.to(self.model.device, memory_format=torch.channels_last)
            latents = self.model.encode(pixels).latents  # (B, C, h, w)
        # In fp32: distances between codes are often smaller than the rounding of bf16.
        codes = self.model.quantize(latents.float())[2][2]
        return codes.reshape(len(pixels), -1)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, K) of square images to pixels (B, 3, H, W), float32, about [-1, 1].

        Raises:
            ValueError: a code outside the codebook, or K that is no square number.
        """
        batch, num_codes = codes.shape
        side = round(num_codes**0.5)
        if side * side != num_codes:
            raise ValueError(f"{num_codes} codes do not fill a square image.")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"found codes {found}; expected 0 to {self.codebook_size - 1}.")
        shape = (batch, side, side, self.model.quantize.vq_embed_dim)
        flat = codes.flatten().to(self.model.device)
        with self._precision():
            return self.model.decode(flat, force_not_quantize=True, shape=shape).sample.float()

    def code_vectors(self) -> Tensor:
        """Return the codebook (codebook, C), float32: the nearest vector is an image patch's code."""
        return self.model.quantize.embedding.weight.detach().float().cpu()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        # Autocast rather than cast weights: codebook, fingerprint and file stay the same in every
        # precision.
        is_lower = self.dtype != torch.float32
        with (
            torch.autocast(self.model.device.type, dtype=self.dtype if is_lower else None, enabled=is_lower),
            nullcontext() if is_lower else without_tf32(),
        ):
            yield

    def fingerprint(self) -> str:
        """Hash the names, shapes and values of the weights (hex SHA-256)."""
        digest = hashlib.sha256()
        # Of the values in fp32, so that a folder stored in another precision or file format is the same tokenizer.
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def copy_to(self, folder: Path) -> None:
        """Write a diffusers folder of this model, its weights as they are stored."""
        if not (self.folder / WEIGHTS).is_file():  # in shards, or pickled
            self.model.save_pretrained(folder)
            return
        self.model.save_config(folder)
        shutil.copyfile(self.folder / WEIGHTS, folder / WEIGHTS)

    def has_weights_of(self, folder: Path) -> bool:
        """Tell whether these are the weights of a folder, whatever precision they are stored in."""
        # Of its file alone: a model made of it, and hashes of both, took a third of an export's time.
        own, others = self.model.state_dict(), load_file(folder / WEIGHTS)
        return own.keys() == others.keys() and all(
            torch.equal(own[name].float().cpu(), value.float()) for name, value in others.items()
        )


def code_agreement(tokenizer: ImageTokenizer, reference: ImageTokenizer, pixels: Tensor) -> float:
    """Return the share of the codes of pixels (B, 3, H, W) that two tokenizers agree on."""
    return (tokenizer.encode(pixels) == reference.encode(pixels)).float().mean().item()


def check_round_trip(tokenizer: ImageTokenizer, file: Path) -> None:
    """Check that a tokenizer is the one that made stored codes, by encoding the images stored beside them.

    Args:
        file: safetensors with images (N, H, W, 3), uint8, and codes (N, K).

    Raises:
        DataError: another tokenizer made the codes, or the file is broken.
    """
    try:
        stored = load_file(file)
        images, wanted = stored["pictures"], stored["codes"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{file} is broken: {first_line(error)}") from error
    codes = tokenizer.encode(pixels_of(images)).cpu()
    agreement = (codes == wanted).float().mean().item() if codes.shape == wanted.shape else 0.0
    # Not all need be equal: ties between codes may fall otherwise on another device. Another tokenizer agrees on
    # almost none.
    if agreement < SAME_TOKENIZER:
        raise DataError(
            f"{tokenizer.folder} reproduces {agreement:.0%} of the codes stored in {file}; expected at least"
            f" {SAME_TOKENIZER:.0%}. Another image tokenizer made them."
        )
