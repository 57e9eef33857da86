"""Any Hugging Face causal language model as a backbone, loaded in its own class and checked.

A forward pass decides whether a backbone can be trained. A list of names would be wrong with transformers' next
release.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from t2i.config import ModelConfig
from t2i.errors import UserError, first_line
from t2i.model.class_form import check_decoding as check_decoding
from t2i.model.class_form import check_head as check_head
from t2i.model.class_form import head_of as head_of
from t2i.model.class_form import num_ids as num_ids
from t2i.model.foreign_folder import (
    UNUSABLE,
    read_description,
    read_generation,
    refuse_own_code,
    settle_generation,
)
from t2i.model.open_lm.class_reading_open_lm import reader_of
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.configuration_routed import RoutedConfig
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.modeling_routed import RoutedForCausalLM
from t2i.model.unpacked import unpacked
from t2i.tokens.image import ROUND_TRIP
from t2i.tokens.vocab import VocabLayout

OURS: dict[str, tuple[Any, Any]] = {
    OpenLMConfig.model_type: (OpenLMConfig, OpenLMForCausalLM),
    RoutedConfig.model_type: (RoutedConfig, RoutedForCausalLM),
}
"""Configuration and class of the model types that transformers does not have."""
SOFT_CAP = "attn_logit_softcapping"
"""What a configuration calls the cap of attention scores."""
QUANTISED, QUANTIZER = "quantization_config", "hf_quantizer"
"""Attributes of a quantised model's configuration, and of the model."""


def is_open_lm(folder: Path) -> bool:
    """Tell whether a folder holds a model of open_lm's class."""
    # By its own name: transformers has no open_lm, so AutoConfig would need remote code for it.
    return bool(read_description(folder).get("model_type") == OpenLMConfig.model_type)


