"""The model to train: randomly initialised or loaded, with its vocabulary grown by the image codes."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.config import DataConfig, ModelConfig, TrainConfig
from t2i.data.shards.manifest import Manifest
from t2i.errors import UserError
from t2i.files import read_json
from t2i.model.backbone import check_decoding, num_ids, num_positions
from t2i.model.growth_checks import check_reads, check_shapes, check_text_kept, text_logits
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.model.resize import end_at, grow_vocabulary, never_generate, split_rows
from t2i.model.routing import route, text_hash
from t2i.model.trainable import add_lora, recompute_activations, set_trainable
from t2i.model.uniform_start import Probe
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.new_embeddings import (
    FROM_SHARDS,
    begin_fairly,
    check_new_embeddings,
    first_sequences,
    kind_of,
    rows_from_shards,
)
from t2i.train.start import Start, starting_model

logger = logging.getLogger(__name__)


def build_model(
    config: ModelConfig,
    *,
    data: DataConfig,
    train: TrainConfig,
    manifest: Manifest,
    text_tokenizer: TextTokenizer,
    resumed: Path | None = None,
) -> tuple[PreTrainedModel, VocabLayout]:
    """Make the language model, grow it by the codes of `manifest`, and freeze what is not trained.

    Text-only shards need no codes: the vocabulary stays as it is.

    Args:
        resumed: the run's checkpoint whose weights will replace these; None at a run's start. What is measured at the
            start is then not measured again.

    Raises:
        UserError: model.init is no CKPT, its tokenizer has more ids than it has embeddings, or settings contradict.
        DataError: the shards lack what new embeddings are made from.
    """
    kind = kind_of(config, manifest=manifest)
    check_new_embeddings(kind, data=data, manifest=manifest)
    # Here and not earlier: what other code drew before must not change a randomly initialised model.
    torch.manual_seed(train.seed)
    start = starting_model(
        config, seq_len=data.seq_len, seed=train.seed, manifest=manifest, text_tokenizer=text_tokenizer
    )
    model, layout = start.model, start.layout
    if isinstance(model, RoutedForCausalLM) and config.image_weights == "none":
        # All would be trained, and the promise of its folder, that text stays as it is, would be broken.
        raise UserError(
            f"{config.init} has image weights; expected model.image_weights {model.config.image_weights}, not none."
        )
    if config.init != "random" and not manifest.is_text and data.mode != "text-only":
        check_decoding(model, name=config.init)  # now: after days of training it would be too late
    # open_lm's own class is known to keep its text.
    is_checked = not isinstance(model.config, OpenLMConfig) or config.image_weights != "none"
    before = text_logits(model, num_text_rows=layout.num_text_rows) if is_checked else None
    is_grown = start.num_kept < layout.vocab_size and not manifest.is_text
    if not is_grown and config.new_embeddings != "auto":
        logger.warning(
            "model.new_embeddings %s is not used: no embedding of %s is new.",
            *(config.new_embeddings, config.init),
        )
    if is_grown:
        _grow(
            start,
            config,
            kind=kind,
            data=data,
            tokenizer=text_tokenizer,
            seed=train.seed,
            resumes=resumed is not None,
        )
        # Padding and unused ids have logits like any other, so generate() could choose them.
        never_generate(model, [layout.pad_id, *layout.unused_ids()])
        model.config.vocab_layout = layout.to_dict()
        model.config.codes_per_image = manifest.codes_per_image
    if config.image_weights != "none":
        model = _routed(model, config, manifest=manifest, layout=layout, resumed=resumed)
    end_at(model, text_tokenizer.tokenizer)
    if train.image_vocab_only and manifest.is_text:
        raise UserError(
            "train.image_vocab_only is set; expected shards with image codes, but these hold text only."
        )
    # Written into config.json, so that sampling and measuring know later how the model was trained.
    model.config.image_rows_only = train.image_vocab_only
    model.config.sequence_mode, model.config.sequence_length = data.mode, data.seq_len
    _check_positions(model, seq_len=data.seq_len, name=config.init)
    if config.gradient_checkpointing:
        recompute_activations(model)
    if config.image_weights == "none":
        choose_learned(model, config, train=train, num_kept=start.num_kept)
    if before is not None:
        check_text_kept(model, before, name=config.init)
    # transformers opens a model for evaluation: it would recompute no activation, and drop nothing out, where the same
    # model drawn anew would.
    return model.train(), layout


def _grow(
    start: Start,
    config: ModelConfig,
    *,
    kind: str,
    data: DataConfig,
    tokenizer: TextTokenizer,
    seed: int,
    resumes: bool,
) -> None:
    """Give the model of a start its new embeddings."""
    model, layout = start.model, start.layout
    if resumes:
        # The checkpoint brings them. What they began as is not asked for again: L2-SP pulls to old weights alone.
        grow_vocabulary(model, vocab_size=layout.vocab_size, rows="random", seed=seed)
        return
    rows: str | Mapping[str, Tensor] = kind
    if kind in FROM_SHARDS:
        rows = rows_from_shards(kind, model, data=data, layout=layout, tokenizer=tokenizer, seed=seed)
    grow_vocabulary(model, vocab_size=layout.vocab_size, rows=rows, seed=seed)
    if not isinstance(model.config, OpenLMConfig):
        check_shapes(model, name=config.init)
        check_reads(model, range(start.num_kept, layout.vocab_size), name=config.init)
    # Drawn like the rest of a model that is drawn: there is nothing to compare with.
    if data.mode != "text-only" and (config.init, kind) != ("random", "random"):
        sequences = first_sequences(data, layout=layout, tokenizer=tokenizer)
        probe = Probe.of(sequences, layout=layout, num_old=start.num_kept)
        begin_fairly(
            model, kind, probe=probe, is_drawn=config.init == "random" or config.control_init == "fresh"
        )


def _routed(
    model: PreTrainedModel,
    config: ModelConfig,
    *,
    manifest: Manifest,
    layout: VocabLayout,
    resumed: Path | None,
) -> RoutedForCausalLM:
    """Route a grown model's image positions through weights of their own.

    Raises:
        UserError: the shards have no images, or the model cannot be routed.
    """
    if manifest.is_text:
        raise UserError(
            f"model.image_weights is {config.image_weights}; expected shards with image codes, but these hold text"
            " only."
        )
    routed = route(
        model, kind=config.image_weights, rank=config.lora_rank, num_text_rows=layout.num_text_rows
    )
    # By the run's own word where it has one: hashing takes seconds per billion weights.
    known = read_json(resumed / "config.json").get("text_hash") if resumed else None
    routed.config.text_hash = known or routed.config.text_hash or text_hash(routed)
    # Text is generated as before: no code or marker may be chosen, however likely training made it.
    never_generate(routed, list(range(layout.num_text_tokens, layout.vocab_size)))
    return routed


def choose_learned(model: PreTrainedModel, config: ModelConfig, *, train: TrainConfig, num_kept: int) -> None:
    """Split new embeddings from the first num_kept if they are trained differently, and freeze what is not trained.

    Raises:
        UserError: settings that leave nothing to train.
    """
    rank = config.lora_rank
    has_new = num_ids(model) > num_kept
    if train.new_embeddings_lr is not None and not has_new:
        raise UserError(
            f"train.new_embeddings_lr is {train.new_embeddings_lr}; expected None, because no embedding is new."
        )
    # One tensor has one learning rate and one requires_grad, so new embeddings must be a tensor of their own.
    if has_new and (train.new_embeddings_lr is not None or train.l2_sp or rank):
        split_rows(model, num_old=num_kept)
    set_trainable(model, recipe=config.trainable)
    if rank:
        add_lora(model, rank=rank)


def _check_positions(model: PreTrainedModel, *, seq_len: int, name: str) -> None:
    """Raise open_lm's number of positions to seq_len; refuse other models that have fewer."""
    found = num_positions(model)
    if isinstance(model.config, OpenLMConfig):
        # Rotary angles are computed for any position, so more of them cost no parameters.
        model.config.max_position_embeddings = max(model.config.max_position_embeddings, seq_len)
    elif found is not None and found < seq_len:
        raise UserError(f"data.seq_len is {seq_len}; expected <= {found}, the positions of {name}.")
