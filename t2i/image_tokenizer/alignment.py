"""An image tokenizer whose codes are drawn towards meaning: CLIP's loss beside that of the reconstruction.

A small head reads each quantised latent. Aligned to captions, an image is the mean of what it makes of them, a bag of
codes, as a language model has embeddings of codes; a caption is its embedding by a frozen sentence encoder, which is
needed only before the training. Aligned to a frozen vision encoder, each code finds what that sees in its place. The
head is not kept: what codes have learned shows in what `t2i align` finds from them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from t2i.errors import UserError
from t2i.files import sha256_of
from t2i.image_tokenizer.vision_encoder import EFFICIENTNET, VisionEncoder, is_vision_encoder
from t2i.measure.features import efficientnet_file
from t2i.model.contrastive_loss import MAX_SCALE, contrastive_loss
from t2i.runs.loading import weights_sha256

HEAD_WIDTH = 256
TEMPERATURE = 0.07
"""CLIP's own initial value."""
BATCH = 64
MOST_TOKENS = 128
MOST_PLACES = 2_048
"""Of a batch, evenly spread: similarities are of each place to each other one."""


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen sentence encoder: the mean of its last hidden states, of length one."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "SentenceEncoder":
        """Open a folder.

        Raises:
            UserError: it holds no model and tokenizer that transformers opens.
        """
        _check_description(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            opened = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
            model = opened.to(device).eval()
        # TypeError: a tokenizer whose file is missing is opened by the name None.
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--align-to {folder} cannot be opened as a sentence encoder: {error}."
            ) from error
        if tokenizer.pad_token is None:  # language models have none, and the mask leaves it out
            tokenizer.pad_token = tokenizer.eos_token
        return cls(tokenizer, model)

    def embed(self, captions: list[str]) -> Tensor:
        """Embed captions: (N, E) in fp32."""
        # Each text once: sets in many styles have few captions for many images.
        texts = list(dict.fromkeys(captions))
        found = torch.cat(
            [
                _embedded(texts[start : start + BATCH], self.tokenizer, self.model)
                for start in tqdm(range(0, len(texts), BATCH), desc="embed captions", unit="batch")
            ]
        )
        places = {text: place for place, text in enumerate(texts)}
        return found[[places[caption] for caption in captions]]


@torch.no_grad()
def _embedded(texts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    batch = batch.to(model.device)
    hidden = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state  # (B, S, E)
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()


def load_encoder(name: str, *, device: str = "cpu") -> SentenceEncoder | VisionEncoder:
    """Open what --align-to names.

    Raises:
        UserError: it is no encoder.
    """
    if is_vision_encoder(name):
        return VisionEncoder.load(name, device=device)
    return SentenceEncoder.load(Path(name), device=device)


def encoder_sha256(name: str) -> str:
    """Hash the weights of what --align-to names.

    Raises:
        UserError: there are none.
    """
    if name == EFFICIENTNET:
        return sha256_of(efficientnet_file())
    _check_description(Path(name))
    return weights_sha256(Path(name))


def _check_description(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--align-to is {folder}, which has no config.json; expected a folder of a sentence encoder or a"
            f" vision encoder, or {EFFICIENTNET}."
        )


class Target(Protocol):
    """What codes are aligned to."""

    width: int
    """Of its features."""

    def pairs(self, features: Tensor, *, pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pair what codes say with what they should: (N, width) each.

        Args:
            features: (B, h, w, width) of each code.
            pixels: (B, 3, H, W) as the tokenizer sees them.
            images: their numbers (B,).
        """


class CaptionTarget:
    """Captions, by their embeddings (N, E): an image is the mean of what its codes say."""

    def __init__(self, sentences: Tensor) -> None:
        self.sentences = sentences
        self.width = sentences.shape[1]

    def pairs(self, features: Tensor, *, pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pair images (B, E) with their captions."""
        # Each code by itself and then the mean: the mean of four channels alone could tell few things apart.
        return features.mean((1, 2)), self.sentences[images.to(self.sentences.device)]


class VisionTarget:
    """What a vision encoder sees where a code is, of the image as it is trained on: mirrored, recoloured or neither."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self.width = encoder.width

    def pairs(self, features: Tensor, *, pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pair places (B x h x w, E), at most MOST_PLACES, with what is seen there."""
        seen = self.encoder.grid(pixels, side=features.shape[1]).flatten(0, 2)
        # Features of images in general have a large mean in common, which tells no two of them apart.
        seen = F.normalize(seen - seen.mean(0), dim=-1)
        every = -(-len(seen) // MOST_PLACES)
        return features.flatten(0, 2)[::every], seen[::every]


class Alignment(nn.Module):
    """The head, and a trained temperature."""

    def __init__(self, target: Target, *, latent_channels: int) -> None:
        super().__init__()
        self.target = target
        self.head = nn.Sequential(
            nn.Linear(latent_channels, HEAD_WIDTH), nn.GELU(), nn.Linear(HEAD_WIDTH, target.width)
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def forward(self, quantised: Tensor, pixels: Tensor, images: Tensor) -> Tensor:
        """Compute CLIP's loss of quantised latents (B, C, h, w) of pixels (B, 3, H, W), images (B,) by number."""
        features, wanted = self.target.pairs(
            self.head(quantised.permute(0, 2, 3, 1)), pixels=pixels, images=images
        )
        scale = self.log_scale.clamp(max=math.log(MAX_SCALE))
        return contrastive_loss(F.normalize(features, dim=-1), wanted, log_scale=scale)
