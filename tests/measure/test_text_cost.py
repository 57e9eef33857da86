"""What is left of the language model, where the model has rows that no token uses: they are neither text nor chosen."""

import math

import pytest
import torch

from t2i.config import ASSETS
from t2i.errors import UserError
from t2i.measure.forgetting import complete, text_cost
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


def model_of(layout, logits=None):
    """A tiny model, or one whose logits are these whatever it reads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = OpenLMForCausalLM(OpenLMConfig(vocab_size=layout.vocab_size, **sizes)).eval()
    if logits is not None:
        with torch.no_grad():
            model.model.norm.weight.zero_()  # so hidden states are all ones
            model.model.norm.bias.fill_(1)
            model.output.weight.copy_((logits / 16)[:, None].expand(-1, 16))
    return model


def test_rows_that_no_token_uses_are_not_text():
    layout = VocabLayout(num_text_rows=20, num_text_tokens=12, codebook_size=9)
    model = model_of(layout)
    ids = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0))
    cost = text_cost(model, ids, layout=layout, batch_size=2)
    with torch.no_grad():
        probabilities = model(ids).logits.double().softmax(-1)
    among_text, leaked, loss = [], [], []
    for row in range(3):
        for place in range(6):
            following = ids[row, place + 1]
            text = float(probabilities[row, place, :12].sum())
            loss.append(-math.log(probabilities[row, place, following]))
            among_text.append(-math.log(probabilities[row, place, following] / text))
            leaked.append(1 - text)
    # fp32 logits against double probabilities
    assert cost.loss == pytest.approx(sum(loss) / 18, abs=1e-5)
    assert cost.loss_text_rows == pytest.approx(sum(among_text) / 18, abs=1e-5)
    assert cost.leaked == pytest.approx(sum(leaked) / 18, abs=1e-5)
    assert cost.num_tokens == 18


def test_a_completion_is_of_ids_that_the_tokenizer_has():
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    layout = VocabLayout(num_text_rows=2060, num_text_tokens=2048, codebook_size=9)
    logits = torch.zeros(layout.vocab_size)
    logits[2048:] = 2  # unused rows, markers, <pad>, codes, and what follows them
    logits[300] = 1
    found = complete(
        model_of(layout, logits), ["a cat"], tokenizer=tokenizer, layout=layout, max_new_tokens=3
    )
    assert found == [tokenizer.decode(torch.tensor([300, 300, 300]))]


def test_a_chat_prompt_is_a_turn_and_its_answer_ends_where_turns_end():
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    layout = VocabLayout(num_text_rows=2060, num_text_tokens=2048, codebook_size=9)
    logits = torch.zeros(layout.vocab_size)
    logits[300] = 1
    made = model_of(layout, logits)
    asked = {"tokenizer": tokenizer, "layout": layout, "max_new_tokens": 3, "is_chat": True}
    with pytest.raises(UserError, match="has no chat template"):
        complete(made, ["a cat"], **asked)
    tokenizer.tokenizer.chat_template = "{{ messages[0].content }}<|endoftext|>"
    read = []
    made.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    assert complete(made, ["a cat"], **asked) == [tokenizer.decode(torch.tensor([300, 300, 300]))]
    assert read[0].tolist() == [[*tokenizer.encode("a cat").tolist(), tokenizer.end_id]]
    made.generation_config.eos_token_id = [tokenizer.end_id, 300]
    assert complete(made, ["a cat"], **asked) == [""]
