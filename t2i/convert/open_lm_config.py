"""open_lm's model configs: by published name, from its JSON, a Hugging Face folder or a run's params.txt.

Source: https://github.com/mlfoundations/open_lm, whose model configs and command line these are.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from t2i.errors import UserError
from t2i.files import read_json, read_yaml
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig

Positions = Literal["rotary", "head_rotary", "none"]
POSITIONS = "positional_embedding_type"
SIZE_KEYS = ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size")

SIZES = {
    "open_lm_test_tiny": (96, 2, 2, 2_048, 50_432),
    "open_lm_11m_v2": (96, 8, 4, 2_048, 50_432),
    "open_lm_25m": (192, 12, 12, 2_048, 50_432),
    "open_lm_41m": (288, 12, 12, 2_048, 50_432),
    "open_lm_79m_v2": (512, 8, 4, 2_048, 50_432),
    "open_lm_154m_v2": (576, 24, 8, 2_048, 50_432),
    "open_lm_410m": (1_024, 24, 16, 2_048, 50_432),
    "open_lm_830m": (1_536, 24, 16, 2_048, 50_432),
    "open_lm_1b": (2_048, 24, 16, 2_048, 50_432),
    "open_lm_7b": (4_096, 32, 32, 2_048, 50_432),
    "11m": (192, 8, 4, 1_024, 66_816),
    "79m": (512, 8, 4, 1_024, 66_816),
    "154m": (576, 24, 8, 1_024, 66_816),
    "411m": (1_024, 24, 8, 1_024, 66_816),
    "1b": (2_048, 24, 16, 1_024, 66_816),
    "7b": (4_096, 32, 32, 1_024, 66_816),
    "quark_neox": (96, 12, 12, 2_048, 50_432),
    "aphid_neox": (488, 12, 12, 2_048, 50_432),
    "ant_neox": (768, 12, 12, 2_048, 50_432),
    "g3b_neox": (2_560, 32, 32, 2_048, 50_432),
    "m1b_tiktoken": (2_048, 24, 16, 2_048, 50_304),
    "l7b_llama": (4_096, 32, 32, 2_048, 32_000),
}
"""Published configs of open_lm that are sizes alone: SIZE_KEYS."""

DEFAULTS: dict[str, Any] = {
    "post_embed_norm": False,
    "weight_tying": False,
    "qk_norm": False,
    "ffn_type": "swiglu",
    "model_norm": "default_layer_norm",
    POSITIONS: "rotary",
    "norm_eps": 1e-5,
    "moe_freq": 0,
    "attn_name": "auto",
}
"""Defaults of open_lm's command line for keys that a config lacks."""

OTHER_NAMES = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}
"""Names in open_lm's Hugging Face folders -> names in its json."""

CONFIGS: dict[str, dict[str, Any]] = {
    name: dict(zip(SIZE_KEYS, sizes, strict=True)) for name, sizes in SIZES.items()
}
CONFIGS |= {
    "open_lm_1b_old": CONFIGS["open_lm_1b"] | {POSITIONS: "head_rotary"},
    "m1b_neox_rotary_old": CONFIGS["open_lm_1b"] | {"rotary_old": True},
    "l7b_neox_rotary_old": CONFIGS["open_lm_7b"] | {"rotary_old": True},
    "open_lm_1b_post_embed": CONFIGS["open_lm_1b"] | {"post_embed_norm": True},
    "open_lm_1b_swiglutorch": CONFIGS["open_lm_1b"]
    | {
        "model_norm": "gain_only_lp_layer_norm",
        "qk_norm": True,
        "ffn_type": "swiglu_torch",
        POSITIONS: "rotary",
    },
    "llama2_7b": CONFIGS["l7b_llama"]
    | {"seq_len": 4_096, POSITIONS: "llama_rotary", "model_norm": "rms_norm"},
    "open_lm_1b_geglu": CONFIGS["open_lm_1b"] | {"hidden_dim": 1_920, "ffn_type": "gemma_geglu"},
    "open_lm_1b_geglu_mqa": CONFIGS["open_lm_1b"] | {"ffn_type": "gemma_geglu"},
    "open_lm_7b_geglu": CONFIGS["open_lm_7b"] | {"hidden_dim": 3_840, "ffn_type": "gemma_geglu"},
    "ant_neox_moe": CONFIGS["ant_neox"] | {"moe_freq": 2},
    "aphid_neox_moe": CONFIGS["aphid_neox"] | {"moe_freq": 2},
}
"""Every published config of a transformer. Those that our class lacks something of are refused for that."""


