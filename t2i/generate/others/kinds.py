"""Janus, Emu3 and Chameleon: how each is prompted, where its image codes are, and how it decodes them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    ChameleonForConditionalGeneration,
    Emu3ForConditionalGeneration,
    JanusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from t2i.config import Dtype
from t2i.errors import UserError, first_line
from t2i.files import read_json
from t2i.generate.others.family import Family, OthersModel, OthersTokenizer
from t2i.model.backbone import UNUSABLE
from t2i.model.foreign_folder import read_description
from t2i.runs.loading import dtype_of, weights_sha256
from t2i.tokens.image import ImageTokenizer

EMU3_SIZE = 720
"""Pixels per side that Emu3-Gen draws."""
IMAGE_TOKENIZER = "image_tokenizer"
"""Folder of a diffusers VQModel inside a Chameleon's: transformers' class encodes images, and cannot decode them."""


@dataclass(frozen=True)
class Given:
    """What is known of a folder beside its model."""

    folder: Path
    weights: str
    """SHA-256."""
    image_size: int | None
    """Pixels per side that the user asks for."""


class Opener(Protocol):
    """Makes the family of a loaded model, and says how many pixels per side it draws.

    The models are Any here: their classes share no interface but that of all models.
    """

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, given: Given
    ) -> tuple[Family, int]: ...


def kind_of(folder: Path) -> str | None:
    """Name the kind of a folder's model, if it is one of these; None for all others."""
    if not (folder / "config.json").is_file():
        return None
    found = read_json(folder / "config.json", error=UserError).get("model_type")
    return str(found) if found in KINDS else None


