"""The shards and the model of a plan: read from disk if they exist, else assumed."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from t2i.config import EMBEDDED_SHARDS, EMBEDDED_VIEWS, ModelConfig, PlanConfig
from t2i.data.shards.manifest import MANIFEST, read_manifest
from t2i.errors import UserError
from t2i.model.backbone import random_model_config, read_model_config
from t2i.runs.loading import SHIPPED_MODEL, find
from t2i.tokens.vocab import VocabLayout
from t2i.verbs import command_line

CHARACTERS_A_TOKEN = 4.5
"""Characters per token of English captions, under a BPE of 50,000 tokens; a guess."""

KEY_BYTES, MDS_BYTES_A_PAIR = 12, 24
"""Bytes of a key, which is a guess, and of a pair's overhead in MDS, which a test measures."""


@dataclass(frozen=True)
class Data:
    """The facts about shards that a plan needs."""

    text_tokens: int
    """Number of ids of the text tokenizer."""
    codebook_size: int
    """0 for text shards."""
    codes_per_image: int
    num_pairs: int
    """Pairs in the training split."""
    shard_bytes: float
    are_made: bool
    """Whether the numbers are read from shards that exist, or assumed."""


def known_data(folder: Path, *, plan: PlanConfig) -> Data:
    """Read the facts of the shards in `folder`, or take the plan's assumptions if they are not made yet.

    Raises:
        UserError: the embedded shards are not made yet; the plan's assumptions do not fit them.
    """
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return Data(
            text_tokens=manifest.text_tokenizer.num_tokens,
            codebook_size=manifest.codebook_size,
            codes_per_image=manifest.codes_per_image,
            num_pairs=manifest.counts["train"],
            shard_bytes=sum(path.stat().st_size for path in folder.rglob("*.mds*")),
            are_made=True,
        )
    # They take a minute to make, and assumed numbers of a paper-sized set would say nothing about them.
    if folder == EMBEDDED_SHARDS:
        raise UserError(
            f"{folder} is not made yet: "
            + command_line(
                "prepare", "--source", "openmoji", "--views", str(EMBEDDED_VIEWS), "--out", str(folder)
            )
        )
    return Data(
        text_tokens=plan.text_vocab_size,
        codebook_size=plan.codebook_size,
        codes_per_image=plan.codes_per_image,
        num_pairs=plan.num_pairs,
        shard_bytes=plan.num_pairs * pair_bytes(plan),
        are_made=False,
    )


def pair_bytes(plan: PlanConfig) -> float:
    """Estimate the bytes per pair in a shard: its codes, its caption and the caption's ids."""
    caption = plan.caption_tokens * (CHARACTERS_A_TOKEN + _id_bytes(plan.text_vocab_size))
    return plan.codes_per_image * _id_bytes(plan.codebook_size) + caption + KEY_BYTES + MDS_BYTES_A_PAIR


def _id_bytes(num_values: int) -> int:
    return 2 if num_values <= 2**16 else 4


def is_there(init: str) -> bool:
    """Tell whether model.init exists on this disk, or comes with t2i."""
    return init != "random" and (init == SHIPPED_MODEL or Path(init).exists())


def model_config(
    config: ModelConfig, *, data: Data, seq_len: int, image_rows_only: bool = False
) -> PretrainedConfig:
    """Return the config of the model to be trained, image vocabulary included.

    It is model.init's if that exists here, else one of the given size.
    """
    model: PretrainedConfig
    if is_there(config.init):
        folder, _ = find(config.init)
        model = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    else:
        model = random_model_config(config, num_text_tokens=data.text_tokens, seq_len=seq_len)
    if data.codebook_size:
        rows = num_text_rows(model)
        # The tokenizer's own number of ids is not known here, and only the total matters to a plan.
        model.vocab_layout = VocabLayout(rows, rows, codebook_size=data.codebook_size).to_dict()
        # A model of text and images describes its parts apart.
        model.get_text_config(decoder=True).vocab_size = VocabLayout(**model.vocab_layout).vocab_size
        model.codes_per_image, model.image_rows_only = data.codes_per_image, image_rows_only
    return model


def num_text_rows(model: PretrainedConfig) -> int:
    """Count the text embeddings, which are all embeddings of a plain language model."""
    layout: dict[str, int] = getattr(model, "vocab_layout", None) or {}
    rows: int = layout.get("num_text_rows") or model.get_text_config(decoder=True).vocab_size
    return rows