def read_values(names: Sequence[str]) -> dict[str, Any]:
    """Read what configs say, each by its published name or from a file, in open_lm's names.

    Args:
        names: of the model, and of a run's params.txt if there is one, in any order. As in open_lm, what the model's
            config says wins over the run's flags.

    Raises:
        UserError: one is neither a name nor a file, or two names of one value disagree.
    """
    model: dict[str, Any] = {}
    run: dict[str, Any] = {}
    for name in names:
        is_run = Path(name).suffix == ".txt"
        (run if is_run else model).update(_flat(_read(name)))
    known = (*SIZE_KEYS, *DEFAULTS, "model", "rotary_old")
    values = {key: value for key, value in run.items() if key in known} | model
    named = Path(str(values.get("model", ""))).stem
    if values.get("model") and "hidden_dim" not in values:  # a run names its model's config
        if named not in CONFIGS:
            raise UserError(
                f"{' '.join(names)} names the unknown model {named}; give its JSON too: --config {named}.json"
                f" {' '.join(names)}."
            )
        values |= CONFIGS[named]
    if "rotary_old" in values:  # the flag's name before there were several kinds
        values.setdefault(POSITIONS, "head_rotary" if values.pop("rotary_old") else "rotary")
    return values


def read_config(name: str) -> OpenLMConfig:
    """Read one config by its published name or from a file; what it leaves out has open_lm's defaults.

    Raises:
        UserError: what read_values and config_of refuse.
    """
    return config_of(read_values([name]), source=name)


def _read(name: str) -> dict[str, Any]:
    if name in CONFIGS:
        return dict(CONFIGS[name])
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--config is {name}; expected a file or one of {', '.join(CONFIGS)}.")
    if file.suffix == ".json":
        return read_json(file, error=UserError)
    return _params(file) if file.suffix == ".txt" else read_yaml(file, name=f"--config {file}")


def _params(file: Path) -> dict[str, Any]:
    """Read params.txt: a line `name: value` per flag, values as Python prints them."""
    # Not as YAML: None would be a text there, 1e-05 too, and a path with a colon or a star an error.
    values: dict[str, Any] = {}
    for line in file.read_text(errors="replace").splitlines():
        key, colon, text = line.partition(": ")
        if not colon:
            continue
        try:
            values[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values[key.strip()] = text.strip()
    return values


def config_of(values: Mapping[str, Any], *, source: str) -> OpenLMConfig:
    """Convert open_lm's config to ours; missing keys have open_lm's defaults.

    Raises:
        UserError: a key is missing or contradicts another, or our model classes lack something in it.
    """
    values = _flat(values)
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
            positional_embedding_type=known[POSITIONS],
            norm_type=known["model_norm"],
            norm_eps=known["norm_eps"],
            qk_norm=known["qk_norm"],
            post_embed_norm=known["post_embed_norm"],
            tie_word_embeddings=known["weight_tying"],
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"config {source}: {error}.") from error


def decide_positions(
    *, stated: str | None, given: Positions | None, has_frequencies: bool, source: str
) -> str:
    """Decide how a checkpoint's positions are encoded, from what is said and from what its file shows.

    Args:
        stated: by its config; None if that leaves it out, as most do: it was a flag of open_lm's command line.
        given: by the user.
        has_frequencies: the file holds rotary frequencies, as both rotary kinds do and no other.

    Raises:
        UserError: nobody says, or what is said contradicts another word or the file.
    """
    shown = "rotary or head_rotary" if has_frequencies else "none (or llama_rotary, which is not supported)"
    holds = f"the file holds {'' if has_frequencies else 'no '}rotary frequencies, so they are {shown}"
    known = given or stated
    if given and stated and given != stated:
        raise UserError(f"--positions is {given}, but config {source} says {stated}.")
    if known is None:
        raise UserError(
            f"config {source} does not say how positions are encoded; {holds}. Give --positions, or the run's"
            " params.txt beside the config. open_lm's own default is rotary."
        )
    is_rotary = known in ("rotary", "head_rotary")
    # Only the user may know that the frequencies were taken out of a file.
    if has_frequencies != is_rotary and not (is_rotary and given):
        raise UserError(
            f"config {source} says positions are {known}, but {holds}. Give the right --config or --positions."
        )
    return known


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the nested form of a Hugging Face folder, and use the json's names.

    Raises:
        UserError: two names of one value disagree.
    """
    flat: dict[str, Any] = {}
    nested = values.get("params_args_dict")
    for key, value in (nested if isinstance(nested, dict) and nested else values).items():
        name = OTHER_NAMES.get(key, key)
        if name in flat and flat[name] != value:
            raise UserError(
                f"a config has both {flat[name]!r} and {value!r} for {name}; expected one of them."
            )
        flat[name] = value
    return flat


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
        "norm_eps": config.norm_eps,
        "positional_embedding_type": config.positional_embedding_type,
    }
