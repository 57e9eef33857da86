"""Id ranges of the grown vocabulary.

Text ids stay where the checkpoint has them. Six special tokens, `<pad>` and the image codes follow. For the paper:
50,432 text embeddings + 7 + 16,384 codes, padded to 66,824 (paper sec. 2.1).
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from t2i.errors import UserError

SPECIAL_TOKENS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")

KINDS = ("text", "image", "special")


@dataclass(frozen=True)
class VocabLayout:
    """Which ids are text, special tokens, padding and image codes. Codes become ids only here."""

    num_text_rows: int
    """Size of the language model's embedding, including embeddings that no token uses."""
    num_text_tokens: int
    """Ids that the text tokenizer can produce; ids from here to num_text_rows are never sampled."""
    codebook_size: int
    """Image codes; 0 for a plain language model."""
    multiple: int = 8
    """The vocabulary is padded to a multiple of this, because matrix products are faster then."""

    def __post_init__(self) -> None:
        if not 0 < self.num_text_tokens <= self.num_text_rows:
            raise UserError(
                f"the text tokenizer has {self.num_text_tokens} ids;"
                f" the language model has {self.num_text_rows} embeddings."
            )
        if self.codebook_size < 0 or self.multiple < 1:
            raise UserError(
                f"codebook_size is {self.codebook_size} and multiple {self.multiple}; expected >= 0 and >= 1."
            )

    def special_id(self, token: str) -> int:
        """Return the id of one of SPECIAL_TOKENS."""
        return self.num_text_rows + SPECIAL_TOKENS.index(token)

    @property
    def pad_id(self) -> int:
        """Id of `<pad>`, which is never a target."""
        return self.num_text_rows + len(SPECIAL_TOKENS)

    @property
    def first_image_id(self) -> int:
        """Id of image code 0."""
        return self.pad_id + 1

    @property
    def image_rows(self) -> range:
        """Ids of all image codes, in order of the codes."""
        return range(self.first_image_id, self.first_image_id + self.codebook_size)

    @property
    def vocab_size(self) -> int:
        """Size of the whole vocabulary, padded to the multiple."""
        used = self.first_image_id + self.codebook_size
        return -(-used // self.multiple) * self.multiple

    def image_ids(self, codes: Tensor) -> Tensor:
        """Map image codes to ids.

        Raises:
            ValueError: a code is outside the codebook.
        """
        _check_range("image code", codes, self.codebook_size)
        return codes + self.first_image_id

    def codes_of(self, ids: Tensor) -> Tensor:
        """Map ids back to image codes.

        Raises:
            ValueError: an id is not an image code.
        """
        codes = ids - self.first_image_id
        _check_range("image code", codes, self.codebook_size)
        return codes

    def check_text(self, ids: Tensor) -> Tensor:
        """Return `ids` unchanged if the text tokenizer can produce each of them.

        Raises:
            ValueError: it cannot.
        """
        _check_range("caption id", ids, self.num_text_tokens)
        return ids

    def is_text(self) -> Tensor:
        """Mark the ids that the text tokenizer can produce: (V,) bool."""
        return torch.arange(self.vocab_size) < self.num_text_tokens

    def is_special(self) -> Tensor:
        """Mark the six special tokens, without `<pad>`: (V,) bool."""
        ids = torch.arange(self.vocab_size)
        return (ids >= self.num_text_rows) & (ids < self.pad_id)

    def is_image(self) -> Tensor:
        """Mark the image codes: (V,) bool."""
        ids = torch.arange(self.vocab_size)
        return (ids >= self.first_image_id) & (ids < self.first_image_id + self.codebook_size)

    def unused_ids(self) -> list[int]:
        """List the ids that no token and no code uses: those after the text tokens, and those after the codes."""
        after_text = range(self.num_text_tokens, self.num_text_rows)
        return [*after_text, *range(self.first_image_id + self.codebook_size, self.vocab_size)]

    def to_dict(self) -> dict[str, int]:
        """Return the four numbers as config.json stores them."""
        return asdict(self)


def _check_range(kind: str, values: Tensor, end: int) -> None:
    if values.numel() and (values.min() < 0 or values.max() >= end):
        raise ValueError(
            f"found {kind}s from {int(values.min())} to {int(values.max())}; expected 0 to {end - 1}."
        )
