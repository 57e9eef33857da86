"""New embeddings of a pre-trained model begin where an image code costs what a uniform guess does."""

import math

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from t2i.model.class_form import check_head, head_of
from t2i.model.resize import grow_vocabulary
from t2i.model.uniform_start import Probe, code_cost, narrow_to_fair, shift_to_uniform, uniform_cost
from t2i.tokens.sequence import encode_sequence
from t2i.tokens.vocab import VocabLayout

LAYOUT = VocabLayout(num_text_rows=200, num_text_tokens=190, codebook_size=64)


def pretrained(*, tied):
    """Make a model with opinions: its text rows share a mean, along which its hidden states point, and differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight += torch.linspace(-1, 1, 32) + 0.15 * torch.randn(200, 32)
        model.model.norm.weight *= 3
    return model


def probe_of(seed):
    generator = torch.Generator().manual_seed(seed)
    captions, codes = (torch.randint(end, (8, 16), generator=generator) for end in (190, 64))
    rows = [
        encode_sequence(caption, code, layout=LAYOUT, mode="text-to-image", seq_len=40)
        for caption, code in zip(captions, codes, strict=True)
    ]
    return Probe.of(torch.stack(rows), layout=LAYOUT, num_old=200)


def cost_by_hand(model, probe):
    """Mean cost of a code in nats by cross entropy on the model's own logits: over all ids, and among codes alone."""
    with torch.inference_mode():
        logits = model(probe.ids).logits[:, :-1]
    following = probe.ids[:, 1:]
    is_code = following >= LAYOUT.first_image_id
    logits, targets = logits[is_code], following[is_code]
    codes = slice(LAYOUT.first_image_id, LAYOUT.first_image_id + LAYOUT.codebook_size)
    among = torch.nn.functional.cross_entropy(logits[:, codes], targets - LAYOUT.first_image_id)
    return torch.nn.functional.cross_entropy(logits, targets).item(), among.item()


def grown(model, *, rows):
    grow_vocabulary(model, vocab_size=LAYOUT.vocab_size, rows=rows, seed=0)
    return probe_of(0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_code_begins_at_the_uniform_cost_and_no_code_is_preferred(tied):
    model = pretrained(tied=tied)
    text = model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()
    probe = grown(model, rows="uniform")
    assert code_cost(model, probe) > uniform_cost(model) + 1  # there is a debt to begin with
    shift_to_uniform(model, probe)
    # On other sequences than the ones that it was measured by.
    everything, among_codes = cost_by_hand(model, probe_of(7))
    assert everything == pytest.approx(math.log(LAYOUT.vocab_size), abs=0.2)
    assert among_codes == pytest.approx(math.log(64), abs=0.02)
    assert model.get_input_embeddings().weight[:200].equal(text[0])
    assert model.lm_head.weight[:200].equal(text[1])


def test_the_cost_before_the_first_step_is_that_of_the_models_own_logits():
    model = pretrained(tied=True)
    probe = grown(model, rows="random")
    assert code_cost(model, probe) == pytest.approx(cost_by_hand(model, probe)[0], abs=1e-4)
    assert uniform_cost(model) == pytest.approx(math.log(LAYOUT.vocab_size))


def test_logits_that_are_scaled_are_shifted_as_far():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=200, **sizes, logits_scaling=16.0)).eval()
    with torch.no_grad():
        model.lm_head.weight += 40 * torch.linspace(-1, 1, 32)
        model.model.norm.weight *= 3
    check_head(model, name="granite")
    assert head_of(model).scale == 1 / 16
    probe = grown(model, rows="uniform")
    with torch.no_grad():  # codes cost some 20 nats too much, which are 320 in products
        hidden = model.model(probe.ids).last_hidden_state.flatten(0, 1).mean(0)
        model.lm_head.weight[200:] -= 320 * hidden / hidden.square().sum()
    assert code_cost(model, probe) > uniform_cost(model) + 10
    shift_to_uniform(model, probe)
    assert cost_by_hand(model, probe)[0] == pytest.approx(uniform_cost(model), abs=0.01)


def test_rows_that_no_shift_can_help_stay_where_they_are():
    model = pretrained(tied=False)
    probe = grown(model, rows="uniform")
    with torch.no_grad():
        # Logits among codes that differ by hundreds: no common shift makes that a uniform cost.
        model.lm_head.weight[200:] *= torch.linspace(-300, 300, LAYOUT.vocab_size - 200)[:, None]
    before = model.lm_head.weight.detach().clone()
    shift_to_uniform(model, probe)
    assert model.lm_head.weight.equal(before)


def test_own_rows_have_mean_and_deviation_of_those_of_text():
    model = pretrained(tied=True)
    grow_vocabulary(model, vocab_size=2_200, rows="own", seed=0)
    old, new = model.lm_head.weight.detach().split([200, 2_000])
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.015, rtol=0)
    torch.testing.assert_close(new.std(0), old.std(0), atol=0, rtol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_codes_as_far_apart_as_text_are_drawn_together_until_none_is_preferred_by_much(tied):
    model = pretrained(tied=tied)
    probe = grown(model, rows="uniform")
    codes = slice(LAYOUT.first_image_id, LAYOUT.first_image_id + 64)
    with torch.no_grad():
        model.lm_head.weight[codes] += torch.randn(64, 32)
    inputs = model.get_input_embeddings().weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    assert cost_by_hand(model, probe)[1] > math.log(64) + 1
    narrow_to_fair(model, probe)
    shift_to_uniform(model, probe)
    everything, among_codes = cost_by_hand(model, probe)
    assert math.log(64) < among_codes < math.log(64) + 0.1
    assert everything == pytest.approx(math.log(LAYOUT.vocab_size), abs=0.01)
    before, after = (rows[codes] - rows[codes].mean(0) for rows in (head, model.lm_head.weight.detach()))
    ratio = (after.norm() / before.norm()).item()
    assert math.log2(ratio) == pytest.approx(round(math.log2(ratio)), abs=1e-3) and ratio < 1
    torch.testing.assert_close(after, before * ratio, atol=1e-4, rtol=0)
    assert model.lm_head.weight[:200].equal(head[:200])
    assert tied or model.get_input_embeddings().weight.equal(inputs)
