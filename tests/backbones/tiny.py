"""A tiny random model of any class that transformers maps: sizes are shrunk by the names of their fields."""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

WIDTH, LAYERS, HEADS, POSITIONS = 32, 2, 4, 128
IS_NEWEST = int(transformers.__version__.split(".")[0]) >= 5
SMALL: tuple[tuple[int, tuple[str, ...]], ...] = (
    (WIDTH, ("hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "model_dim", "embedding_dim",
             "word_embed_proj_dim", "attention_hidden_size", "lru_width", "hidden_dim", "input_embedding_size",
             "hidden_size_global", "cross_attention_hidden_size", "emb_dim", "d_embed", "output_dim",
             "adapter_in_dim", "adapter_out_dim", "adapter_input_size")),
    (48, ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "dim_ff",
          "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "feed_forward_size",
          "intermediate_size_mlp", "expert_ffn_hidden_size", "d_inner", "shared_intermediate_size",
          "dense_intermediate_size", "moe_shared_expert_intermediate_size", "encoder_intermediate_size")),
    (64, ("mamba_d_ssm", "encoder_hash_byte_group_vocab")),
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
              "num_encoder_layers", "num_decoder_layers", "num_hidden_groups")),
    (HEADS, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
             "decoder_attention_heads", "attention_heads", "num_encoder_attention_heads",
             "num_decoder_attention_heads", "n_routed_experts", "num_experts", "num_local_experts",
             "moe_num_experts", "num_routed_experts", "linear_num_key_heads", "linear_num_value_heads")),
    (2, ("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token",
         "num_selected_experts", "moe_top_k", "router_top_k", "moe_topk", "moe_k", "mtp_num_layers")),
    (1, ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "moe_layer_start_index")),
    (8, ("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "global_head_dim",
         "dim_head", "mamba_n_heads", "linear_key_head_dim", "linear_value_head_dim", "attention_head_dim",
         "expert_ffn_dim", "mamba_chunk_size", "chunk_size")),
    (4, ("rotary_dim",)),
    (16, ("q_lora_rank", "kv_lora_rank", "mamba_d_state", "state_size", "mamba_head_dim")),
    (POSITIONS, ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_source_positions",
                 "max_seq_len", "max_sequence_length")),
)  # fmt: skip
"""Sizes, and the names that fields of this size have."""
BY_NAME = {name: size for size, names in SMALL for name in names}
NEEDED: dict[str, Any] = {
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": HEADS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""What some classes leave empty, and cannot be made without."""
if not IS_NEWEST:
    NEEDED["rope_theta"] = 10_000.0
SWITCHES = {"is_decoder": True, "use_mamba_kernels": False}
"""Switches that make a class a decoder, and one that a processor can run."""
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
"""Lists with one kind for each layer."""
HYBRID = ["linear_attention", "full_attention"] if IS_NEWEST else ["mamba", "attention"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mega": {"bidirectional": False},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        },
        "audio_config": {"hidden_size": WIDTH, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4},
    "transfo-xl": {"cutoffs": [100, 200, 300], "div_val": 1},
    "xlm": {"causal": True, "pad_index": 0},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"num_hidden_layers": 4, "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 8},
}  # fmt: skip
"""Fields of a class, by its model_type, that a rule for all would get wrong."""
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
if IS_NEWEST:
    EXCEPTIONS |= {
        "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY}},
        "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
        "dory": {
            "num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "qwen4_exp_text": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
        "zamba": {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
            "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16,
        },
        "zamba2": {
            "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16,
            "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 8,
        },
    }  # fmt: skip


def tiny_config(model_type: str, *, vocab_size: int) -> PretrainedConfig:
    """Describe a tiny model of a type, with its class's own settings but for the sizes."""
    kind = CONFIG_MAPPING[model_type]
    switches = {name: value for name, value in SWITCHES.items() if name in kind().to_dict()}
    return kind(**{**_sizes(kind, vocab_size=vocab_size), **switches, **EXCEPTIONS.get(kind.model_type, {})})


def _sizes(kind: type[PretrainedConfig], *, vocab_size: int) -> dict[str, Any]:
    """Return the settings of a tiny model that differ from those of its class."""
    default = kind()
    values = default.to_dict()
    given: dict[str, Any] = {}
    for name, value in values.items():
        inner = vars(default).get(name)
        if isinstance(inner, PretrainedConfig):
            part = _sizes(type(inner), vocab_size=vocab_size)
            given[name] = {"model_type": inner.model_type, **part, **EXCEPTIONS.get(inner.model_type, {})}
        elif "vocab_size" in name and isinstance(value, int):
            given[name] = vocab_size
        elif name.endswith("token_id") and isinstance(value, int) and value >= vocab_size:
            given[name] = 0
        elif value is None and name in NEEDED:
            given[name] = NEEDED[name]
        elif name in BY_NAME and isinstance(value, int) and not isinstance(value, bool):
            given[name] = min(value, BY_NAME[name])
    given |= _one_layer_of_each_kind(values, given)
    if "kv_lora_rank" in values:  # keys are compressed for all heads together
        given["num_key_value_heads"] = HEADS
    return given


def _one_layer_of_each_kind(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Shorten lists of kinds of layers, so that each kind is there."""
    kinds = {name: list(dict.fromkeys(values[name])) for name in KINDS if isinstance(values.get(name), list)}
    count = max([LAYERS, *map(len, kinds.values())])
    lists = {name: [*found, *[found[-1]] * (count - len(found))] for name, found in kinds.items() if found}
    return {**lists, "num_hidden_layers": count} if lists and "num_hidden_layers" in given else lists
