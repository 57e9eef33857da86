"""Any Hugging Face causal language model as a backbone, loaded in its own class and checked.

A forward pass decides whether a backbone can be trained. A list of names would be wrong with transformers' next
release.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from t2i.config import ModelConfig
from t2i.errors import UserError
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.vocab import VocabLayout

HEAD_TOLERANCE = 1e-2
"""Maximum difference between logits and hidden states times LM head, relative to the largest logit."""


def is_open_lm(folder: Path) -> bool:
    """Tell whether a folder holds a model of open_lm's class."""
    # By its own name: transformers has no open_lm, so AutoConfig would need remote code for it.
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    return bool(kind == OpenLMConfig.model_type)


def read_model_config(folder: Path) -> PretrainedConfig:
    """Read config.json in its own class.

    Raises:
        UserError: transformers does not know the model type.
    """
    if is_open_lm(folder):
        return OpenLMConfig.from_pretrained(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError) as error:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        raise UserError(
            f"{folder} is no language model that transformers knows: its config.json has model_type {kind!r}."
        ) from error


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model in its own class; dtype None for transformers' own choice.

    Raises:
        UserError: no causal language model, weights that do not fit config.json, or logits that are more than hidden
            states times LM head.
    """
    given: dict[str, Any] = {"output_loading_info": True} | ({} if dtype is None else {"dtype": dtype})
    model: Any
    report: dict[str, Any]
    if is_open_lm(folder):
        model, report = OpenLMForCausalLM.from_pretrained(folder, **given)
    else:
        config = read_model_config(folder)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, **given)
        except (ValueError, OSError) as error:
            raise UserError(f"{folder} is no causal language model: {str(error).splitlines()[0]}") from error
        model, report = loaded
    # transformers only warns of missing weights, and initialises them randomly.
    strange = {key: names for key, names in report.items() if names}
    if strange:
        raise UserError(f"the weights of {folder} do not fit its config.json: {strange}.")
    if not is_open_lm(folder):
        check_head(model, name=str(folder))
    return cast(PreTrainedModel, model)


def made_of(config: PretrainedConfig) -> PreTrainedModel:
    """Make a randomly initialised model."""
    if isinstance(config, OpenLMConfig):
        return OpenLMForCausalLM(config)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Compute the last hidden states (B, S, D) of ids (B, S); the LM head turns them into logits."""
    # No logits here: (B, S, V) would be most of a step's memory, so model/loss.py computes them in chunks.
    return cast(Tensor, model.base_model(input_ids, use_cache=False).last_hidden_state)


def head_of(model: PreTrainedModel) -> Tensor:
    """Return the weight of the LM head (V, D), which for a tied model is that of the input embeddings."""
    return cast(Tensor, model.get_output_embeddings().weight)


def trained_seq_len(model: PreTrainedModel) -> int:
    """Return the tokens per sequence in training; if config.json does not say, the model's number of positions."""
    return int(model.config.sequence_length or model.config.max_position_embeddings)


def softmax_rows(model: PreTrainedModel, *, layout: VocabLayout) -> range | None:
    """Return the ids that the softmax of image codes was trained over: the image vocabulary, or None for all ids."""
    return layout.image_rows if getattr(model.config, "image_rows_only", False) else None


@torch.inference_mode()
def check_head(model: PreTrainedModel, *, name: str) -> None:
    """Compare a model's logits with hidden states times LM head, which is what loss and sampler compute.

    Raises:
        UserError: they differ (a bias, scaled or capped logits), or there is no LM head.
    """
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} ({type(model).__name__}) has no LM head that computes logits.")
    was_training = model.training
    model.eval()
    ids = torch.arange(8)[None] % model.config.vocab_size  # (1, 8): which ids does not matter
    logits = model(ids, use_cache=False).logits.float()
    product = (hidden_states(model, ids) @ head_of(model).T).float()
    model.train(was_training)
    difference = (logits - product).abs().max().item()
    # "not <=" instead of ">", so that nan is refused too.
    if not difference <= HEAD_TOLERANCE * max(1.0, logits.abs().max().item()):
        raise UserError(
            f"the logits of {name} ({type(model).__name__}) are not hidden states times LM head: they differ by"
            f" {difference:.1e}. Models with a bias there, or with scaled or capped logits, cannot be trained here."
        )


def weight_files(path: Path) -> list[Path]:
    """List the weight files of a checkpoint: the file itself, or those in a Hugging Face folder.

    Raises:
        UserError: there is no such file, or none in the folder.
    """
    if path.is_file():
        return [path]
    # Safetensors first: a folder with both has the same weights twice, and .bin files are pickles.
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(path.glob(pattern)):
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
