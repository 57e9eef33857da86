"""Shards of images of noise, with captions of different lengths, and shards of text."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_shards(folder: Path, *, num_images: int, image_size: int = 64) -> Path:
    """Make images in a folder and prepare them; return the folder of the shards."""
    from t2i.config import ASSETS, PrepareConfig
    from t2i.data.prepare.images import prepare
    from t2i.data.sources import open_source
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer

    pictures, out = folder / "pictures", folder / "shards"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index in range(num_images):
        noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        noise.resize((64, 64)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"picture {index} " * rng.integers(1, 4))
    prepare(
        open_source(str(pictures), heldout_share=0.3),
        out=out,
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(image_size=image_size),
    )
    return out


def make_text_shards(
    documents, *, file: Path, out: Path, text_tokenizer, seq_len: int, heldout_share: float
) -> Path:
    """Write documents into a text file and pack them; return the folder of the shards."""
    from t2i.data.prepare.text import prepare_text
    from t2i.data.sources.documents import open_documents

    file.write_text("\n\n".join(documents))
    prepare_text(
        open_documents(f"text:{file}"),
        out=out,
        text_tokenizer=text_tokenizer,
        seq_len=seq_len,
        heldout_share=heldout_share,
    )
    return out
