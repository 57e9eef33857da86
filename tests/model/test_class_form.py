"""What a class does around its LM head is found by value, and loss and growth repeat it."""

import pytest
import torch
import torch.nn.functional as F
from backbones.tiny import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.errors import UserError
from t2i.model.backbone import hidden_states
from t2i.model.class_form import check_head, head_of
from t2i.model.growth_checks import check_reads, check_shapes, check_text_kept, text_logits
from t2i.model.loss import summed_loss
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.model.resize import grow_vocabulary, merged_state_dict, split_rows

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "vocab_size": 64}
FORMS = {
    "llama": ({}, ClassForm()),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 25.0}, ClassForm(cap=25.0)),
    "granite": ({"logits_scaling": 6.0}, ClassForm(scale=1 / 6)),
    "cohere": ({"logit_scale": 0.25}, ClassForm(scale=0.25)),
    "gptj": (GPTJ, ClassForm()),
    "bert": ({"is_decoder": True}, ClassForm(is_transformed=True)),
    "gemma3_text": ({"head_dim": 8, "query_pre_attn_scalar": 8}, ClassForm()),
}
IDS = torch.arange(3, 39).view(2, 18)


def made(kind):
    torch.manual_seed(0)
    changes = FORMS[kind][0]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(changes if kind == "gptj" else {**SIZES, **changes}))
    ).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    check_head(model, name=kind)
    return model


@pytest.mark.parametrize("kind", FORMS)
def test_the_loss_is_that_of_the_classs_own_logits(kind):
    model = made(kind)
    assert ClassForm.of(model) == FORMS[kind][1]
    assert (head_of(model).bias is not None) == (kind in ("gptj", "bert"))
    assert hasattr(model.config, "class_form") == (ClassForm.of(model) != ClassForm())
    with torch.no_grad():  # so large that a cap would show
        model.get_output_embeddings().weight.mul_(50)
    labels = IDS.roll(-1, 1)
    total, _, _ = summed_loss(hidden_states(model, IDS), labels, head=head_of(model))
    total.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    plain = F.cross_entropy(
        model(IDS, use_cache=False).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    plain.backward()
    assert total.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, value in model.named_parameters():
        # Sums of 36 terms in fp32, in another order.
        torch.testing.assert_close(found.get(name), value.grad, atol=1e-3, rtol=1e-4)


def test_logits_that_no_number_of_the_configuration_explains_are_refused():
    model = made("llama")
    plain = model.forward

    def strange(*inputs, **settings):
        outputs = plain(*inputs, **settings)
        outputs.logits = outputs.logits * 1.7
        return outputs

    model.forward = strange
    with pytest.raises(
        UserError, match=r"the logits of x \(LlamaForCausalLM\) are not hidden states times LM head, nor"
    ):
        check_head(model, name="x")


@pytest.mark.parametrize("kind", FORMS)
def test_text_logits_stay_when_the_vocabulary_grows_and_is_split(kind):
    model = made(kind)
    before = text_logits(model, num_text_rows=64)
    grow_vocabulary(model, vocab_size=80, rows="own", seed=0)
    check_text_kept(model, before, name=kind)
    check_head(model, name=kind)
    grown = text_logits(model, num_text_rows=80)
    if (bias := head_of(model).bias) is not None:
        assert (bias[64:] == bias[:64].mean()).all()
    split_rows(model, num_old=64)
    torch.testing.assert_close(text_logits(model, num_text_rows=80), grown, atol=1e-5, rtol=1e-5)
    again = AutoModelForCausalLM.from_config(model.config).eval()
    again.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(text_logits(again, num_text_rows=80), grown, atol=1e-5, rtol=1e-5)


def test_a_grown_model_that_gives_other_text_logits_is_refused():
    model = made("llama")
    before = text_logits(model, num_text_rows=64)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(UserError, match="gives other text logits once its vocabulary is grown"):
        check_text_kept(model, before, name="x")


def test_a_class_that_cannot_read_new_ids_or_load_again_is_refused():
    model = made("llama")
    check_reads(model, range(32, 64), name="x")
    in_place = AutoModelForCausalLM.from_config(
        tiny_config("git", vocab_size=64)
    )  # it adds to its embeddings so
    check_reads(in_place, range(32, 64), name="x")
    assert all(value.grad is None for value in model.parameters())
    with pytest.raises(
        UserError, match=r"x \(LlamaForCausalLM\) cannot be trained with ids beyond its own vocabulary"
    ):
        check_reads(model, range(64, 80), name="x")
    check_shapes(model, name="x")
    model.config.vocab_size = 80
    with pytest.raises(
        UserError, match=r"would not load again .* other shapes of model\.embed_tokens\.weight"
    ):
        check_shapes(model, name="x")


def test_a_class_whose_vocabulary_transformers_cannot_grow_is_refused():
    model = made("llama")
    model.set_input_embeddings = None
    with pytest.raises(
        UserError, match="cannot grow the vocabulary of a model of class LlamaForCausalLM: 'NoneType'"
    ):
        grow_vocabulary(model, vocab_size=80, rows="own", seed=0)
