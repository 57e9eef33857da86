"""The text tokenizer: a Hugging Face fast tokenizer (such as GPT-NeoX-20B's) behind a small interface."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from t2i.errors import UserError
from t2i.files import HUB, hub_name, not_here

NEOX = "hf:EleutherAI/gpt-neox-20b"
"""Hub name of the tokenizer of every released open_lm model: 50,277 ids."""

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
"""Ids 0 and 1 of GPT-NeoX-20B's tokenizer and of those trained here."""

OPTIONS: dict[str, Any] = {
    # For a batch of prompts: a causal model continues from the last position.
    "padding_side": "left",
    # The class's default has token_type_ids too, which no causal model here takes and generate() refuses.
    "model_input_names": ["input_ids", "attention_mask"],
}
"""What every tokenizer here is opened with, whatever its files say; a saved one keeps it."""


class TextTokenizer:
    """A frozen byte-level BPE that never produces special tokens from a caption."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name

    @classmethod
    def load(cls, name: Path | str) -> "TextTokenizer":
        """Open a folder with tokenizer.json, or a tokenizer of the hub (hf:USER/NAME).

        Raises:
            UserError: the folder or the hub has none.
        """
        if hub := hub_name(name):
            return cls(_with_ends(_from_hub(hub)), name=str(name))
        file = Path(name) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{name} is no text tokenizer: {not_here(name) or 'it has no tokenizer.json'}.")
        return cls(_with_ends(_from_file(file)), name=str(name))

    @property
    def num_tokens(self) -> int:
        """One more than the largest id of the vocabulary."""
        # Not the number of tokens: ids may have gaps, and each needs its row.
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def end_id(self) -> int:
        """Id of the token that ends a document.

        Raises:
            UserError: the tokenizer names no end token, and its vocabulary has no `<|endoftext|>`.
        """
        vocabulary = self.tokenizer.get_vocab()
        end = self.tokenizer.eos_token or "<|endoftext|>"
        if end not in vocabulary:
            raise UserError(
                f"{self.name} has no end token: neither eos_token nor {end} is in its vocabulary."
            )
        return int(vocabulary[end])

    def encode(self, text: str) -> Tensor:
        """Encode one caption to ids (T,), int64, without special tokens, even if it spells one."""
        # split_special_tokens: "<|endoftext|>" in a caption is text like any other.
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def decode(self, ids: Tensor) -> str:
        """Map ids (T,) back to text."""
        return str(self.tokenizer.decode(ids.tolist()))

    def fingerprint(self) -> str:
        """Hash the vocabulary and the merges (hex SHA-256)."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _from_file(file: Path) -> PreTrainedTokenizerFast:
    # Named, because a tokenizer_config.json can name another file.
    given = {"tokenizer_file": str(file), **OPTIONS}
    try:
        if not file.with_name("tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(**given)
        return PreTrainedTokenizerFast.from_pretrained(file.parent, trust_remote_code=False, **given)
    except Exception as error:  # tokenizers has no class of its own for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the text tokenizer {file.parent} cannot be read: {reason:.300}") from error


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **OPTIONS)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"the hub gives no text tokenizer {HUB}{name}: {why}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{HUB}{name} is a {type(tokenizer).__name__}; expected one with tokenizer.json.")
    return tokenizer


def _with_ends(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Set the end and padding tokens if the tokenizer's files do not name them."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None and END_OF_TEXT in vocabulary:
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = END_OF_TEXT
    # GPT-NeoX-20B's own files name no padding token.
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = PADDING if PADDING in vocabulary else tokenizer.eos_token
    return tokenizer
