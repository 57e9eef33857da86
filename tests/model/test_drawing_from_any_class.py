"""Which of transformers' classes can be drawn from: what a KV cache gives equals whole sequences, or it is refused."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.errors import UserError
from t2i.model.backbone import check_decoding, check_head, hidden_states, load_model
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.model.open_lm.sampling_open_lm import sample_codes

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
DRAWN = {
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "bert": {"is_decoder": True},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "mamba": {},
    "rwkv": {},
}
RECURRENT = ("mamba", "rwkv")
# transformers 5 continues Mamba's state, if nothing was padded.
MAMBA = "whole" if int(transformers.__version__.split(".")[0]) < 5 else "unpadded"
READINGS = {"bart": "unpadded", "mamba": MAMBA, "rwkv": "whole"}


def made(kind, **changes):
    torch.manual_seed(0)
    sizes = SIZES if kind not in RECURRENT else {key: SIZES[key] for key in list(SIZES)[:3]}
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # zero in a new model, so that a lost one would not show
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("kind", DRAWN)
def test_codes_equal_those_of_whole_sequences(kind):
    model = made(kind, **DRAWN[kind])
    check_head(model, name=kind)
    check_decoding(model, name=kind)
    prompts, empty, num_codes, first = [[1, 2, 3, 4, 5, 6, 7], [9, 8]], [7], 5, 40
    settings = {
        "empty_prompt": empty,
        "image_ids": range(first, 64),
        "num_codes": num_codes,
        "temperature": 0,
    }
    found = sample_codes(model, prompts, seeds=[0, 1], guidance_scale=2.0, **settings)
    assert ClassForm.of(model).reading == READINGS.get(kind, "padded")
    for prompt, codes in zip(prompts, found.tolist(), strict=True):
        ids = []
        for _ in range(num_codes):
            with torch.inference_mode():
                own, none = (
                    model(torch.tensor([[*start, *ids]]), use_cache=False).logits[0, -1, first:]
                    for start in (prompt, empty)
                )
            ids.append(int((none + 2.0 * (own - none)).argmax()) + first)
        assert [number - first for number in ids] == codes


def test_a_class_that_sees_later_ids_is_refused_by_name():
    model = made("bert", is_decoder=False, initializer_range=0.2)
    check_head(model, name="bert")
    with pytest.raises(UserError, match=r"some/folder \(BertLMHeadModel\) cannot be drawn from: ") as caught:
        check_decoding(model, name="some/folder")
    assert "\n" not in str(caught.value)


def test_a_gemma_3_text_model_loads_from_its_folder(tmp_path):
    made("gemma3_text", **DRAWN["gemma3_text"]).save_pretrained(tmp_path)
    assert hidden_states(load_model(tmp_path), torch.tensor([[1, 2]])).shape == (1, 2, 32)
