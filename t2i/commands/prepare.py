"""Encode captioned images, or documents, into shards.

Examples:
  python launchers/prepare.py --source openmoji --views 8 --out data/openmoji64
  python launchers/prepare.py --source 'cc3m/{00000..00331}.tar' --out data/cc3m --min-side 128 --workers 8
  torchrun --nproc-per-node 8 launchers/prepare.py --source coco:coco2014 --out data/coco --dtype bfloat16
  python launchers/prepare.py --source my_images --preview 8
  python launchers/prepare.py --source text:docstrings --out data/docstrings --seq-len 96
  python launchers/prepare.py --check data/mine

Run the same command to resume a killed preparation; one of documents starts again. docs/data.md has a command
for every source.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Le, Lt

from t2i.cli import parse
from t2i.config import ASSETS, PrepareConfig, SourceConfig
from t2i.errors import UserError

NUM_SHOWN = 8
GIVEN = "ids:"
"""Prefix of a source of precomputed codes, which takes no image tokenizer."""


@dataclass(frozen=True)
class PrepareCommand:
    """The source, the tokenizers and the shards."""

    source: str = "openmoji"
    """`openmoji`, a folder (.txt captions, metadata, tars or parquet), tars or parquet by path, {a..b} and *, a .csv or
    .jsonl that names images, coco:DIR, iconify:FOLDER of icon sets, a Hugging Face dataset (hf:USER/NAME or
    hf:FOLDER), or ids:DIR of precomputed tokens. For text-only training: text:docstrings, text:code,
    text:FILE.txt, text:FOLDER or text:hf:USER/NAME; text:shuffled:docstrings and so on for words in random order."""
    out: Path | None = None
    """New shard folder."""
    check: Path | None = None
    """Only check this shard folder: hash every file, read every sample, and decode eight of them."""
    preview: Annotated[int, Ge(0)] = 0
    """Only show so many images of the source as the model will see them: crop, decoded codes, caption ids."""
    sheet: Path = Path("sheet.png")
    """PNG file that --check and --preview draw. Only an older sheet is replaced."""
    image_tokenizer: Path = ASSETS / "image_tokenizer"
    """Image tokenizer: a diffusers VQModel folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the image tokenizer. The manifest says which share of codes equals float32's."""
    text_tokenizer: Path = ASSETS / "text_tokenizer"
    """Folder with tokenizer.json, such as that of the model to start from, or a hub name (hf:USER/NAME)."""
    heldout_share: Annotated[float | None, Ge(0), Lt(1)] = None
    """Share of images or documents that training never sees; None for 2%, or for more of fewer than 1,200 images: 24 of
    them, at most 40%. openmoji and COCO have their own rules; of icon sets it is the share of concepts, by default 10%.
    """
    seq_len: Annotated[int, Ge(1), Le(1_000_000)] = 96
    """Tokens per sequence of documents; training needs the same data.seq_len."""
    reading: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    shards: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


def main() -> None:
    command = parse(PrepareCommand, description=__doc__ or "")
    if [command.out is not None, command.check is not None, command.preview > 0].count(True) != 1:
        raise UserError("give one of --out DIR to prepare, --check DIR to check, --preview N to look.")
    from t2i.data.sources.documents import PREFIX

    if command.check:
        check(command.check, sheet=command.sheet)
    elif command.out and command.source.startswith(PREFIX):
        pack_documents(command, command.out)
    elif command.out:
        encode_images(command, command.out)
    else:
        preview_source(command)


def check(folder: Path, *, sheet: Path) -> None:
    from t2i.data.prepare.preview import check_sheet, save_sheet, show_shards
    from t2i.data.shards.accounts import account_lines
    from t2i.data.shards.manifest import read_manifest
    from t2i.data.shards.reader import check_shards

    check_sheet(sheet)
    for split, count in check_shards(folder).items():
        print(f"{split}: {count} samples, all readable and in range")
    manifest = read_manifest(folder)
    for line in account_lines(folder, manifest):
        print(line)
    if not manifest.has_image_tokenizer:
        return
    rows = show_shards(folder, num=NUM_SHOWN)
    save_sheet(rows, sheet)
    for row in rows:
        print(f"{row.caption}\n  {row.facts}")
    print(f"These {len(rows)}, decoded, beside their captions: {sheet}")


def open_text_tokenizer(command: PrepareCommand) -> Any:
    """Open the text tokenizer, and say if it does not give text back."""
    from t2i.tokens.text import TextTokenizer

    tokenizer = TextTokenizer.load(command.text_tokenizer)
    if said := tokenizer.loss_of_text():
        print(said)
    return tokenizer


