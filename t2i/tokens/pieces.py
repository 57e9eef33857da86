"""SentencePiece vocabularies (Llama 2, Gemma, GGUF files) as tokenizers of the tokenizers package.

Neither the package sentencepiece nor the model's own class is needed: pieces, scores and kinds say all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from t2i.errors import UserError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Kinds of pieces, by SentencePiece's and GGUF's numbers; others are plain."""
UNIGRAM, BPE = 1, 2
"""SentencePiece's numbers of its kinds of model."""
SPACE = "▁"
"""What stands for a space inside pieces."""


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary."""

    texts: list[str]
    scores: list[float]
    """By which pairs are merged, best first (BPE), or the log-probability of each piece (Unigram)."""
    kinds: list[int]
    bos: str = ""
    """Token before each text; empty for none."""
    eos: str = ""
    is_unigram: bool = False
    adds_space: bool = True
    """A space is put before each text, so that its first word is a word like any other."""
    joins_spaces: bool = False
    """Several spaces become one, and those at the ends none."""
    charsmap: bytes = b""
    """Compiled rules that replace characters; empty for none."""

    def __post_init__(self) -> None:
        counts = len(self.texts), len(self.scores), len(self.kinds)
        if len(set(counts)) > 1:
            raise ValueError(
                f"it has {counts[0]} pieces, {counts[1]} scores and {counts[2]} kinds; expected as many"
            )
        if UNKNOWN not in self.kinds:
            raise ValueError("none of its pieces is for what no piece holds")


def read_pieces(file: Path) -> Pieces:
    """Read a tokenizer.model.

    Raises:
        UserError: it is no SentencePiece model of BPE or Unigram.
    """
    # Made by protobuf as the module is imported.
    model = cast(Any, sentencepiece).ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        model.Clear()
    # Text too may be read as a message without pieces: Llama 3's file of this name is one of tiktoken's.
    if not model.pieces:
        raise UserError(f"{file} is no SentencePiece model; expected one, or a tokenizer.json.")
    training, rules = model.trainer_spec, model.normalizer_spec
    if training.model_type not in (UNIGRAM, BPE):
        raise UserError(
            f"{file} is of SentencePiece's kind {training.model_type}; expected {UNIGRAM} (Unigram) or {BPE} (BPE)."
        )
    return Pieces(
        texts=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        kinds=[piece.type for piece in model.pieces],
        bos=training.bos_piece if training.bos_id >= 0 else "",
        eos=training.eos_piece if training.eos_id >= 0 else "",
        is_unigram=training.model_type == UNIGRAM,
        adds_space=rules.add_dummy_prefix,
        joins_spaces=rules.remove_extra_whitespaces,
        charsmap=rules.precompiled_charsmap,
    )


def tokenizer_of_pieces(pieces: Pieces) -> Tokenizer:
    """Make a tokenizer that gives the ids which SentencePiece would."""
    made = Tokenizer(_unigram(pieces) if pieces.is_unigram else _bpe(pieces))
    made.normalizer = _normalizer(pieces)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.adds_space:
        decoding.append(decoders.Strip(content=" ", left=1))
    made.decoder = decoders.Sequence(decoding)
    for kind, special in ((UNKNOWN, True), (CONTROL, True), (USER_DEFINED, False)):
        found = [text for text, one in zip(pieces.texts, pieces.kinds, strict=True) if one == kind]
        # Runs of spaces are looked for before spaces have become SPACE. The merges find them as well.
        made.add_tokens(
            [
                AddedToken(text, special=special, normalized=False)
                for text in found
                if special or SPACE not in text
            ]
        )
    if pieces.bos:
        begin_texts(made, pieces.bos)
    return made


def begin_texts(tokenizer: Tokenizer, token: str) -> None:
    """Let a tokenizer put a token of its own before each text."""
    start = (token, tokenizer.token_to_id(token))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[start])


def _bpe(pieces: Pieces) -> models.BPE:
    ids = {text: number for number, text in enumerate(pieces.texts)}
    return models.BPE(
        vocab=ids,
        merges=_merges(pieces, ids),
        unk_token=_unknown(pieces),
        fuse_unk=True,
        byte_fallback=BYTE in pieces.kinds,
    )


def _merges(pieces: Pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """List all pairs of pieces that make a piece, the best piece first."""
    found = [
        (-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
        if kind not in (UNKNOWN, CONTROL, BYTE)
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _unigram(pieces: Pieces) -> models.Unigram:
    unknown = pieces.texts.index(_unknown(pieces))
    scored = list(zip(pieces.texts, pieces.scores, strict=True))
    return models.Unigram(scored, unk_id=unknown, byte_fallback=BYTE in pieces.kinds)


def _unknown(pieces: Pieces) -> str:
    return pieces.texts[pieces.kinds.index(UNKNOWN)]


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.joins_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    # Not a pre-tokenizer that adds the space: it adds none to a text that begins with one.
    if pieces.adds_space:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
