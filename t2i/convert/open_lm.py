"""Convert open_lm checkpoints to our state dict and back, and read open_lm's model configs by name or json.

Source: the checkpoints and json files of https://github.com/mlfoundations/open_lm.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.convert.released import check_fit, plain_names
from t2i.errors import CheckpointError, UserError
from t2i.files import read_json, read_yaml
from t2i.model.open_lm.attention_open_lm import ROTARY_BASE
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM

SIZES = {
    "open_lm_11m_v2": (96, 8, 4),
    "open_lm_25m": (192, 12, 12),
    "open_lm_41m": (288, 12, 12),
    "open_lm_79m_v2": (512, 8, 4),
    "open_lm_154m_v2": (576, 24, 8),
    "open_lm_410m": (1_024, 24, 16),
    "open_lm_830m": (1_536, 24, 16),
    "open_lm_1b": (2_048, 24, 16),
    "open_lm_7b": (4_096, 32, 32),
}
"""Published configs of open_lm: hidden_dim, n_layers, n_heads."""

DEFAULTS: dict[str, Any] = {
    "post_embed_norm": False,
    "weight_tying": False,
    "qk_norm": False,
    "ffn_type": "swiglu",
    "model_norm": "default_layer_norm",
    "positional_embedding_type": "rotary",
    "norm_eps": 1e-5,
    "moe_freq": 0,
    "attn_name": "auto",
}
"""Defaults of open_lm's command line for keys that a config lacks; a json with sizes only means rotary."""

SIZE_KEYS = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")
OTHER_NAMES = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}
"""Names in open_lm's Hugging Face folders -> names in its json."""

CONFIGS: dict[str, dict[str, Any]] = {
    name: dict(zip(SIZE_KEYS, (*size, 2_048, 50_432), strict=True)) for name, size in SIZES.items()
}
CONFIGS["open_lm_1b_old"] = CONFIGS["open_lm_1b"] | {"positional_embedding_type": "head_rotary"}
CONFIGS["open_lm_1b_swiglutorch"] = CONFIGS["open_lm_1b"] | {
    "model_norm": "gain_only_lp_layer_norm",
    "qk_norm": True,
    "ffn_type": "swiglu_torch",
    "positional_embedding_type": "rotary",
}

RELEASED_CONFIGS = {"mlfoundations/open_lm_1B open_lm_1b.pt": "open_lm_1b_old"}
"""The right config of a release; open_lm_1b has the same shapes but another positional embedding."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of all names by DistributedDataParallel, torch.compile and Hugging Face folders."""

INVERSE_FREQUENCIES = re.compile(r"layers\.\d+\.attention\.pos_embed\.inv_freq")


def read_config(name: str) -> OpenLMConfig:
    """Read a config by its published name or from a file (open_lm's json, params.txt, config.json).

    Raises:
        UserError: it is neither, or our model classes lack something in it.
    """
    if name in CONFIGS:
        return config_of(CONFIGS[name], source=name)
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--config is {name}; expected a file or one of {', '.join(CONFIGS)}.")
    is_json = file.suffix == ".json"
    values = read_json(file, error=UserError) if is_json else read_yaml(file, name=f"--config {file}")
    return config_of(values, source=name)


def config_of(values: Mapping[str, object], *, source: str) -> OpenLMConfig:
    """Convert open_lm's config to ours; missing keys have open_lm's defaults.

    Raises:
        UserError: a key is missing or contradicts another, or our model classes lack something in it.
    """
    values = _named(_flat(values), source=source)
    missing = [key for key in SIZE_KEYS if key not in values]
    if missing:
        raise UserError(f"config {source} has no {', '.join(missing)}.")
    known: dict[str, Any] = DEFAULTS | {
        key: value for key, value in values.items() if key in (*SIZE_KEYS, *DEFAULTS)
    }
    wanted = {"ffn_type": ("swiglu", "swiglu_torch"), "moe_freq": (0,)}
    for key, choices in wanted.items():
        if known[key] not in choices:
            raise UserError(
                f"config {source} has {key} {known[key]!r}; expected {' or '.join(map(str, choices))}."
            )
    if known["attn_name"] == "custom_attn":
        raise UserError(f"config {source} has attn_name 'custom_attn'; expected softmax attention.")
    try:
        return OpenLMConfig(
            vocab_size=known["vocab_size"],
            hidden_size=known["hidden_dim"],
            num_hidden_layers=known["n_layers"],
            num_attention_heads=known["n_heads"],
            max_position_embeddings=known["seq_len"],
            positional_embedding_type=known["positional_embedding_type"],
            norm_type=known["model_norm"],
            norm_eps=known["norm_eps"],
            qk_norm=known["qk_norm"],
            post_embed_norm=known["post_embed_norm"],
            tie_word_embeddings=known["weight_tying"],
        )
    except ValueError as error:
        raise UserError(f"config {source}: {error}.") from error


