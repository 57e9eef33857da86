"""Which classes can have image weights is found before the first step."""

import pytest
import torch
from backbones.tiny import tiny_config
from transformers import AutoModelForCausalLM

from t2i.errors import UserError
from t2i.model.routing import route


def drawn(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, vocab_size=64)).eval()


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("gemma3_text", "all"), ("qwen3_moe", "feed-forward"), ("mamba2", "feed-forward")],
)
def test_image_weights_that_a_class_cannot_have_are_refused_in_one_sentence(model_type, kind):
    with pytest.raises(UserError, match=f"model.image_weights is {kind}") as caught:
        route(drawn(model_type), kind=kind, rank=2, num_text_rows=40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("gemma3_text", "feed-forward"), ("qwen3", "all"), ("gemma3", "feed-forward")]
)
def test_image_weights_begin_as_copies_that_change_nothing(model_type, kind):
    model, routed = drawn(model_type), route(drawn(model_type), kind=kind, rank=0, num_text_rows=40)
    ids = torch.tensor([[1, 2, 3, 40, 41, 60, 63]])
    with torch.no_grad():
        # The same products of fewer rows each: fp32 rounding.
        torch.testing.assert_close(routed(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
