"""What a model folder from elsewhere may not do: run its own code, name another model, fetch kernels from the hub.

transformers does all three when it opens a folder, and asks on stdin at most. So the folder is looked at before.
"""

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from t2i.errors import UserError, first_line
from t2i.files import read_json, read_optional_json

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
OWN_CODE = "auto_map"
"""The key of config.json that names classes in the folder's own Python files."""
UNUSABLE = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for folders that it cannot load; they have no common base class."""


def read_description(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder that transformers may open.

    Raises:
        UserError: it is no JSON, names attention kernels of the hub, or the folder holds adapters of another model.
    """
    config = read_json(folder / "config.json", error=UserError)
    refuse_adapters(folder)
    for name in attention_names(config):
        if name not in _attention_here():
            # A name with a slash would be fetched from the hub and run, and so would a flash attention that is missing.
            raise UserError(
                f"{folder}/config.json names the attention kernels {name!r}; expected one of"
                f" {', '.join(_attention_here())}. Remove the key attn_implementation from it."
            )
    return config


def refuse_adapters(folder: Path) -> None:
    """Refuse a folder with adapters, whose base transformers would load in place of the weights that lie there.

    Raises:
        UserError: there are any.
    """
    if not (folder / ADAPTER).exists():
        return
    base = read_json(folder / ADAPTER, error=UserError).get("base_model_name_or_path")
    raise UserError(
        f"{folder} holds adapters of {base!r} ({ADAPTER}); expected a whole model. Merge them into that model (peft:"
        " merge_and_unload) and give the merged folder."
    )


def attention_names(values: object, *, is_named: bool = False) -> Iterator[str]:
    """List the attention kernels that a description names, at any depth and for any part of the model."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from attention_names(value, is_named=is_named or "attn_implementation" in key)
    elif isinstance(values, list):
        for value in values:
            yield from attention_names(value, is_named=is_named)
    elif is_named and isinstance(values, str):
        yield values


def _attention_here() -> list[str]:
    flash = {
        "flash_attention_2": is_flash_attn_2_available(),
        "flash_attention_3": is_flash_attn_3_available(),
    }
    return [
        "eager",
        "sdpa",
        "flex_attention",
        *(name for name, is_installed in flash.items() if is_installed),
    ]


def refuse_own_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder whose classes are Python code of its own.

    Raises:
        UserError: config.json names such classes.
    """
    if named := config.get(OWN_CODE):
        classes = ", ".join(map(str, named.values())) if isinstance(named, dict) else str(named)
        raise UserError(
            f"{folder} is a model by its own Python code ({OWN_CODE} in config.json: {classes:.200}), which is not run."
            " Read that code; if you trust it, add --trust-remote-code (in training: --model.trust-remote-code)."
        )


def read_generation(folder: Path, config: Any) -> GenerationConfig:
    """Read a folder's defaults of generate(), or those that its config.json implies.

    Raises:
        UserError: the file holds values that transformers does not take.
    """
    # Given to from_pretrained, which would otherwise also run custom_generate/generate.py of a local folder, whatever
    # trust_remote_code says.
    values = read_optional_json(folder / GENERATION, error=UserError)
    file = folder / (GENERATION if values else "config.json")
    try:
        if values:
            found = GenerationConfig.from_dict(values)
        else:
            found = GenerationConfig.from_model_config(config)
            # transformers 5 leaves these out of a configuration.
            found.update(**read_description(folder))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not taken by transformers: {first_line(error)}. Mend or remove that file."
        ) from error
    found._from_model_config = False  # or generate() would make it anew from config.json
    return found


def settle_generation(model: PreTrainedModel, *, name: str) -> None:
    """Mend defaults of generate() that contradict each other, which transformers reads but refuses to save."""
    config, generation = model.config, model.generation_config
    if generation is None:
        return
    # What save_pretrained would move from config.json. Not public, and gone in transformers 5, which moves on reading.
    misplaced: dict[str, object] = getattr(config, "_get_non_default_generation_parameters", dict)()
    for key, value in misplaced.items():
        setattr(generation, key, value)
        setattr(config, key, None)
    reason = _contradiction(generation)
    if reason:
        generation.do_sample = True  # what a temperature without it is meant to say
    if reason and _contradiction(generation):
        ids = {key: value for key, value in generation.to_diff_dict().items() if key.endswith("_token_id")}
        model.generation_config = GenerationConfig(**ids)
    if reason:
        logger.warning(
            "the defaults of generate() of %s contradict each other and were mended: %s", name, reason
        )


def _contradiction(generation: GenerationConfig) -> str:
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return ""
