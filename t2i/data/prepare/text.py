"""Pack documents into shards for text-only training: ids joined by the tokenizer's end token, cut into sequences.

The shard folder has train/, heldout/ and a manifest without image keys. A sequence is text alone, without markers, as
language models are trained. The result is a plain language model.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from streaming import MDSWriter
from tqdm import tqdm

from t2i.data.prepare.arguments import Arguments, check_same, source_arguments, text_maker_of
from t2i.data.prepare.finish import save_text_tokenizer
from t2i.data.prepare.part_folder import (
    ARGUMENTS,
    RANKS,
    claimed,
    is_done,
    place_of,
    publish,
    read_arguments,
    saying_full_disk,
)
from t2i.data.shards.accounts import check_accounts
from t2i.data.shards.baselines import code_floors
from t2i.data.shards.manifest import Manifest, read_manifest, side_files
from t2i.data.shards.reader import read_split
from t2i.data.sources import Tally
from t2i.data.sources.documents import Documents
from t2i.data.sources.listing import Listing, make_listing
from t2i.errors import DataError, UserError
from t2i.files import HASH, hash_uniform, write_json
from t2i.tokens.text import TextTokenizer

FLOOR_SEQUENCES = 20_000
"""Sequences per split, from its start, that the count-based baselines are computed on."""


def splits_of(heldout_share: float) -> tuple[str, ...]:
    """List the splits that documents are packed into; with a share of 0 nothing is held out."""
    return ("train", "heldout") if heldout_share else ("train",)


@dataclass
class _Pack:
    """Ids of one split that do not fill a sequence yet, and counts of what was written."""

    seq_len: int
    ids: list[int] = field(default_factory=list)
    num_documents: int = 0
    num_sequences: int = 0

    def add(self, ids: list[int]) -> Iterator[list[int]]:
        """Add one document's ids and yield the sequences that are full."""
        self.num_documents += 1
        self.ids += ids
        whole = len(self.ids) // self.seq_len * self.seq_len
        for start in range(0, whole, self.seq_len):
            self.num_sequences += 1
            yield self.ids[start : start + self.seq_len]
        del self.ids[:whole]  # once: what is left of a long document is not copied for each sequence


def prepare_text(
    documents: Documents, *, out: Path, text_tokenizer: TextTokenizer, seq_len: int, heldout_share: float
) -> Manifest:
    """Pack documents into shards at `out` and return the manifest; a killed preparation starts over.

    Exact duplicates are left out. A document's split is decided by a hash of its text.

    Raises:
        UserError: `out` was made or begun with other arguments.
        DataError: the documents of a split do not fill one sequence.
    """
    listing = make_listing(documents.listing())
    arguments: dict[str, object] = {
        **source_arguments(documents.name, listing),
        "seq_len": seq_len,
        "heldout_share": heldout_share,
        "text_tokenizer": text_tokenizer.fingerprint(),
    }
    out = place_of(out)
    if is_done(out):
        manifest = read_manifest(out)
        check_same(out, manifest.arguments, arguments, listing=listing)
        return manifest
    part = out.with_name(out.name + ".part")
    with saying_full_disk(part), claimed(part, rank=0):
        if is_done(part):  # killed before it became `out`
            check_same(part, read_arguments(part), arguments, listing=listing)
        else:
            _begin_anew(part, arguments, listing)
            _pack(
                documents,
                part,
                text_tokenizer,
                arguments=arguments,
                seq_len=seq_len,
                heldout_share=heldout_share,
            )
    publish(part, out)
    return read_manifest(out)


def _begin_anew(part: Path, arguments: Arguments, listing: Listing) -> None:
    """Empty a folder of what an earlier start of this preparation has written.

    Raises:
        UserError: what is there is of another one, or of somebody else.
    """
    if (part / ARGUMENTS).exists():
        check_same(part, read_arguments(part), arguments, listing=listing)
    elif other := next((path for path in sorted(part.iterdir()) if path.name != RANKS), None):
        raise UserError(
            f"{part} has {other.name}, which is of no preparation of this kind, and would be replaced. Move it away, or"
            " choose another --out."
        )
    for old in part.iterdir():
        if old.is_dir() and old.name != RANKS:
            shutil.rmtree(old)
    listing.write(part)
    write_json(part / ARGUMENTS, arguments)


