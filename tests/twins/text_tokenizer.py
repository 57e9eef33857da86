"""A byte-level BPE made on the spot, of the structure of GPT-NeoX-20B's."""

import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from t2i.tokens.text import END_OF_TEXT, PADDING, TextTokenizer


def train_text_tokenizer(texts, *, vocab_size):
    """Train one on `texts`: NFC, `<|endoftext|>` and `<|padding|>` first."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(str(Path(folder) / "tokenizer.json"))
        return TextTokenizer.load(folder)