def open_others(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = "auto",
    image_size: int | None = None,
) -> OthersModel:
    """Open a Janus, an Emu3 or a Chameleon in transformers' layout.

    Args:
        dtype: of the weights; `auto` as they are stored on a GPU, and float32 on a CPU.
        image_size: pixels per side that an Emu3 draws; None for EMU3_SIZE. The others have one size.

    Raises:
        UserError: it cannot be loaded, or lacks what drawing needs.
    """
    kind = kind_of(folder)
    if kind is None:
        raise UserError(f"{folder} holds none of {', '.join(KINDS)}.")
    if image_size is not None and kind != "emu3":
        raise UserError(f"--image-size is {image_size}; a {kind} draws one size. Expected none.")
    read_description(folder)  # refuses what would be fetched and run
    (cls, _), kept = KINDS[kind], dtype_of(dtype, device=device)
    try:
        model = cls.from_pretrained(
            folder, dtype="auto" if kept == "stored" else kept, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        raise UserError(f"{folder} cannot be loaded as a {kind}: {first_line(error)}") from error
    model.eval().requires_grad_(False)
    model.to(device)
    return opened_of(kind, model, tokenizer, folder=folder, image_size=image_size)


def opened_of(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    image_size: int | None = None,
) -> OthersModel:
    """Put a loaded model and what it draws by together."""
    given = Given(folder, weights=weights_sha256(folder), image_size=image_size)
    family, size = KINDS[kind][1](model, tokenizer, given=given)
    return OthersModel(
        kind, folder=folder, model=model, family=family, pixels_per_side=size, weights=given.weights
    )


def _janus(model: Any, tokenizer: PreTrainedTokenizerBase, *, given: Given) -> tuple[Family, int]:
    """Codes have embeddings and a head of their own; guidance replaces the words of a prompt by padding."""
    core, settings = model.model, model.generation_config
    begin, first, pad = (
        settings.generation_kwargs["boi_token_id"],
        settings.bos_token_id,
        settings.pad_token_id,
    )
    vq = core.vqmodel

    def prompt(caption: str) -> list[int]:
        words = tokenizer(f"<|User|>: {caption}\n\n<|Assistant|>:", add_special_tokens=False).input_ids
        return [first, *words, begin]

    side = round(core.vision_model.config.num_image_tokens**0.5)
    images = OthersTokenizer(
        encode=lambda pixels: vq.encode(_on(pixels, model))[2].reshape(len(pixels), -1),
        decode=lambda codes: vq.decode(codes.to(model.device)).float(),
        name=given.weights,
    )
    family = Family(
        body=core.language_model,
        prompt=prompt,
        null_prompt=lambda ids: [each if each in (first, begin) else pad for each in ids],
        embed_code=model.prepare_embeddings_for_image_generation,
        logits=core.generation_head,
        tokenizer=images,
        codes_per_side=side,
    )
    return family, side * 2 ** (len(vq.config.channel_multiplier) - 1)


def _emu3(model: Any, tokenizer: PreTrainedTokenizerBase, *, given: Given) -> tuple[Family, int]:
    """Codes are ids of the vocabulary, each row of them ends with a token, and the prompt says how many there are."""
    core, names = model.model, model.config.vocabulary_map
    size, factor = given.image_size or EMU3_SIZE, core.vqmodel.spatial_scale_factor
    if size % factor:
        raise UserError(
            f"--image-size is {size}; expected a multiple of {factor}, the pixels per side of a code."
        )
    side = size // factor
    before, after = names["<|image start|>"], names["<|image token|>"]
    first = model.config.text_config.bos_token_id

    def prompt(caption: str) -> list[int]:
        words, sizes = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (caption, f"{side}*{side}")
        )
        return [first, *words, before, *sizes, after]

    def encode(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        found = core.vqmodel.encode(_on(pixels, model), sizes)
        # transformers 4 returns the codes alone, transformers 5 an output that has them.
        return torch.stack(getattr(found, "image_tokens", found)).reshape(len(pixels), -1)

    images = OthersTokenizer(
        encode=encode,
        decode=lambda codes: core.vqmodel.decode(codes.reshape(-1, side, side).to(model.device)).float(),
        name=given.weights,
    )
    ids = core.vocabulary_mapping.img2bpe_mapping_tensor.long().to(model.device)  # (C,)
    return _in_vocabulary(
        model,
        body=core.text_model,
        prompt=prompt,
        images=images,
        ids=ids,
        side=side,
        line_end=names["<|extra_200|>"],
    ), size


def _chameleon(model: Any, tokenizer: PreTrainedTokenizerBase, *, given: Given) -> tuple[Family, int]:
    """Codes are ids of the vocabulary; transformers' class forbids them, so its body and head are used."""
    core, names = model.model, model.config.vocabulary_map
    if not (given.folder / IMAGE_TOKENIZER).is_dir():
        raise UserError(
            f"{given.folder} has no {IMAGE_TOKENIZER}/: transformers' Chameleon cannot decode images. Put"
            " its VQGAN there, as a diffusers VQModel."
        )
    decoder = ImageTokenizer.load(given.folder / IMAGE_TOKENIZER, device=model.device)
    vq = model.config.vq_config
    side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)

    def prompt(caption: str) -> list[int]:
        words = tokenizer(caption, add_special_tokens=False).input_ids
        return [model.config.bos_token_id, *words, names["<racm3:break>"]]

    images = OthersTokenizer(
        encode=lambda pixels: core.vqmodel.encode(_on(pixels, model))[2].reshape(len(pixels), -1),
        decode=decoder.decode,
        name=f"{given.weights} {decoder.fingerprint()}",
    )
    ids = core.vocabulary_mapping.img2bpe_mapping_tensor.long().to(model.device)  # (C,)
    return _in_vocabulary(model, body=core, prompt=prompt, images=images, ids=ids, side=side), vq.resolution


def _in_vocabulary(
    model: Any,
    *,
    body: torch.nn.Module,
    prompt: Callable[[str], list[int]],
    images: OthersTokenizer,
    ids: Tensor,
    side: int,
    line_end: int | None = None,
) -> Family:
    """Make the family of a model whose codes are ids of its vocabulary.

    Args:
        ids: (C,) the id of each code.
    """
    head = model.lm_head.weight[ids]  # (C, D)
    null = prompt("")
    return Family(
        body=body,
        prompt=prompt,
        null_prompt=lambda _: null,
        embed_code=lambda codes: model.get_input_embeddings()(ids[codes]),
        logits=lambda hidden: hidden @ head.T,
        tokenizer=images,
        codes_per_side=side,
        line_end=line_end,
    )


def _on(pixels: Tensor, model: Any) -> Tensor:
    return pixels.to(device=model.device, dtype=model.dtype)


KINDS: dict[str, tuple[type[PreTrainedModel], Opener]] = {
    "janus": (JanusForConditionalGeneration, _janus),
    "emu3": (Emu3ForConditionalGeneration, _emu3),
    "chameleon": (ChameleonForConditionalGeneration, _chameleon),
}