def _pack(
    documents: Documents,
    part: Path,
    text_tokenizer: TextTokenizer,
    *,
    arguments: Arguments,
    seq_len: int,
    heldout_share: float,
) -> None:
    """Write the shards and the manifest into an empty folder."""
    packs, tally, digest = _write(
        documents, part, text_tokenizer, seq_len=seq_len, heldout_share=heldout_share
    )
    for split, pack in packs.items():
        if not pack.num_sequences:
            raise DataError(
                f"{documents.name}: {pack.num_documents} {split} documents do not fill one sequence of {seq_len}"
                f" tokens. Use a smaller --seq-len, or another --heldout-share than {heldout_share:g}."
            )
    save_text_tokenizer(text_tokenizer, part)
    manifest = Manifest(
        source=documents.name,
        versions=documents.versions,
        gathered_sha256=digest,
        split_rule=f"sha256 of the document below {heldout_share} of its range is heldout",
        heldout_share=heldout_share,
        counts={split: pack.num_sequences for split, pack in packs.items()},
        documents={split: pack.num_documents for split, pack in packs.items()},
        seen=tally.seen,
        left_out=dict(tally.left_out),
        sequence_tokens=seq_len,
        text_tokenizer=text_maker_of(text_tokenizer),
        floors_nats=text_floors(part, splits=packs, num_tokens=text_tokenizer.num_tokens),
        files=side_files(part),
        arguments=arguments,
    )
    check_accounts(manifest, where=part)
    manifest.write(part)


def text_floors(folder: Path, *, splits: Iterable[str], num_tokens: int) -> dict[str, dict[str, float]]:
    """Compute the uniform, unigram and bigram baselines of each split, counted on train, in nats per token."""
    ids = {}
    for split in splits:
        samples = zip(range(FLOOR_SEQUENCES), read_split(folder, split), strict=False)
        ids[split] = np.stack([sample["caption_ids"] for _, sample in samples]).astype(np.int64)
    floors = code_floors(ids, codebook_size=num_tokens)
    # Without position_unigram: the positions of packed text mean nothing.
    kept = ("uniform", "unigram", "bigram")
    return {split: {name: values[name] for name in kept} for split, values in floors.items()}


def _write(
    documents: Documents, part: Path, tokenizer: TextTokenizer, *, seq_len: int, heldout_share: float
) -> tuple[dict[str, _Pack], Tally, str]:
    """Write both splits; return per split what was packed, what was left out, and the hash of all documents."""
    kind = "uint16" if tokenizer.num_tokens <= 2**16 else "uint32"
    columns = {"key": "str", "caption_ids": f"ndarray:{kind}"}
    packs = {split: _Pack(seq_len) for split in splits_of(heldout_share)}
    seen: set[bytes] = set()
    tally = Tally()
    digest = hashlib.sha256()
    # Once, because these look-ups build the whole vocabulary.
    start_ids, end_id = tokenizer.start_ids, tokenizer.end_id
    with ExitStack() as opened:
        writers = {
            split: opened.enter_context(MDSWriter(out=str(part / split), columns=columns, hashes=[HASH]))
            for split in packs
        }
        for text in tqdm(documents.texts, unit="document", desc="pack"):
            # Sixteen bytes per document are kept, not its text, which may not fit in memory.
            key = hashlib.sha256(text.encode()).digest()[:16]
            tally.seen += 1
            if key in seen:
                tally.left_out["a document that was there before"] += 1
                continue
            seen.add(key)
            digest.update(key)
            # By a hash of the text, so that a document keeps its split when others are added.
            split = "heldout" if hash_uniform(text) < heldout_share else "train"
            ids = [*start_ids, *tokenizer.encode(text).tolist(), end_id]
            for sequence in packs[split].add(ids):
                name = f"{split}-{packs[split].num_sequences:08d}"
                writers[split].write({"key": name, "caption_ids": np.array(sequence, dtype=kind)})
    return packs, tally, digest.hexdigest()
