"""Captions to ids: a Hugging Face fast tokenizer (GPT-NeoX-20B's layout) behind a small face."""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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

    @property
    def end_id(self) -> int:
        """The id that ends a document.

        Raises:
            UserError: the vocabulary has no `<|endoftext|>` and the tokenizer names no end token.
        """
        vocabulary = self.tokenizer.get_vocab()
        end = self.tokenizer.eos_token or "<|endoftext|>"
        if end not in vocabulary:
            raise UserError(
                f"{self.name} has no end token: neither eos_token nor {end} is in its vocabulary."
            )
        return int(vocabulary[end])

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


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of the structure of GPT-NeoX-20B's: NFC, `<|endoftext|>` and `<|padding|>` first."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe), name="trained here")


def standard_library_texts() -> list[str]:
    """Gather English from this Python's standard library: the documentation strings of its top-level modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [text for path in sorted(folder.glob("*.py")) for text in documentation_strings(path)]


def documentation_strings(path: Path) -> list[str]:
    """Read the documentation strings of one Python file; a file that this Python cannot parse has none."""
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text]