def _flat(values: Mapping[str, object]) -> dict[str, object]:
    """Flatten the nested form of a Hugging Face folder, and use the json's names.

    Raises:
        UserError: two names of one value disagree.
    """
    flat: dict[str, object] = {}
    nested = values.get("params_args_dict")
    for key, value in (nested if isinstance(nested, dict) and nested else values).items():
        name = OTHER_NAMES.get(key, key)
        if name in flat and flat[name] != value:
            raise UserError(
                f"a config has both {flat[name]!r} and {value!r} for {name}; expected one of them."
            )
        flat[name] = value
    return flat


def _named(values: dict[str, object], *, source: str) -> dict[str, object]:
    """Fill in the sizes of a run's values, which name a published config; that config's values win."""
    if "model" not in values or "hidden_dim" in values:
        return values
    name = Path(str(values["model"])).stem
    if name not in CONFIGS:
        raise UserError(f"config {source} names the unknown model {name}; give its json by --config.")
    return values | CONFIGS[name]


def open_lm_config(config: OpenLMConfig) -> dict[str, object]:
    """Convert our config to open_lm's json."""
    return {
        "hidden_dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "seq_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "post_embed_norm": config.post_embed_norm,
        "weight_tying": config.tie_word_embeddings,
        "qk_norm": config.qk_norm,
        "ffn_type": "swiglu",
        "model_norm": config.norm_type,
        "positional_embedding_type": config.positional_embedding_type,
    }


def open_lm_tensors(content: Mapping[str, object]) -> dict[str, object]:
    """Find the state dict in a training checkpoint, an averaged one or a folder; return it with open_lm's names."""
    inner = content.get("state_dict")
    return plain_names(inner if isinstance(inner, Mapping) else content, prefixes=PREFIXES)


def load_open_lm(tensors: Mapping[str, object], *, config: OpenLMConfig, source: Path) -> OpenLMForCausalLM:
    """Build our model on open_lm's tensors, without copying them.

    Raises:
        CheckpointError: names or shapes differ from the config's, or the rotary base differs.
    """
    frequencies = {name: value for name, value in tensors.items() if INVERSE_FREQUENCIES.fullmatch(name)}
    _check_frequencies(frequencies, config=config, source=source)
    kept = {name: value for name, value in tensors.items() if name not in frequencies}
    if config.tie_word_embeddings:
        kept.setdefault("output.weight", kept.get("tok_embeddings.weight"))
    # On the meta device, so that the weights exist once: those that were read.
    with torch.device("meta"):
        model = OpenLMForCausalLM(config)
    wanted = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    fitting = check_fit(kept, wanted, source=source)
    if config.tie_word_embeddings and not torch.equal(
        fitting["output.weight"], fitting["tok_embeddings.weight"]
    ):
        raise CheckpointError(f"{source} has two different matrices, but its config has weight_tying.")
    model.load_state_dict({_our_name(name): value for name, value in fitting.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def open_lm_state(tensors: Mapping[str, Tensor], *, config: OpenLMConfig) -> dict[str, Tensor]:
    """Convert our folder's tensors back to open_lm's state dict, with the rotary buffers."""
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        # A folder holds one of the two tied matrices; open_lm expects both.
        both = ("tok_embeddings.weight", "output.weight")
        state |= dict.fromkeys(both, next(state[name] for name in both if name in state))
    if config.positional_embedding_type != "none":
        buffer = _frequencies(config).to(state["tok_embeddings.weight"].dtype)
        for layer in range(config.num_hidden_layers):
            state[f"layers.{layer}.attention.pos_embed.inv_freq"] = buffer.clone()
    return state


def _our_name(name: str) -> str:
    return name if name == "output.weight" else f"model.{name}"


def _frequencies(config: OpenLMConfig) -> Tensor:
    """Return the rotary angles per position, computed in open_lm's order of operations: (head_dim / 2,)."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 1.0 / (ROTARY_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))


def _check_frequencies(buffers: Mapping[str, object], *, config: OpenLMConfig, source: Path) -> None:
    wanted = _frequencies(config)
    for name, buffer in buffers.items():
        if not isinstance(buffer, Tensor) or buffer.shape != wanted.shape:
            found = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
            raise CheckpointError(
                f"{source} does not fit: {name} has shape {found}, expected {tuple(wanted.shape)}."
            )
        # Buffers of a checkpoint cast to bf16 are rounded by up to one part in 256.
        if not torch.allclose(buffer.float(), wanted, rtol=2**-8, atol=0):
            raise CheckpointError(
                f"{source} has rotary frequencies of another base than {ROTARY_BASE:.0f} ({name})."
            )
