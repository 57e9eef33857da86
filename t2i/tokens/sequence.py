"""Sequences: caption ids and image codes joined by markers, and taken apart again.

text-to-image  <doc> <text> caption </text> <image> codes </image> </doc>   (paper sec. 2.1)
image-only     <doc> <image> codes </image> </doc>                           (paper, Figure 6)
text-only      <doc> <text> caption </text> </doc>
"""

import functools

import torch
from torch import Tensor

from t2i.config import Mode
from t2i.errors import UserError
from t2i.tokens.vocab import VocabLayout

IGNORED = -100
"""Label of a position that the loss does not count."""

USUAL_CAPTION = 30
"""Tokens of a caption (paper sec. 2.1)."""
NUM_MARKERS = {"text-to-image": 6, "image-only": 4, "text-only": 4}


def caption_room(*, mode: Mode, seq_len: int, num_codes: int) -> int:
    """Count the caption ids that fit in one sequence.

    Raises:
        UserError: seq_len is too small for the image codes.
    """
    markers, codes = NUM_MARKERS[mode], 0 if mode == "text-only" else num_codes
    room = seq_len - markers - codes
    if room < 0:
        needed = f"one image has {codes} codes, and " if codes else ""
        captioned = -(-(markers + codes + USUAL_CAPTION) // 8) * 8
        usual = f" `--data.seq-len {captioned}` leaves room for captions." if mode == "text-to-image" else ""
        raise UserError(
            f"data.seq_len is {seq_len}; expected at least {markers + codes}: {needed}{markers} markers surround it."
            f"{usual}"
        )
    return room


def encode_sequence(
    caption_ids: Tensor, codes: Tensor, *, layout: VocabLayout, mode: Mode, seq_len: int
) -> Tensor:
    """Build one sequence of ids, padded with `<pad>`: (S,) int64.

    A caption that is too long is truncated; an image never is.

    Args:
        caption_ids: (T,) ids of the text tokenizer; empty for the null caption.
        codes: (K,) image codes.

    Raises:
        ValueError: an id or a code is out of range, or the image does not fit.
    """
    room = caption_room(mode=mode, seq_len=seq_len, num_codes=len(codes))
    # Checked, so that no caption can hold a marker's id, however it spells one.
    text = layout.check_text(caption_ids.long())[:room]
    image = layout.image_ids(codes.long())
    ids = {
        "text-to-image": [*_text(text, layout), *_image(image, layout)],
        "image-only": _image(image, layout),
        "text-only": _text(text, layout),
    }[mode]
    body = torch.cat([_marker("<doc>", layout), *ids, _marker("</doc>", layout)])
    return torch.nn.functional.pad(body, (0, seq_len - len(body)), value=layout.pad_id)


def decode_sequence(ids: Tensor, *, layout: VocabLayout) -> tuple[Tensor, Tensor]:
    """Extract caption ids (T,) and codes (K,) from one sequence of any mode."""
    caption_ids = _between(ids, layout.special_id("<text>"), layout.special_id("</text>"))
    image_ids = _between(ids, layout.special_id("<image>"), layout.special_id("</image>"))
    return layout.check_text(caption_ids), layout.codes_of(image_ids)


def prompt(caption_ids: Tensor, *, layout: VocabLayout, mode: Mode = "text-to-image") -> Tensor:
    """Build the prompt before the first image code: <doc> <text> caption </text> <image>."""
    text = [] if mode == "image-only" else _text(layout.check_text(caption_ids.long()), layout)
    return torch.cat([_marker("<doc>", layout), *text, _marker("<image>", layout)])


def next_token_labels(input_ids: Tensor, *, layout: VocabLayout) -> Tensor:
    """Shift ids (B, S) to next-token labels (B, S); labels of `<pad>` and of the last position are IGNORED."""
    labels = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=layout.pad_id)
    return labels.masked_fill(labels == layout.pad_id, IGNORED)


@functools.cache  # a sequence has six markers, and making their tensors took a third of its time
def _marker(token: str, layout: VocabLayout) -> Tensor:
    return torch.tensor([layout.special_id(token)])


def _text(ids: Tensor, layout: VocabLayout) -> list[Tensor]:
    return [_marker("<text>", layout), ids, _marker("</text>", layout)]


def _image(ids: Tensor, layout: VocabLayout) -> list[Tensor]:
    return [_marker("<image>", layout), ids, _marker("</image>", layout)]


def _between(ids: Tensor, start: int, end: int) -> Tensor:
    """Return the ids between two markers; empty if they are absent."""
    starts, ends = (ids == start).nonzero().flatten(), (ids == end).nonzero().flatten()
    if not len(starts):
        return ids[:0]
    if len(starts) != 1 or len(ends) != 1 or ends[0] < starts[0]:
        raise ValueError(
            f"a sequence has markers {start} and {end} {len(starts)} and {len(ends)} times; expected once each."
        )
    return ids[starts[0] + 1 : ends[0]]
