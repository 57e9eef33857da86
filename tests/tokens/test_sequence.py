import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.tokens.sequence import (
    IGNORED,
    caption_room,
    decode_sequence,
    encode_sequence,
    next_token_labels,
    prompt,
)
from t2i.tokens.vocab import VocabLayout

LAYOUT = VocabLayout(num_text_rows=40, num_text_tokens=33, codebook_size=16)
captions = st.lists(st.integers(0, 32), max_size=10).map(lambda ids: torch.tensor(ids, dtype=torch.long))
pictures = st.lists(st.integers(0, 15), min_size=4, max_size=4).map(torch.tensor)


DOC, END_DOC, TEXT, END_TEXT, IMAGE, END_IMAGE, PAD, CODE = range(40, 48)
FORMS = {
    "text-to-image": [
        DOC,
        TEXT,
        5,
        6,
        END_TEXT,
        IMAGE,
        CODE + 3,
        CODE,
        CODE + 15,
        CODE + 1,
        END_IMAGE,
        END_DOC,
    ],
    "image-only": [DOC, IMAGE, CODE + 3, CODE, CODE + 15, CODE + 1, END_IMAGE, END_DOC],
    "text-only": [DOC, TEXT, 5, 6, END_TEXT, END_DOC],
}


@pytest.mark.parametrize("mode", FORMS)
def test_a_sequence_is_these_ids(mode):
    given = {"layout": LAYOUT, "mode": mode, "seq_len": 14}
    ids = encode_sequence(torch.tensor([5, 6]), torch.tensor([3, 0, 15, 1]), **given)
    assert ids.tolist() == FORMS[mode] + [PAD] * (14 - len(FORMS[mode]))
    labels = next_token_labels(ids[None], layout=LAYOUT)[0]
    assert labels.tolist() == FORMS[mode][1:] + [IGNORED] * (15 - len(FORMS[mode]))


def test_a_prompt_is_what_stands_before_the_first_code():
    caption = torch.tensor([5, 6])
    assert prompt(caption, layout=LAYOUT).tolist() == [DOC, TEXT, 5, 6, END_TEXT, IMAGE]
    assert prompt(caption, layout=LAYOUT, mode="image-only").tolist() == [DOC, IMAGE]


@given(captions, pictures)
def test_text_to_image_round_trip(caption_ids, codes):
    ids = encode_sequence(caption_ids, codes, layout=LAYOUT, mode="text-to-image", seq_len=20)
    found_caption, found_codes = decode_sequence(ids, layout=LAYOUT)
    assert found_caption.tolist() == caption_ids.tolist()
    assert found_codes.tolist() == codes.tolist()


@given(captions, pictures)
def test_image_only_keeps_only_the_image(caption_ids, codes):
    ids = encode_sequence(caption_ids, codes, layout=LAYOUT, mode="image-only", seq_len=20)
    found_caption, found_codes = decode_sequence(ids, layout=LAYOUT)
    assert found_caption.numel() == 0
    assert found_codes.tolist() == codes.tolist()


@given(captions)
def test_text_only_keeps_only_the_caption(caption_ids):
    ids = encode_sequence(caption_ids, torch.zeros(4), layout=LAYOUT, mode="text-only", seq_len=20)
    found_caption, found_codes = decode_sequence(ids, layout=LAYOUT)
    assert found_caption.tolist() == caption_ids.tolist()
    assert found_codes.numel() == 0


def test_a_long_caption_loses_its_end_and_never_the_image():
    ids = encode_sequence(
        torch.arange(20), torch.tensor([3, 1, 2, 0]), layout=LAYOUT, mode="text-to-image", seq_len=14
    )
    caption_ids, codes = decode_sequence(ids, layout=LAYOUT)
    assert caption_ids.tolist() == [0, 1, 2, 3]
    assert codes.tolist() == [3, 1, 2, 0]


def test_a_sequence_too_short_for_the_image_is_refused():
    sentence = (
        "data.seq_len is 9; expected at least 10: one image has 4 codes, and 6 markers surround it."
        " `--data.seq-len 40` leaves room for captions."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        caption_room(mode="text-to-image", seq_len=9, num_codes=4)


def test_labels_are_the_next_tokens_and_padding_never_is_one():
    ids = encode_sequence(
        torch.tensor([5, 6]), torch.tensor([0, 1, 2, 3]), layout=LAYOUT, mode="text-to-image", seq_len=16
    )
    labels = next_token_labels(ids[None], layout=LAYOUT)[0]
    assert labels[:11].tolist() == ids[1:12].tolist()
    assert labels[11:].tolist() == [IGNORED] * 5


def test_the_prompt_is_how_the_sequence_begins():
    codes = torch.tensor([0, 1, 2, 3])
    for caption_ids in (torch.tensor([5, 6]), torch.tensor([])):
        ids = encode_sequence(caption_ids, codes, layout=LAYOUT, mode="text-to-image", seq_len=16)
        start = prompt(caption_ids, layout=LAYOUT)
        assert ids[: len(start)].tolist() == start.tolist()
        assert ids[len(start)] == LAYOUT.first_image_id
