"""The model that learns: made at random or loaded, its vocabulary grown by the image codes."""

import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from t2i.config import RunConfig
from t2i.data.shards.manifest import Manifest
from t2i.errors import UserError
from t2i.model.backbone import load_model, made_of, random_model_config
from t2i.model.control_init import scramble
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.resize import grow_vocabulary, never_generate, split_rows
from t2i.model.trainable import add_lora, set_learned
from t2i.runs.loading import DATA_MANIFEST, find
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


@dataclass(frozen=True)
class Start:
    """A language model before its vocabulary grows, and what its rows mean."""

    model: PreTrainedModel
    layout: VocabLayout
    """That of the rows which are kept."""
    num_kept: int
    """Rows that stay as they are."""


def build_model(
    config: RunConfig, *, manifest: Manifest, text_tokenizer: TextTokenizer
) -> tuple[PreTrainedModel, VocabLayout]:
    """Make the language model of config.model, grow it for the codes of `manifest`, freeze what does not learn.

    Shards of text alone need no codes: the model keeps the rows that it has.

    Raises:
        UserError: model.init is no CKPT, its tokenizer has more ids than it has rows, or settings contradict.
    """
    torch.manual_seed(config.train.seed)
    start = starting_model(config, manifest=manifest, text_tokenizer=text_tokenizer)
    model, layout = start.model, start.layout
    if start.num_kept < layout.vocab_size and not manifest.is_text:
        grow_vocabulary(model, vocab_size=layout.vocab_size, rows=config.model.rows, seed=config.train.seed)
        never_generate(model, [layout.pad_id, *layout.unused_ids()])
        model.config.vocab_layout = layout.to_dict()
        model.config.codes_per_image = manifest.codes_per_image
    model.config.image_rows_only = config.train.image_rows_only
    if config.train.image_rows_only and manifest.is_text:
        raise UserError("train.image_rows_only is set, but the shards hold no image codes.")
    model.config.sequence_mode, model.config.sequence_length = config.data.mode, config.data.seq_len
    _check_positions(model, config)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    choose_learned(model, config, num_kept=start.num_kept)
    return model, layout


def choose_learned(model: PreTrainedModel, config: RunConfig, *, num_kept: int) -> None:
    """Split new rows from the first num_kept where they learn in their own way, and freeze what does not learn.

    Raises:
        UserError: settings that contradict each other, or that leave nothing to learn.
    """
    settings, rank = config.train, config.model.lora_rank
    if rank < 0 or settings.l2_to_init < 0:
        raise UserError(
            f"model.lora_rank is {rank} and train.l2_to_init {settings.l2_to_init}; wanted is 0 or more."
        )
    if rank and config.model.learn != "all":
        raise UserError(
            f"model.lora_rank is {rank}: what learns is settled, but model.learn says {config.model.learn}."
        )
    has_new = model.config.vocab_size > num_kept
    if settings.new_rows_lr is not None and not has_new:
        raise UserError("train.new_rows_lr is set, but no row is new.")
    if has_new and (settings.new_rows_lr is not None or settings.l2_to_init or rank):
        split_rows(model, num_old=num_kept)
    set_learned(model, recipe=config.model.learn)
    if rank:
        add_lora(model, rank=rank)


def _check_positions(model: PreTrainedModel, config: RunConfig) -> None:
    """Let open_lm have as many positions as a sequence, which cost it nothing; hold others to what they have."""
    seq_len, found = config.data.seq_len, getattr(model.config, "max_position_embeddings", None)
    if isinstance(model.config, OpenLMConfig):
        model.config.max_position_embeddings = max(model.config.max_position_embeddings, seq_len)
    elif found is not None and found < seq_len:
        raise UserError(f"data.seq_len is {seq_len}; {config.model.init} was made for {found} positions.")


def starting_model(config: RunConfig, *, manifest: Manifest, text_tokenizer: TextTokenizer) -> Start:
    """Make or load the language model, scrambled if asked, with the rows that can be kept.

    All rows of a model that knows these very codes are kept; of one with other codes, those of text and markers.
    """
    model: PreTrainedModel
    if config.model.init == "random":
        if config.model.scramble != "none":
            raise UserError(f"model.scramble is {config.model.scramble}, but model.init is random.")
        model = _random_model(config, text_tokenizer)
    else:
        model = load_model(find(config.model.init)[0], dtype=torch.float32)
    codebook_size = manifest.codebook_size
    rows, num_kept = model.config.vocab_size, model.config.vocab_size
    known = getattr(model.config, "vocab_layout", None)
    if known is None:
        layout = VocabLayout(rows, num_text_tokens=text_tokenizer.num_tokens, codebook_size=codebook_size)
    else:
        layout = VocabLayout(**known)
        if not manifest.is_text and not _knows_codes(config.model.init, manifest):
            layout = VocabLayout(layout.num_text_rows, layout.num_text_tokens, codebook_size)
            num_kept = layout.first_image_id
            model.resize_token_embeddings(num_kept, mean_resizing=False)
    if config.model.scramble != "none":
        scramble(model, kind=config.model.scramble, seed=config.train.seed)
    return Start(model=model, layout=layout, num_kept=num_kept)


def _random_model(config: RunConfig, text_tokenizer: TextTokenizer) -> PreTrainedModel:
    num_text_tokens = text_tokenizer.num_tokens
    return made_of(
        random_model_config(config.model, num_text_tokens=num_text_tokens, seq_len=config.data.seq_len)
    )


def _knows_codes(name: str, manifest: Manifest) -> bool:
    """Tell whether a CKPT was trained on codes of the image tokenizer that made these shards."""
    folder, run_dir = find(name)
    file = (run_dir or folder) / DATA_MANIFEST
    if not file.is_file():
        return False
    trained_on = json.loads(file.read_text()).get("image_tokenizer", {})
    return bool(trained_on.get("fingerprint") == manifest.code_maker.fingerprint)
