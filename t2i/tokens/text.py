"""Captions to ids: a Hugging Face fast tokenizer (GPT-NeoX-20B's layout) behind a small face."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from t2i.errors import UserError


class TextTokenizer:
    """A frozen byte-level BPE; captions can never produce special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Open a folder that holds tokenizer.json.

        Raises:
            UserError: there is none.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder} is no text tokenizer: it has no tokenizer.json.")
        return cls(PreTrainedTokenizerFast(tokenizer_file=str(file)), name=str(folder))

    @property
    def num_tokens(self) -> int:
        """One more than the largest id that a text can produce."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> Tensor:
        """Map one caption to ids (T,), int64, without special tokens, even where it spells one."""
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
