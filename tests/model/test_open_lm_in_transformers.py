"""What callers of transformers may ask of open_lm's class, as of any other: states, weights, masks, caches, tuples."""

import os
import sys

import processes
import pytest
import torch
from transformers import DynamicCache, StaticCache

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM

# fp32 matrix products of other shapes differ in the last bits; logits here are about 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 60]])
PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OpenLMConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 64, **changes})
    return OpenLMForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_hidden_states_are_the_layers_inputs_and_the_normalised_output(model):
    outputs = model(IDS, output_hidden_states=True)
    states = outputs.hidden_states
    assert [state.shape for state in states] == [(2, 5, 32)] * 3
    assert torch.equal(states[0], model.model.tok_embeddings(IDS))
    assert torch.equal(model.output(states[-1]), outputs.logits)
    assert model(IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 3
    model.config.output_hidden_states = False


@pytest.mark.parametrize("mask", [None, PADDED])
def test_attention_weights_are_causal_shares_that_give_the_same_logits(mask, model):
    outputs = model(IDS, attention_mask=mask, output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 5, 5)] * 2
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
        assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(outputs.logits, model(IDS, attention_mask=mask).logits, **CLOSE)


def test_eager_attention_runs_without_sdpa(model, monkeypatch):
    wanted = model(IDS, attention_mask=PADDED).logits
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS, attention_mask=PADDED).logits, wanted, **CLOSE)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_masks_of_four_dimensions_equal_the_same_mask_of_two(dtype, model):
    allowed = torch.ones(5, 5).tril().bool()[None, None] & PADDED[:, None, None].bool() | torch.eye(5).bool()
    mask = allowed.to(dtype)
    if dtype.is_floating_point:
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(dtype).min)
    positions = (PADDED.cumsum(-1) - 1).clamp(min=0)
    found = model(IDS, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, model(IDS, attention_mask=PADDED).logits, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, PADDED])
@pytest.mark.parametrize("cuts", [[5], [4, 1], [2, 2, 1], [1, 1, 1, 1, 1]])
def test_a_static_cache_gives_the_logits_of_whole_sequences(cuts, mask, implementation, model):
    wanted = model(IDS, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    cache, parts, end = StaticCache(config=model.config, max_cache_len=16), [], 0
    for part in IDS.split(cuts, dim=1):
        end += part.shape[1]
        seen = None if mask is None else mask[:, :end]
        parts.append(model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.cat(parts, 1), wanted, **CLOSE)


@pytest.mark.parametrize("mask", [None, PADDED])
def test_generate_gives_the_same_ids_with_every_cache(mask, model):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(IDS, attention_mask=mask, **settings, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
        assert torch.equal(model.generate(IDS, attention_mask=mask, **settings, **more), wanted)


def test_outputs_come_as_a_tuple_if_asked_for(model):
    logits, states = model(IDS, return_dict=False, output_hidden_states=True)
    assert torch.equal(logits, model(IDS).logits)
    assert len(states) == 3
    assert len(model.model(IDS, return_dict=False)) == 1


def test_the_loss_is_over_the_whole_batch_if_its_size_is_given(model):
    loss = model(IDS, labels=IDS).loss
    log_probabilities = model(IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    torch.testing.assert_close(loss, -log_probabilities.mean())
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=80).loss, loss * 8 / 80)


def test_logits_may_be_asked_for_at_chosen_positions(model):
    logits = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, logits[:, -2:], **CLOSE)
    torch.testing.assert_close(
        model(IDS, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]], **CLOSE
    )


def test_a_saved_folder_opens_as_a_model_without_head(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    script = """
import sys
sys.modules["t2i"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
body = AutoModel.from_pretrained("saved", trust_remote_code=True).eval()
assert type(body).__name__ == "OpenLMModel"
whole = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True, attn_implementation="eager").eval()
assert whole.config._attn_implementation == "eager"
ids = torch.tensor([[1, 2, 3]])
torch.testing.assert_close(whole.output(body(ids).last_hidden_state), whole(ids).logits, atol=1e-5, rtol=1e-4)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = processes.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
