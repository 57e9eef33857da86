import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.errors import UserError
from t2i.tokens.vocab import SPECIAL_TOKENS, VocabLayout


def test_the_papers_vocabulary_has_66824_rows():
    layout = VocabLayout(num_text_rows=50_432, num_text_tokens=50_277, codebook_size=16_384)
    assert layout.vocab_size == 66_824
    assert layout.first_image_id == 50_439


def test_every_id_stands_where_the_layout_says():
    layout = VocabLayout(num_text_rows=40, num_text_tokens=37, codebook_size=17)
    markers = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>")
    assert [layout.special_id(token) for token in markers] == [40, 41, 42, 43, 44, 45]
    assert (layout.pad_id, layout.first_image_id) == (46, 47)
    assert layout.image_ids(torch.tensor([0, 16])).tolist() == [47, 63]
    assert layout.codes_of(torch.tensor([47, 63])).tolist() == [0, 16]
    assert [*layout.image_rows] == [*range(47, 64)]
    assert layout.vocab_size == 64
    assert layout.unused_ids() == [37, 38, 39]
    with_more = VocabLayout(num_text_rows=40, num_text_tokens=40, codebook_size=18)
    assert (with_more.vocab_size, with_more.unused_ids()) == (72, [65, 66, 67, 68, 69, 70, 71])


@given(st.integers(1, 50), st.integers(0, 20), st.integers(1, 40), st.integers(1, 64))
def test_ranges_partition_the_vocabulary(num_tokens, num_unused, codebook_size, multiple):
    layout = VocabLayout(num_tokens + num_unused, num_tokens, codebook_size, multiple)
    kinds = torch.stack([layout.is_text(), layout.is_special(), layout.is_image()])
    assert kinds.sum(0).max() == 1
    assert kinds.sum(1).tolist() == [num_tokens, len(SPECIAL_TOKENS), codebook_size]
    assert not kinds[:, layout.pad_id].any()
    assert layout.vocab_size % multiple == 0
    assert 0 <= layout.vocab_size - layout.first_image_id - codebook_size < multiple


def test_codes_and_caption_ids_out_of_range_are_errors():
    layout = VocabLayout(num_text_rows=10, num_text_tokens=8, codebook_size=4)
    with pytest.raises(ValueError, match="expected 0 to 3"):
        layout.image_ids(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="expected 0 to 7"):
        layout.check_text(torch.tensor([8]))
    with pytest.raises(ValueError, match="image code"):
        layout.codes_of(torch.tensor([layout.pad_id]))


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(UserError, match="text tokenizer has 11 ids; the language model has 10 embeddings"):
        VocabLayout(num_text_rows=10, num_text_tokens=11, codebook_size=4)
