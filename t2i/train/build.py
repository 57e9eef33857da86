"""The model to train: randomly initialised or loaded, with its vocabulary grown by the image codes."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from t2i.config import DataConfig, ModelConfig, TrainConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.shards.manifest import Manifest
from t2i.data.shards.reader import read_split
from t2i.errors import UserError
from t2i.files import read_json
from t2i.model.backbone import (
    check_decoding,
    check_head,
    load_model,
    made_of,
    random_model_config,
    read_model_config,
)
from t2i.model.control_init import control_init
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.model.resize import end_at, grow_vocabulary, never_generate, split_rows
from t2i.model.routing import route, text_hash
from t2i.model.trainable import add_lora, set_trainable
from t2i.model.uniform_start import NUM_SEQUENCES, Probe, code_cost, shift_to_uniform, uniform_cost
from t2i.runs.loading import DATA_MANIFEST, find, reading
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A language model before its vocabulary grows, and what its ids mean."""

    model: PreTrainedModel
    layout: VocabLayout
    """The vocabulary that the grown model will have."""
    num_kept: int
    """Ids from 0 whose embeddings and LM head stay as they are."""


def build_model(
    config: ModelConfig,
    *,
    data: DataConfig,
    train: TrainConfig,
    manifest: Manifest,
    text_tokenizer: TextTokenizer,
) -> tuple[PreTrainedModel, VocabLayout]:
    """Make the language model, grow it by the codes of `manifest`, and freeze what is not trained.

    Text-only shards need no codes: the vocabulary stays as it is.

    Raises:
        UserError: model.init is no CKPT, its tokenizer has more ids than it has embeddings, or settings contradict.
    """
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
    if start.num_kept < layout.vocab_size and not manifest.is_text:
        grow_vocabulary(model, vocab_size=layout.vocab_size, rows=config.new_embeddings_kind, seed=train.seed)
        if config.init != "random" and data.mode != "text-only":
            sequences = first_sequences(data, layout=layout, tokenizer=text_tokenizer)
            _begin_fairly(start, config.new_embeddings_kind, sequences=sequences)
        # Padding and unused ids have logits like any other, so generate() could choose them.
        never_generate(model, [layout.pad_id, *layout.unused_ids()])
        model.config.vocab_layout = layout.to_dict()
        model.config.codes_per_image = manifest.codes_per_image
    if config.image_weights != "none":
        model = _routed(model, config, manifest=manifest, layout=layout)
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
        model.gradient_checkpointing_enable()
    if config.image_weights == "none":
        choose_learned(model, config, train=train, num_kept=start.num_kept)
    return model, layout


