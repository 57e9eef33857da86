"""An image tokenizer whose codes are drawn towards the meaning of captions: CLIP's loss beside the reconstruction.

An image is the mean of what a small head makes of each of its quantised latents: a bag of codes, as a language model
has embeddings of codes. A caption is the embedding of a sentence encoder, which is frozen and needed only before the
training. The head is not kept: what the codes have learned shows in what `t2i align` finds from them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from t2i.errors import UserError
from t2i.model.contrastive_loss import MAX_SCALE, contrastive_loss

HEAD_WIDTH = 256
TEMPERATURE = 0.07
"""CLIP's own initial value."""
BATCH = 64
MOST_TOKENS = 128


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
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--align-to is {folder}, which has no config.json; expected a folder of a sentence encoder."
            )
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


class Alignment(nn.Module):
    """The head, a trained temperature, and the captions' embeddings."""

    def __init__(self, sentences: Tensor, *, latent_channels: int) -> None:
        super().__init__()
        # A buffer, so that it moves with the module; not saved, since it is made from the captions again.
        self.register_buffer("sentences", sentences.clone(), persistent=False)  # (N, E)
        self.head = nn.Sequential(
            nn.Linear(latent_channels, HEAD_WIDTH), nn.GELU(), nn.Linear(HEAD_WIDTH, sentences.shape[1])
        )
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def forward(self, quantised: Tensor, images: Tensor) -> Tensor:
        """Compute CLIP's loss of quantised latents (B, C, h, w) of the images with these numbers (B,)."""
        # Each code by itself and then the mean: the mean of four channels alone could tell few things apart.
        features = self.head(quantised.permute(0, 2, 3, 1)).mean((1, 2))  # (B, E)
        text = self.get_buffer("sentences")[images.to(quantised.device)]
        scale = self.log_scale.clamp(max=math.log(MAX_SCALE))
        return contrastive_loss(F.normalize(features, dim=-1), text, log_scale=scale)
