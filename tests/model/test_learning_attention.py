import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2i.model import learning_attention
from t2i.model.open_lm.attention_open_lm import mix

SEEN = torch.ones(5, 5).tril().bool()[None, None]
MASKS = [None, SEEN, torch.zeros(5, 5).masked_fill(~SEEN, -1e9)]


def by_open_lm(parts, mask):
    return mix(*parts, mask, is_causal=mask is None)


def by_transformers(parts, mask):
    learning_attention.register()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(nn.Module(), *parts, mask, is_causal=mask is None)[0]


def heads(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(2, 4, 5, 8).bfloat16().to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attend", [by_open_lm, by_transformers])
def test_bf16_learns_by_the_gradients_of_fp32(attend, mask):
    narrow, wide = heads(), heads(torch.float32)
    is_number = mask is not None and mask.is_floating_point()
    mixed = attend(narrow, mask.bfloat16() if is_number else mask)
    wanted = attend(wide, mask)
    for one in (mixed, wanted):
        one.sum().backward()
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, wanted.bfloat16())
    for part, twin in zip(narrow, wide, strict=True):
        assert torch.equal(part.grad, twin.grad.bfloat16())


@pytest.mark.parametrize("attend", [by_open_lm, by_transformers])
def test_what_does_not_learn_stays_in_bf16(attend, monkeypatch):
    seen = []
    usual = nn.functional.scaled_dot_product_attention

    def sdpa(query, *args, **kwargs):
        seen.append(query.dtype)
        return usual(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
    attend([part.detach() for part in heads()], None)
    assert seen == [torch.bfloat16]
