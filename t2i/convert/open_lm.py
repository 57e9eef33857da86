"""Convert open_lm checkpoints to our state dict and back.

Source: the checkpoints of https://github.com/mlfoundations/open_lm.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2i.convert.released import check_fit, plain_names
from t2i.errors import CheckpointError
from t2i.model.open_lm.attention_open_lm import ROTARY_BASE
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM

RELEASED_CONFIGS = {"mlfoundations/open_lm_1B open_lm_1b.pt": "open_lm_1b_old"}
"""The right config of a release; open_lm_1b has the same shapes but another positional embedding."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of all names by DistributedDataParallel, torch.compile and Hugging Face folders."""

WRAPPERS = ("state_dict", "av_model_sd")
"""Keys that hold the weights: of a training checkpoint, and of an averaged one (poly_*.pt, ema_*.pt)."""

INVERSE_FREQUENCIES = re.compile(r"layers\.\d+\.attention\.pos_embed\.inv_freq")


def open_lm_tensors(content: Mapping[str, object]) -> dict[str, object]:
    """Find the state dict in a training checkpoint, an averaged one or a folder; return it with open_lm's names."""
    inner = next((found for key in WRAPPERS if isinstance(found := content.get(key), Mapping)), content)
    return plain_names(inner, prefixes=PREFIXES)


def has_frequencies(tensors: Mapping[str, object]) -> bool:
    """Tell whether a checkpoint holds rotary frequencies: open_lm saves them for both rotary kinds, and no other."""
    return any(INVERSE_FREQUENCIES.fullmatch(name) for name in tensors)


def with_frequencies(tensors: Mapping[str, Tensor], *, config: OpenLMConfig) -> dict[str, Tensor]:
    """Add the rotary frequencies that were taken out of a checkpoint."""
    buffer = _frequencies(config)
    names = (f"layers.{layer}.attention.pos_embed.inv_freq" for layer in range(config.num_hidden_layers))
    return {**tensors, **dict.fromkeys(names, buffer)}


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
