"""The model that learns: made at random or loaded, its vocabulary grown by the image codes."""

from pathlib import Path
from typing import Any

import torch

from t2i.config import ModelConfig, RunConfig
from t2i.errors import UserError
from t2i.model.configuration_open_lm import OpenLMConfig
from t2i.model.modeling_open_lm import OpenLMForCausalLM
from t2i.model.resize import grow_vocabulary, never_generate, split_rows
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


def build_model(
    config: RunConfig, *, manifest: dict[str, Any], text_tokenizer: TextTokenizer
) -> tuple[OpenLMForCausalLM, VocabLayout]:
    """Make the language model of config.model and grow it for the codes that `manifest` tells of.

    Raises:
        UserError: model.init is no open_lm folder, or the tokenizer has more ids than it has rows.
    """
    torch.manual_seed(config.train.seed)
    model = _language_model(config.model, text_tokenizer, config.data.seq_len)
    if model.config.vocab_layout is not None:
        raise UserError(
            f"model.init is {config.model.init}, which has image codes already; wanted is a language model."
        )
    layout = VocabLayout(
        num_text_rows=model.config.vocab_size,
        num_text_tokens=text_tokenizer.num_tokens,
        codebook_size=manifest["codebook_size"],
    )
    grow_vocabulary(model, vocab_size=layout.vocab_size, rows=config.model.rows, seed=config.train.seed)
    never_generate(model, [layout.pad_id, *layout.unused_ids()])
    model.config.vocab_layout = layout.to_dict()
    model.config.codes_per_image = manifest["codes_per_image"]
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, config.data.seq_len)
    if config.train.new_rows_lr is not None:
        split_rows(model, num_old=layout.num_text_rows)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, layout


def _language_model(config: ModelConfig, text_tokenizer: TextTokenizer, seq_len: int) -> OpenLMForCausalLM:
    if config.init != "random":
        if not (Path(config.init) / "config.json").is_file():
            raise UserError(
                f"model.init is {config.init}; wanted is `random` or a model folder with config.json."
            )
        return OpenLMForCausalLM.from_pretrained(config.init, dtype=torch.float32)
    return OpenLMForCausalLM(
        OpenLMConfig(
            vocab_size=-(-text_tokenizer.num_tokens // 8) * 8,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            norm_type=config.norm_type,
            qk_norm=config.qk_norm,
            max_position_embeddings=seq_len,
        )
    )