def check_documents(command: PrepareCommand) -> None:
    """Refuse what would be ignored: settings of images, and more than one process."""
    from t2i.distributed.heartbeat import place_in_job

    groups = (command.reading, command.shards)
    chosen = [
        f"--{name.replace('_', '-')}"
        for group in groups
        for name, value in asdict(group).items()
        if value != getattr(type(group)(), name)
    ]
    if chosen:
        raise UserError(
            f"--source {command.source} has documents, not images; leave out {', '.join(chosen)}."
        )
    if (number := place_in_job()[1]) > 1:
        raise UserError(f"--source {command.source} is packed by one process; found {number}.")


def check_place(out: Path) -> None:
    """Refuse a place that shards cannot be written to; those that are there already may be on a read-only disk."""
    from t2i.data.prepare.part_folder import is_done, place_of
    from t2i.files import check_writable

    place = place_of(out)
    if not is_done(place):
        check_writable(place.parent)  # they are made beside it


def pack_documents(command: PrepareCommand, out: Path) -> None:
    from t2i.data.prepare.text import prepare_text
    from t2i.data.sources.documents import open_documents
    from t2i.data.sources.splits import USUAL_SHARE

    check_documents(command)
    check_place(out)
    manifest = prepare_text(
        open_documents(command.source),
        out=out,
        text_tokenizer=open_text_tokenizer(command),
        seq_len=command.seq_len,
        heldout_share=USUAL_SHARE if command.heldout_share is None else command.heldout_share,
    )
    counts = ", ".join(f"{count} {split}" for split, count in manifest.counts.items())
    print(f"{out}: {counts} sequences of {command.seq_len} tokens.")


def encode_images(command: PrepareCommand, out: Path) -> None:
    from t2i.data.prepare.advice import advice_lines
    from t2i.data.prepare.images import prepare
    from t2i.data.shards.accounts import account_lines
    from t2i.data.sources import open_source
    from t2i.distributed.heartbeat import place_in_job
    from t2i.env import keep_memory

    keep_memory()
    rank, world_size = place_in_job()
    check_place(out)
    # Before the source is listed, which may take minutes.
    image_tokenizer = None if command.source.startswith(GIVEN) else load_image_tokenizer(command)
    if image_tokenizer is not None:
        image_tokenizer.num_codes(command.shards.image_size)  # for its check
    text_tokenizer = open_text_tokenizer(command)
    source = open_source(command.source, heldout_share=command.heldout_share, config=command.reading)
    manifest = prepare(
        source,
        out=out,
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        config=command.shards,
        rank=rank,
        world_size=world_size,
    )
    if rank > 0:
        return
    counts = ", ".join(f"{count} {split}" for split, count in manifest.counts.items())
    print(f"{out}: {counts}; {manifest.broken} broken.")
    print(f"Licence of the images: {manifest.licence}.")
    if source.given is None:
        print(f"Look at {out / 'reconstructions.png'}.")
    for line in (
        *account_lines(out, manifest),
        *advice_lines(manifest, is_share_chosen=command.heldout_share is None),
    ):
        print(line)
    if command.dtype != "float32":
        print(f"{manifest.codes_equal_float32:.1%} of the codes of a sample equal float32's.")


def preview_source(command: PrepareCommand) -> None:
    from t2i.data.prepare.preview import LookedAt, check_sheet, preview, save_sheet
    from t2i.data.shards.accounts import reason_lines
    from t2i.data.sources import open_source

    check_sheet(command.sheet)
    source = open_source(command.source, heldout_share=command.heldout_share, config=command.reading)
    if source.given:
        raise UserError(f"{command.source} has no images to preview.")
    looked = LookedAt()
    looked.tally.add(source.tally)
    rows = preview(
        source,
        num=command.preview,
        looked=looked,
        image_tokenizer=load_image_tokenizer(command),
        text_tokenizer=open_text_tokenizer(command),
        config=command.shards,
    )
    save_sheet(rows, command.sheet)
    for row in rows:
        print(f"{row.caption}\n  {row.facts}")
    for kind, reasons in (
        ("left out", looked.tally.left_out),
        ("broken", looked.broken),
        ("kept, but changed", looked.tally.changed),
        ("files not read to their end", looked.tally.unread),
    ):
        for line in reason_lines(kind, reasons):
            print(line)
    print(f"Crops and their codes decoded, beside their captions: {command.sheet}. Nothing else was written.")


def load_image_tokenizer(command: PrepareCommand) -> Any:
    """Open it on this rank's GPU, if there is one."""
    import torch

    from t2i.tokens.image import ImageTokenizer

    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, command.dtype)
    return ImageTokenizer.load(command.image_tokenizer, device=device, dtype=dtype)
