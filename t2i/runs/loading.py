"""Open a CKPT: a run folder, one of its checkpoints, an exported folder, a hub name (hf:USER/NAME), or `demo`."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from transformers import PreTrainedModel

from t2i.config import ASSETS, Dtype
from t2i.data.shards.manifest import IMAGE_TOKENIZER
from t2i.distributed.run_id import read_run_id
from t2i.errors import CheckpointError, UserError, first_line
from t2i.files import HUB, hub_name, not_here, sha256_of
from t2i.model.backbone import check_decoding, known_layout, load_model, num_ids, weight_files
from t2i.model.foreign_folder import read_description
from t2i.runs.best_checkpoint import BEST
from t2i.runs.checkpoint_manifest import CHECKPOINTS, has_manifest
from t2i.runs.checkpoint_store import newest_readable, verify
from t2i.runs.run_folder import RESOLVED
from t2i.tokens.image import ROUND_TRIP, ImageTokenizer, check_round_trip
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

DATA_MANIFEST = "data_manifest.json"
"""Copy of the manifest of the shards that the model was trained on."""
SHIPPED_MODEL = "demo"
"""The CKPT that comes with t2i: what `make demo` has trained."""
SHIPPED_MEASURES = Path("demo_measures")
"""Where its measures are written, below the current folder: its own folder is the package's."""
OTHER_FORMATS = [
    *("original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*"),
    *("consolidated*", "*.h5", "*.msgpack", "*.ot", "*.tflite"),
]
"""Files of a hub's model that hold its weights once more, in forms that are not read here."""
MOST_TRIES = 5
"""Checkpoints that are tried one after the other, while the run that makes them removes them."""


@dataclass(frozen=True)
class OpenedModel:
    """An opened CKPT: a model, its text tokenizer and, if it was opened for images, its image tokenizer."""

    folder: Path
    """The Hugging Face folder of the weights."""
    run_dir: Path | None
    """The run folder, if the CKPT is one or a checkpoint of one; None for any other folder."""
    model: PreTrainedModel
    text_tokenizer: TextTokenizer
    layout: VocabLayout
    """In a plain language model the whole vocabulary is text, and codebook_size is 0."""
    image_tokenizer: ImageTokenizer | None = None
    """None if the CKPT was opened without images."""
    weights: str = "not hashed"
    """SHA-256 of the weights on disk if the CKPT was opened for images; else a text."""
    hub: str = ""
    """Its name on the hub, if it was opened by it."""

    @property
    def name(self) -> str:
        """Return what people call the model: its name on the hub, else its folder's."""
        # The folder of a hub's model is named by a hash.
        return self.hub or self.home.resolve().name

    @property
    def home(self) -> Path:
        """Its run folder, else its own folder."""
        return self.run_dir or self.folder

    @property
    def measures(self) -> Path:
        """The folder that its measures are written to: its home, unless that is the package's."""
        return measures_home(self.home)

    @property
    def dtype(self) -> str:
        """Name the type of the weights in memory, which results are measured with."""
        return str(self.model.dtype).removeprefix("torch.")

    def measures_folder(self, name: str) -> Path:
        """Name the folder of this checkpoint's measures: NAME/step_NNNNNN in its run, NAME in an exported folder."""
        return self.measures / name if self.run_dir is None else self.run_dir / name / self.folder.name

    def needed_image_tokenizer(self) -> ImageTokenizer:
        """Return the image tokenizer of a model that was opened for images."""
        assert self.image_tokenizer is not None, "this model was opened with needs_images=False"
        return self.image_tokenizer

    def image_size(self) -> int:
        """Return the pixels per side of the images that the model draws."""
        codes_per_side = math.isqrt(self.model.config.codes_per_image)
        return int(codes_per_side * self.needed_image_tokenizer().downscale)


class _RemovedError(CheckpointError):
    """A checkpoint was removed while it was read, as a run that trains removes old ones."""


def measures_home(home: Path) -> Path:
    """Name the folder for the measures of a run folder or another model's own folder."""
    return SHIPPED_MEASURES if home == ASSETS / SHIPPED_MODEL else home


def find(name: str) -> tuple[Path, Path | None]:
    """Resolve a CKPT to its Hugging Face folder, and its run folder or None; what a checkpoint holds is verified.

    Raises:
        UserError: the name is not a CKPT.
        CheckpointError: the checkpoint is damaged, or of another run than the folder around it.
    """
    if hub := hub_name(name):
        return _downloaded(hub), None
    refusal = f"{name:.200} is no run folder, checkpoint or exported folder"
    if missing := not_here(name):
        if name == SHIPPED_MODEL:
            return ASSETS / SHIPPED_MODEL, None
        raise UserError(f"{refusal}: {missing}.")
    path = Path(name)
    if path.name == BEST and path.is_symlink():  # measures are kept by the step's own name
        path = path.parent / path.readlink()
    if (path / CHECKPOINTS).is_dir():
        folder = newest_readable(path)
        if folder is None:
            raise UserError(f"{path} has no checkpoint yet.")
        return folder, path
    if _is_checkpoint(path):
        run_id = verify(path, weights_only=True).facts.run_id
        run_dir = run_around(path)
        if run_dir and (wanted := read_run_id(run_dir)) and run_id != wanted:
            raise CheckpointError(f"{path} is of another run than {run_dir}. Move it out of there to use it.")
        # Measures are kept by the folder's name, which `.` and a link do not have.
        is_named = not run_dir or path.name == path.resolve().name
        return path if is_named else path.resolve(), run_dir
    if (path / "config.json").is_file():
        return path, None
    if path.is_file():
        raise UserError(f"{refusal}: it is a file.")
    raise UserError(f"{refusal}: it has neither {CHECKPOINTS}/ nor config.json.")