def read_model_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json in its own class.

    Args:
        trust_remote_code: let the folder's own Python code run, where transformers does not know the model type.

    Raises:
        UserError: transformers does not know the model type, or it is the folder's own code, which is not trusted.
    """
    description = read_description(folder)
    kind = description.get("model_type")
    try:
        if kind in OURS:
            return cast(PretrainedConfig, OURS[kind][0].from_pretrained(folder))
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNUSABLE as error:
        refuse_own_code(folder, description)
        raise UserError(
            f"{folder} is no language model that transformers knows: its config.json has model_type {kind!r}"
            f" ({first_line(error)})."
        ) from error


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | Literal["stored"] = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in its own class, in fp32 unless asked otherwise; "stored" as its file has it.

    Raises:
        UserError: no causal language model, weights that do not fit config.json, code of its own, or logits that are
            more than hidden states times LM head.
    """
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    _keep_soft_caps(config)
    was_quantised = hasattr(config, QUANTISED)
    model: Any
    report: dict[str, Any]
    kind: Any = OURS.get(config.model_type, (None, AutoModelForCausalLM))[1]
    if not (trust_remote_code or config.model_type in OURS or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        refuse_own_code(folder, read_description(folder))
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype == "stored" else dtype,
            output_loading_info=True,
            generation_config=read_generation(folder, config),
            trust_remote_code=trust_remote_code,
        )
    except UserError:
        raise
    except UNUSABLE as error:
        raise UserError(f"{folder} is no causal language model: {first_line(error)}") from error
    # transformers only warns of missing weights, and initialises them randomly.
    strange = {key: names for key, names in report.items() if names}
    if strange:
        raise UserError(f"the weights of {folder} do not fit its config.json: {strange}.")
    if not (
        trust_remote_code or config.model_type in OURS or type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise UserError(
            f"{folder} holds a {config.model_type} model of several parts, and transformers cannot load its language"
            f" model alone ({type(model).__name__}) from a folder again. Choose a model of text alone."
        )
    if was_quantised and getattr(model, QUANTIZER, None) is None:
        model.to(model.dtype if dtype == "stored" else dtype)  # what was dequantised may be of another
    settle_generation(model, name=str(folder))
    if not isinstance(config, OpenLMConfig):
        check_head(model, name=str(folder))
    return cast(PreTrainedModel, model)


def made_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make a randomly initialised model, in fp32 as a loaded one is, whatever precision its configuration names.

    Raises:
        UserError: the configuration is of no causal language model, or of code that is not trusted.
    """
    _keep_soft_caps(config)
    # Drawn weights are plain ones, and a checkpoint of them must not be opened as quantised ones.
    for part in (config, config.get_text_config(decoder=True)):
        part.__dict__.pop(QUANTISED, None)
    if config.model_type in OURS:
        return cast(PreTrainedModel, OURS[config.model_type][1](config))
    try:
        made = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except UNUSABLE as error:
        raise UserError(
            f"a {config.model_type} model cannot be made as a causal language model: {first_line(error)}"
        ) from error
    return cast(PreTrainedModel, made)


def soft_cap_of(config: PretrainedConfig) -> float | None:
    """Return what a language model's attention scores are capped at; None for no cap."""
    return getattr(config.get_text_config(decoder=True), SOFT_CAP, None)


def _keep_soft_caps(config: PretrainedConfig) -> None:
    """Let attention be computed eagerly where its scores are capped, as in Gemma 2: SDPA would leave the cap out."""
    for part in (config, config.get_text_config(decoder=True)):
        is_capped = getattr(part, SOFT_CAP, None) is not None  # a stranger's part may be a plain dictionary
        if is_capped and part._attn_implementation in (None, "sdpa"):
            part._attn_implementation = "eager"


def check_trainable(model: PreTrainedModel, *, name: str) -> None:
    """Refuse quantised weights through which no gradient can be had.

    Raises:
        UserError: the model has such.
    """
    quantizer: Any = getattr(model, QUANTIZER, None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise UserError(
            f"{name} is quantised by {getattr(method, 'value', method)}, whose weights cannot be trained. Choose the"
            " folder of the model that it was made from, or dequantise it."
        )


def hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Compute the last hidden states (B, S, D) of ids (B, S); the LM head turns them into logits."""
    # No logits here: (B, S, V) would be most of a step's memory, so model/loss.py computes them in chunks.
    with nullcontext() if ClassForm.of(model).is_masked else unpacked():
        return cast(Tensor, reader_of(model)(input_ids, use_cache=False).last_hidden_state)


def trained_seq_len(model: PreTrainedModel) -> int:
    """Return the tokens per sequence in training; if config.json does not say, the model's number of positions.

    0 for a class without such a number.
    """
    return getattr(model.config, "sequence_length", None) or num_positions(model) or 0


SPARE_POSITIONS = 8
"""Rows that a class may keep beside those of its positions."""


def num_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions that config.json names; None for a class with any number of them."""
    # -1 is XLNet's word for any number.
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if found is not None and found > 0 else None


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a class that learns a vector for each, and has none beyond; else None."""
    found, words = num_positions(model), model.get_input_embeddings()
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and one is not words]
    of_positions = [one for one in tables if found and 0 <= one.num_embeddings - found <= SPARE_POSITIONS]
    if not of_positions or found is None:
        return None
    # RoBERTa's kind counts from behind its padding, within as many rows; OPT's kind has rows more for that.
    table = of_positions[0]
    return found - (
        table.padding_idx + 1 if table.padding_idx is not None and table.num_embeddings == found else 0
    )


def softmax_rows(model: PreTrainedModel, *, layout: VocabLayout) -> range | None:
    """Return the ids that the softmax of image codes was trained over: the image vocabulary, or None for all ids."""
    return layout.image_rows if getattr(model.config, "image_rows_only", False) else None


def known_layout(model: PreTrainedModel, *, name: str) -> VocabLayout | None:
    """Read the vocabulary layout of a model that knows image codes, from its config.json; None for any other model.

    Raises:
        UserError: it is not as t2i writes it, or of another vocabulary than the model has.
    """
    found = getattr(model.config, "vocab_layout", None)
    if found is None:
        return None
    try:
        layout = VocabLayout(**found)
        size = layout.vocab_size
    except TypeError as error:
        raise UserError(
            f"{name}: vocab_layout in config.json is {found!r:.200}; expected the four numbers that t2i writes there."
        ) from error
    if size != num_ids(model):
        raise UserError(
            f"{name}: vocab_layout in config.json is of {size} ids; expected {num_ids(model)}, the model's embeddings."
        )
    return layout


def weight_files(path: Path) -> list[Path]:
    """List the weight files of a checkpoint: the file itself, or those in a Hugging Face folder.

    Raises:
        UserError: there is no such file, or none in the folder.
    """
    if path.is_file():
        return [path]
    # Safetensors first: a folder with both has the same weights twice, and .bin files are pickles.
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        # An exported folder has the round trip of its image tokenizer beside its weights.
        # Mistral's folders have their weights a second time, in a file that transformers does not read.
        files = [file for file in path.glob(pattern) if not file.name.startswith("consolidated")]
        if files := sorted(file for file in files if file.name != ROUND_TRIP):
            return files
    raise UserError(f"{path} is no weight file, and no folder with .safetensors or pytorch_model.bin.")


def random_model_config(config: ModelConfig, *, num_text_tokens: int, seq_len: int) -> PretrainedConfig:
    """Describe a randomly initialised language model, its text vocabulary rounded up to a multiple of 8.

    Raises:
        UserError: sizes that do not divide, or an unknown norm.
    """
    # Rounded up: matmuls over the vocabulary are quicker at multiples of 8.
    sizes: dict[str, Any] = {
        "vocab_size": -(-num_text_tokens // 8) * 8,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": seq_len,
    }
    try:
        ours = OpenLMConfig(**sizes, norm_type=config.norm_type, qk_norm=config.qk_norm)
    except ValueError as error:
        raise UserError(f"model.*: {error}.") from error
    if config.family == "open_lm":
        return ours
    # As wide as open_lm, and with an LM head that is not tied, so that families differ by architecture, not by size.
    sizes |= {"intermediate_size": ours.intermediate_size, "num_key_value_heads": config.num_heads}
    return AutoConfig.for_model(config.family, **sizes, tie_word_embeddings=False)
