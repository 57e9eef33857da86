"""The text tokenizer: a Hugging Face fast tokenizer (such as GPT-NeoX-20B's) behind a small interface."""

import json
import shutil
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from t2i.errors import UserError, first_line
from t2i.files import HUB, hub_name, not_here, read_json, read_optional_json, values_sha256
from t2i.tokens.pieces import begin_texts, read_pieces, tokenizer_of_pieces

NEOX = "hf:EleutherAI/gpt-neox-20b"
"""Hub name of the tokenizer of every released open_lm model: 50,277 ids."""

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
"""Ids 0 and 1 of GPT-NeoX-20B's tokenizer and of those trained here."""

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
OLDER = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files that need the tokenizer's own class."""
MOST_SHOWN = 4

OPTIONS: dict[str, Any] = {
    # For a batch of prompts: a causal model continues from the last position.
    "padding_side": "left",
    # The class's default has token_type_ids too, which no causal model here takes and generate() refuses.
    "model_input_names": ["input_ids", "attention_mask"],
}
"""What every tokenizer here is opened with, whatever its files say; a saved one keeps it."""


DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>")
"""What ends a document in chat models whose end token ends a turn: Qwen's and SmolLM's, and Llama 3's."""

PROBE = "It's 1,234.5 kilometres: naïve 中文 🙂\n\tend  of it."
"""Text that a tokenizer should give back: digits, accents, wide characters and spaces."""


class TextTokenizer:
    """A frozen tokenizer that never produces special tokens from a caption."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        added = tokenizer.added_tokens_decoder.items()
        # An unknown character is text, and so is its token; _with_ends gives this name to the end token as well.
        unknown = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token
        self.special = {
            number: token.content for number, token in added if token.special and token.content != unknown
        }

    @classmethod
    def load(cls, name: Path | str) -> "TextTokenizer":
        """Open a folder with tokenizer.json or SentencePiece's tokenizer.model, or one of the hub (hf:USER/NAME).

        Raises:
            UserError: the folder or the hub has none.
        """
        if hub := hub_name(name):
            return cls(_with_ends(_from_hub(hub)), name=str(name))
        folder = Path(name)
        if (folder / JSON).is_file():
            return cls(_with_ends(_from_file(folder / JSON), folder=folder), name=str(name))
        if (folder / MODEL).is_file():
            return cls(_with_ends(_from_pieces(folder), folder=folder), name=str(name))
        missing = not_here(name) or f"it has neither {JSON} nor {MODEL}"
        if any((folder / file).is_file() for file in OLDER):
            missing += (
                ", but older files, of which transformers makes one: AutoTokenizer.from_pretrained(FOLDER)"
            )
            missing += ".save_pretrained(FOLDER)"
        raise UserError(f"{name} is no text tokenizer: {missing}.")

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
        vocabulary, end = self.tokenizer.get_vocab(), self.tokenizer.eos_token
        if end is None or self._ends_turns(end):
            end = next((token for token in DOCUMENT_ENDS if token in vocabulary), end)
        if end not in vocabulary:
            raise UserError(
                f"{self.name} has no end token: neither its eos_token, which is {end}, nor"
                f" {' or '.join(DOCUMENT_ENDS)} is in its vocabulary."
            )
        return int(vocabulary[end])

    @property
    def end_ids(self) -> list[int]:
        """Ids at which generated text ends: that of a document, and that of a turn where it is another."""
        turn = self.tokenizer.eos_token_id
        return [self.end_id] if turn in (None, self.end_id) else [self.end_id, turn]

    @property
    def start_ids(self) -> list[int]:
        """Ids that the tokenizer itself puts before each text, such as Llama's and Gemma's `<s>` and `<bos>`."""
        return list(takewhile(self.special.__contains__, self.tokenizer("a")["input_ids"]))

    def _ends_turns(self, end: str) -> bool:
        """Tell whether a chat template writes this token itself, as the end of each turn."""
        template = self.tokenizer.chat_template
        return end in (template if isinstance(template, str) else json.dumps(template or ""))

    def encode(self, text: str) -> Tensor:
        """Encode one caption to ids (T,), int64, without special tokens, even if it spells one."""
        # split_special_tokens: "<|endoftext|>" in a caption is text like any other.
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not self.special.keys().isdisjoint(ids):
            ids = [own for number in ids for own in self._spelled(number)]
        return torch.tensor(ids, dtype=torch.long)

    def _spelled(self, number: int) -> list[int]:
        """Return the ids that spell a special token as text; any other id alone."""
        if number not in self.special:
            return [number]
        # Unigram models hold special tokens as words too, and find them in a text. Cut in two, they do not.
        token, model = self.special[number], self.tokenizer.backend_tokenizer.model
        return [one.id for half in (token[:1], token[1:]) for one in model.tokenize(half)]

    def decode(self, ids: Tensor) -> str:
        """Map ids (T,) back to text."""
        # Many files ask for clean_up, which takes spaces before punctuation away.
        return str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def continuation(self, prompt: Tensor, ids: Tensor) -> str:
        """Map the ids that follow a prompt's to text, with the space between the two where there is one."""
        # Alone, their first space would be taken for the one that SentencePiece puts before each text.
        before, whole = self.decode(prompt), self.decode(torch.cat([prompt, ids]))
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(ids)

    def loss_of_text(self) -> str:
        """Say what the tokenizer makes of a text that it does not give back; empty if it gives it back."""
        found = self.decode(self.encode(PROBE))
        if found == PROBE:
            return ""
        return (
            f"the text tokenizer {self.name} does not give text back as it was: {PROBE!r} becomes {found!r}."
        )

    def check_rows(self, num_rows: int, *, model: str) -> None:
        """Check that a model has an embedding for each id.

        Raises:
            UserError: it has fewer; the tokens without one are named.
        """
        vocabulary = self.tokenizer.get_vocab()
        beyond = sorted((number, token) for token, number in vocabulary.items() if number >= num_rows)
        if not beyond:
            return
        shown = ", ".join(f"{token} ({number})" for number, token in beyond[:MOST_SHOWN])
        more = f" and {len(beyond) - MOST_SHOWN} more" if len(beyond) > MOST_SHOWN else ""
        raise UserError(
            f"the text tokenizer has {self.num_tokens} ids; {model} has {num_rows} embeddings. Without one:"
            f" {shown}{more}. Remove these tokens from the tokenizer's files, or give the model embeddings for them:"
            f" resize_token_embeddings({self.num_tokens})."
        )

    def fingerprint(self) -> str:
        """Hash the vocabulary and the merges (hex SHA-256)."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return values_sha256(kept)


def _from_file(file: Path) -> PreTrainedTokenizerFast:
    # Named, because a tokenizer_config.json can name another file.
    given = {"tokenizer_file": str(file), **OPTIONS}
    try:
        if not file.with_name(CONFIG).is_file():
            return PreTrainedTokenizerFast(**given)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, trust_remote_code=False, **given)
        _settle_start(tokenizer, read_json(file.with_name(CONFIG), error=UserError))
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a broken file
        raise UserError(f"the text tokenizer {file.parent} cannot be read: {first_line(error)}") from error


def _settle_start(tokenizer: PreTrainedTokenizerFast, named: dict[str, Any]) -> None:
    """Put the start token before each text, or leave it out, as add_bos_token of tokenizer_config.json says.

    tokenizer.json may say otherwise: DeepSeek's has no start, which its class adds when it is opened.
    """
    wish, start = named.get("add_bos_token"), tokenizer.bos_token
    if start is None or tokenizer.backend_tokenizer.token_to_id(start) is None:
        return
    is_there = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if wish is True and not is_there:
        begin_texts(tokenizer.backend_tokenizer, start)
    if wish is False and is_there and _writes_start(str(named.get("tokenizer_class"))):
        tokenizer.backend_tokenizer.post_processor = None


def _writes_start(name: str) -> bool:
    """Tell whether a tokenizer's own class goes by add_bos_token, whatever tokenizer.json holds."""
    return hasattr(getattr(transformers, f"{name.removesuffix('Fast')}Fast", None), "update_post_processor")