def _downloaded(name: str) -> Path:
    """Return the folder of a hub's model in the cache, downloaded if it is not there yet."""
    try:
        return Path(snapshot_download(name, ignore_patterns=OTHER_FORMATS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise UserError(f"the hub gives no model {HUB}{name}: {first_line(error)}") from error


def _is_checkpoint(path: Path) -> bool:
    """Tell a checkpoint, wherever it was copied to, from another Hugging Face folder."""
    # By more than its manifest, which may be what is missing.
    has_engine = (path / "engine").is_dir() and (path / "config.json").is_file()
    return path.is_dir() and (has_engine or run_around(path) is not None or has_manifest(path))


def run_around(path: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in; None if it lies elsewhere."""
    # A run holds its image tokenizer and its measures once, two folders above each of its checkpoints.
    folder = path.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS and (folder.parent / RESOLVED).is_file() else None


def open_model(
    name: str,
    *,
    needs_images: bool,
    device: torch.device | str = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Load a CKPT for sampling and measuring, without DeepSpeed and without pickles.

    Args:
        needs_images: the caller draws or encodes images. Otherwise any language model will do, and neither an image
            tokenizer is loaded nor the weights are hashed.
        dtype: of the weights; `auto` as they are stored on a GPU, and float32 on a CPU.
        trust_remote_code: let a model whose class is Python code of its folder run that code.

    Raises:
        UserError: it is not a CKPT, has no tokenizer, is code that is not trusted, or has no image codes although
            images are needed.
        DataError: the image tokenizer beside it is not the one that the model was trained with.
        CheckpointError: a checkpoint is damaged, or was removed while it was read.
    """
    # Of a run that is training the next one will do; of a checkpoint that was named itself there is no other.
    num_tries = MOST_TRIES if (Path(name) / CHECKPOINTS).is_dir() else 1
    while True:
        folder, run_dir = find(name)
        num_tries -= 1
        try:
            with reading(folder):
                return _read(
                    folder,
                    run_dir,
                    hub=hub_name(name),
                    needs_images=needs_images,
                    device=device,
                    dtype=dtype_of(dtype, device=device),
                    trust_remote_code=trust_remote_code,
                )
        except _RemovedError:
            if not num_tries:
                raise


def dtype_of(asked: Dtype, *, device: torch.device | str) -> torch.dtype | Literal["stored"]:
    """Choose the type of the weights on a device."""
    if asked == "auto":
        # A CPU without instructions for bf16 is up to 90 times slower at it. A GPU in fp32 leaves its tensor cores
        # unused and reads twice the bytes, for digits that the file does not have.
        return torch.float32 if torch.device(device).type == "cpu" else "stored"
    return torch.float32 if asked == "float32" else torch.bfloat16


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read a folder inside the block, and say so if it was removed meanwhile.

    Raises:
        CheckpointError: it was.
    """
    try:
        yield
    # What transformers, safetensors and Python raise at a file that is gone.
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if folder.is_dir():
            raise
        raise _RemovedError(
            f"{folder} was removed while it was read, as a run that trains removes old checkpoints. Run the same"
            " command again."
        ) from error


def _read(
    folder: Path,
    run_dir: Path | None,
    *,
    hub: str,
    needs_images: bool,
    device: torch.device | str,
    dtype: torch.dtype | Literal["stored"],
    trust_remote_code: bool,
) -> OpenedModel:
    # First, so that a folder without a tokenizer is refused before gigabytes of weights are read.
    text_tokenizer = TextTokenizer.load(folder)
    if needs_images and read_description(folder).get("sequence_mode") == "text-only":
        raise UserError(f"{folder} was trained on text alone; it draws no images.")
    model = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval().to(device)
    layout = known_layout(model, name=str(folder))
    text_tokenizer.check_rows(
        layout.num_text_tokens if layout else num_ids(model), model=f"the model of {folder}"
    )
    if layout is None and needs_images:
        raise UserError(
            f"{folder} is a plain language model without image codes: its config.json has no vocab_layout."
        )
    layout = layout or VocabLayout(num_ids(model), text_tokenizer.num_tokens, codebook_size=0)
    opened = OpenedModel(folder, run_dir, model, text_tokenizer, layout, hub=hub)
    return _with_images(opened) if needs_images else opened


def _with_images(opened: OpenedModel) -> OpenedModel:
    """Add the image tokenizer, checked, and the hash of the weights."""
    check_decoding(opened.model, name=str(opened.folder))
    image_tokenizer = ImageTokenizer.load(opened.home / IMAGE_TOKENIZER, device=opened.model.device)
    if (opened.home / ROUND_TRIP).is_file():
        # Codes have a meaning under one image tokenizer only. Another one of the same shape would draw noise.
        check_round_trip(image_tokenizer, opened.home / ROUND_TRIP)
    # Hashed now, not when a result names it: a run that is training may remove this checkpoint meanwhile.
    return replace(opened, image_tokenizer=image_tokenizer, weights=weights_sha256(opened.folder))


def weights_sha256(folder: Path) -> str:
    """Hash the weights of a Hugging Face folder: SHA-256 of the file, or of the names and hashes of several files.

    Raises:
        UserError: the folder holds no weights.
    """
    # With their names, so that swapped files are not taken for the same weights.
    hashes = {file.name: sha256_of(file) for file in weight_files(folder)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(
        "".join(f"{name} {digest}\n" for name, digest in hashes.items()).encode()
    ).hexdigest()
