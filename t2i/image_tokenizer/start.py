"""A training that begins with the weights of another image tokenizer: what it takes over, and what it refuses."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from t2i.config import TokenizerConfig
from t2i.errors import UserError
from t2i.tokens.image import ImageTokenizer

logger = logging.getLogger(__name__)

SAME_LENGTH = 1e-2


@dataclass(frozen=True)
class Start:
    """What a training begins with, and itself changes."""

    tokenizer: ImageTokenizer
    fingerprint: str
    """Of its weights as they were."""


def open_start(config: TokenizerConfig) -> Start | None:
    """Open what `init_from` names; None where it names nothing.

    Raises:
        UserError: it is no image tokenizer, or one whose codes are compared by direction.
    """
    if not config.init_from:
        return None
    tokenizer = ImageTokenizer.load(Path(config.init_from))
    lengths = tokenizer.code_vectors().norm(dim=1)
    if torch.allclose(lengths, torch.ones_like(lengths), atol=SAME_LENGTH):
        raise UserError(
            f"--init-from {config.init_from}: its codes all have length 1, as LlamaGen's, which compares directions."
            " Training here compares distances, and would lose what its decoder knows. Use the folder as it is."
        )
    return Start(tokenizer, tokenizer.fingerprint())


def shaped_as(config: TokenizerConfig, start: Start | None) -> TokenizerConfig:
    """Return the settings with the shape of what the training begins with.

    Raises:
        UserError: another shape was asked for, or it has one that is not trained here.
    """
    if start is None:
        return config
    model = start.tokenizer.model
    found = model.config
    shape = {
        "channels": tuple(found.block_out_channels),
        "layers_per_block": found.layers_per_block,
        "latent_channels": model.quantize.vq_embed_dim,
        "codebook_size": found.num_vq_embeddings,
    }
    default = TokenizerConfig()
    for key, value in shape.items():
        if (asked := getattr(config, key)) not in (value, getattr(default, key)):
            raise UserError(
                f"--{key.replace('_', '-')} is {asked}, and --init-from {config.init_from} has {value}. Leave it out,"
                " or begin without --init-from."
            )
    start.tokenizer.num_codes(config.image_size)
    try:
        shaped = replace(config, continuous_share=0.0, **shape)
    except UserError as error:
        raise UserError(
            f"--init-from {config.init_from} has a shape that is not trained here: {error}"
        ) from None
    logger.info("beginning with %s: %s", config.init_from, ", ".join(f"{k} {v}" for k, v in shape.items()))
    return shaped
