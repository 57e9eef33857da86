"""Whole sequences are read without a mask, and give what they give with one."""

import pytest
import torch
from backbones.tiny import IS_NEWEST, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from t2i.model.backbone import hidden_states
from t2i.model.class_form import check_head
from t2i.model.open_lm.class_reading_open_lm import reader_of
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.model.routing import route
from t2i.model.trainable import layers_of, recompute_activations
from t2i.model.unpacked import SEARCH, unpacked

IDS = torch.arange(2, 42).view(2, 20)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def masks_of(model):
    """Collect the masks that attention is given from now on."""
    found = []

    def keep(_, inputs, settings):
        found.append(settings["attention_mask"])

    for layer in layers_of(model):
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    return found


def with_gradients(model, read):
    """Return hidden states, and the gradients of a loss of them."""
    model.zero_grad()
    hidden = read(model)
    hidden.square().sum().backward()
    return [hidden.detach(), *(value.grad.clone() for value in model.parameters() if value.grad is not None)]


def plain(model):
    return reader_of(model)(IDS, use_cache=False).last_hidden_state


def kinds():
    routed = route(llama(), kind="feed-forward", rank=0, num_text_rows=40).train()
    recomputed = llama().train()
    recompute_activations(recomputed)
    return {"plain": llama().train(), "recomputed": recomputed, "routed": routed}


@pytest.mark.parametrize("kind", ["plain", "recomputed", "routed"])
def test_a_llama_is_read_without_a_mask_and_gives_the_same(kind):
    model = kinds()[kind]
    masks = masks_of(model)
    found = with_gradients(model, lambda model: hidden_states(model, IDS))
    assert len(masks) == (4 if kind == "recomputed" else 2) and masks == [None] * len(masks)
    expected = with_gradients(model, plain)
    assert len(found) > 2
    for one, other in zip(found, expected, strict=True):
        # Kernels with and without a mask sum in other orders: fp32 rounding of gradients of up to 100.
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_no_position_sees_a_later_one():
    model = llama().eval()
    changed = IDS.clone()
    changed[:, 12:] = 1
    with torch.no_grad():
        before, after = hidden_states(model, IDS), hidden_states(model, changed)
    # Attention of a later key is an exact zero, and what remains is summed in the same order.
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12:], after[:, 12:])


def test_a_class_that_needs_its_mask_keeps_it():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("doge", vocab_size=64)).eval()
    check_head(model, name="doge")
    assert ClassForm.of(model).is_masked != IS_NEWEST  # transformers 5 has mended it
    with torch.no_grad():
        # fp32 rounding.
        torch.testing.assert_close(hidden_states(model, IDS), plain(model), atol=1e-5, rtol=1e-4)


def test_transformers_own_search_is_there_again_whatever_ends_first():
    own = getattr(masking_utils, SEARCH)
    first, second = unpacked(), unpacked()
    first.__enter__()
    second.__enter__()
    assert getattr(masking_utils, SEARCH)(IDS) is None
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert getattr(masking_utils, SEARCH) is own
    with pytest.raises(KeyError), unpacked():
        raise KeyError
    assert getattr(masking_utils, SEARCH) is own
