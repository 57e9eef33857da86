"""Encode captioned pictures, or documents, into shards, once.

Examples:
  python launchers/prepare.py --source openmoji --out data/openmoji64
  python launchers/prepare.py --source my_pictures --out data/mine
  python launchers/prepare.py --source text:docstrings --out data/docstrings --seq-len 96
  python launchers/prepare.py --check data/mine

A killed preparation goes on with the same command; one of documents begins anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from t2i.cli import parse
from t2i.config import ASSETS, PrepareConfig
from t2i.errors import UserError, run_command


@dataclass(frozen=True)
class PrepareCommand:
    """What to encode, with what, to where."""

    source: str = "openmoji"
    """`openmoji`, a folder with .txt captions, or a folder with metadata.jsonl or metadata.csv. For text-only
    training: text:docstrings, text:FILE.txt, text:FOLDER or text:NAME of a Hugging Face dataset."""
    out: Path | None = None
    """Folder of the shards."""
    check: Path | None = None
    """Only read this shard folder whole, and report."""
    image_tokenizer: Path = ASSETS / "image_tokenizer"
    """diffusers VQModel folder."""
    text_tokenizer: Path = ASSETS / "text_tokenizer"
    """Folder with tokenizer.json."""
    heldout_share: float = 0.02
    """Share of a folder's pictures, or of documents, that training never sees; openmoji has its own rule."""
    seq_len: int = 96
    """Tokens a sequence of documents, which data.seq_len must equal."""
    shards: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


def main() -> None:
    command = parse(PrepareCommand, description=__doc__ or "")
    if (command.out is None) == (command.check is None):
        raise UserError("give either --out DIR to prepare, or --check DIR to check.")
    from t2i.data.documents import PREFIX, open_documents
    from t2i.data.pairs import open_source
    from t2i.data.shards import check_shards, prepare, read_manifest
    from t2i.data.text_shards import check_text_shards, is_text, prepare_text
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer

    if command.check:
        check = check_text_shards if is_text(read_manifest(command.check)) else check_shards
        for split, count in check(command.check).items():
            print(f"{split}: {count} samples, all readable and in range")
        return
    assert command.out is not None
    text_tokenizer = TextTokenizer.load(command.text_tokenizer)
    if command.source.startswith(PREFIX):
        manifest = prepare_text(
            open_documents(command.source),
            out=command.out,
            text_tokenizer=text_tokenizer,
            seq_len=command.seq_len,
            heldout_share=command.heldout_share,
        )
        counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
        print(f"{command.out}: {counts} sequences of {command.seq_len} tokens.")
        return
    manifest = prepare(
        open_source(command.source, heldout_share=command.heldout_share),
        out=command.out,
        image_tokenizer=ImageTokenizer.load(command.image_tokenizer),
        text_tokenizer=text_tokenizer,
        config=command.shards,
    )
    counts = ", ".join(f"{count} {split}" for split, count in manifest["counts"].items())
    print(
        f"{command.out}: {counts}; {manifest['broken']} broken. Look at {command.out / 'reconstructions.png'}."
    )


if __name__ == "__main__":
    run_command(main)