def _routed(
    model: PreTrainedModel, config: ModelConfig, *, manifest: Manifest, layout: VocabLayout
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
    routed.config.text_hash = routed.config.text_hash or text_hash(routed)
    # Text is generated as before: no code or marker may be chosen, however likely training made it.
    never_generate(routed, list(range(layout.num_text_tokens, layout.vocab_size)))
    return routed


def choose_learned(model: PreTrainedModel, config: ModelConfig, *, train: TrainConfig, num_kept: int) -> None:
    """Split new embeddings from the first num_kept if they are trained differently, and freeze what is not trained.

    Raises:
        UserError: settings that leave nothing to train.
    """
    rank = config.lora_rank
    has_new = model.config.vocab_size > num_kept
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
    found = getattr(model.config, "max_position_embeddings", None)
    if isinstance(model.config, OpenLMConfig):
        # Rotary angles are computed for any position, so more of them cost no parameters.
        model.config.max_position_embeddings = max(model.config.max_position_embeddings, seq_len)
    elif found is not None and found < seq_len:
        raise UserError(f"data.seq_len is {seq_len}; expected <= {found}, the positions of {name}.")


def first_sequences(data: DataConfig, *, layout: VocabLayout, tokenizer: TextTokenizer) -> Tensor:
    """Build a few sequences (N, S) of the training split, evenly spread."""
    samples = list(read_split(data.shards, "train", num_samples=NUM_SEQUENCES, remote=data.remote))
    apply = tokenizer_to_apply(data, tokenizer=tokenizer)
    captions = [caption_ids_of(sample, tokenizer=apply) for sample in samples]
    return stack_sequences(samples, layout=layout, config=data, captions=captions)


def _begin_fairly(start: Start, kind: str, *, sequences: Tensor) -> None:
    """Bring new embeddings to the uniform cost if asked, and warn of others whose codes cost more."""
    probe = Probe.of(sequences, layout=start.layout, num_old=start.num_kept)
    if kind == "uniform":
        shift_to_uniform(start.model, probe)
    cost, uniform = code_cost(start.model, probe), uniform_cost(start.model)
    # A nat more is usual: logits of a random start differ from one another by about one.
    if not cost <= uniform + 1:
        logger.warning(
            "with model.new_embeddings %s an image code costs %.1f nats before the first step, and a uniform guess over"
            " the vocabulary %.1f: the first steps pay that debt. `uniform` begins without it, where the model allows.",
            kind,
            cost,
            uniform,
        )


def fresh_start(config: ModelConfig, *, manifest: Manifest, text_tokenizer: TextTokenizer) -> Start:
    """Make a model of model.init's architecture, drawn by its class's own rule, with the vocabulary that can be kept.

    Raises:
        UserError: model.init_std is given, and the class takes no deviation.
    """
    folder, _ = find(config.init)
    description = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    if config.init_std is not None:
        if not hasattr(description, "initializer_range"):
            raise UserError(
                f"model.init_std is {config.init_std}; expected None, because {type(description).__name__} draws by a"
                " rule without such a deviation."
            )
        description.initializer_range = config.init_std
    model = made_of(description, trust_remote_code=config.trust_remote_code)
    check_head(model, name=config.init)  # a loaded model has passed it
    return _kept_rows(model, knows_codes=False, manifest=manifest, text_tokenizer=text_tokenizer)


def starting_model(
    config: ModelConfig, *, seq_len: int, seed: int, manifest: Manifest, text_tokenizer: TextTokenizer
) -> Start:
    """Make or load the language model, as a control if asked, with the vocabulary that can be kept."""
    if config.control_init == "fresh":
        return fresh_start(config, manifest=manifest, text_tokenizer=text_tokenizer)
    if config.init != "random":
        start = loaded_start(
            config.init,
            manifest=manifest,
            text_tokenizer=text_tokenizer,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        size = random_model_config(config, num_text_tokens=text_tokenizer.num_tokens, seq_len=seq_len)
        start = _kept_rows(made_of(size), knows_codes=False, manifest=manifest, text_tokenizer=text_tokenizer)
    if config.control_init != "none":
        control_init(start.model, kind=config.control_init, seed=seed)
    return start


def loaded_start(
    name: str, *, manifest: Manifest, text_tokenizer: TextTokenizer, trust_remote_code: bool
) -> Start:
    """Load a CKPT with the vocabulary that can be kept."""
    folder, run_dir = find(name)
    with reading(folder):
        # fp32 whatever the file holds: DeepSpeed's JSON says in which precision to train.
        model = load_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return _kept_rows(
        model,
        knows_codes=not manifest.is_text and _knows_codes(run_dir or folder, manifest),
        manifest=manifest,
        text_tokenizer=text_tokenizer,
    )


def _kept_rows(
    model: PreTrainedModel, *, knows_codes: bool, manifest: Manifest, text_tokenizer: TextTokenizer
) -> Start:
    """Cut off the embeddings and the LM head of ids that mean nothing for these shards.

    A model that was trained on these codes keeps all. One with other codes keeps those of text and markers.
    """
    rows, codebook_size = model.config.vocab_size, manifest.codebook_size
    known = getattr(model.config, "vocab_layout", None)
    if known is None:  # it has met no codes at all
        return Start(model, VocabLayout(rows, text_tokenizer.num_tokens, codebook_size), num_kept=rows)
    layout = VocabLayout(**known)
    if knows_codes or manifest.is_text:
        return Start(model, layout, num_kept=rows)
    if isinstance(model, RoutedForCausalLM):
        raise UserError(
            "model.init has image weights for other image codes; expected shards of the codes that it was trained on,"
            " or the language model that it began from."
        )
    layout = VocabLayout(layout.num_text_rows, layout.num_text_tokens, codebook_size)
    model.resize_token_embeddings(layout.first_image_id, mean_resizing=False)
    return Start(model, layout, num_kept=layout.first_image_id)


def _knows_codes(home: Path, manifest: Manifest) -> bool:
    """Tell whether the model of a folder was trained on codes of the image tokenizer that made these shards."""
    file = home / DATA_MANIFEST
    if not file.is_file():
        return False
    # By fingerprint of the tokenizer's weights: two tokenizers may share a name and mean other images by a code.
    trained_on = read_json(file).get("image_tokenizer")
    return isinstance(trained_on, dict) and trained_on.get("fingerprint") == manifest.code_maker.fingerprint