def _from_pieces(folder: Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer of a tokenizer.model, with the names of special tokens that its folder gives."""
    try:
        pieces = read_pieces(folder / MODEL)
        made = tokenizer_of_pieces(pieces)
    except UserError:
        raise
    except Exception as error:  # tokenizers has no class of its own for what it cannot use
        raise UserError(f"the text tokenizer {folder / MODEL} is broken: {first_line(error)}") from error
    named = read_optional_json(folder / CONFIG, error=UserError)
    if named.get("add_bos_token") is False:
        made.post_processor = None
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / JSON
        made.save(str(file))
        for name in (CONFIG, "special_tokens_map.json", "chat_template.jinja"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, file.with_name(name))
        tokenizer = _from_file(file)
    for name, token in (("bos_token", pieces.bos), ("eos_token", pieces.eos)):
        if getattr(tokenizer, name) is None and token:
            setattr(tokenizer, name, token)
    return tokenizer


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **OPTIONS)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the hub gives no text tokenizer {HUB}{name}: {first_line(error)} A folder with tokenizer.json is taken"
            " too."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{HUB}{name} is a {type(tokenizer).__name__}; expected one with tokenizer.json.")
    return tokenizer


def _with_ends(tokenizer: PreTrainedTokenizerFast, *, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Set the end and padding tokens if the tokenizer's files do not name them; a model's own folder may know."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None and END_OF_TEXT in vocabulary:
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.unk_token = END_OF_TEXT
    if tokenizer.eos_token is None and folder is not None:
        ends = read_optional_json(folder / "config.json", error=UserError).get("eos_token_id")
        end = ends[0] if isinstance(ends, list) and ends else ends
        names = {number: token for token, number in vocabulary.items()}
        if isinstance(end, int) and end in names:
            tokenizer.eos_token = names[end]
    # GPT-NeoX-20B's own files name no padding token.
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = PADDING if PADDING in vocabulary else tokenizer.eos_token
    return tokenizer
