"""What a model's folder says of precision and attention is kept where training can keep it, else refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as quantizers
from transformers.utils.quantization_config import QuantizationConfigMixin

from t2i.errors import UserError
from t2i.model.backbone import check_trainable, load_model, made_of, read_model_config
from t2i.model.open_lm.language_model_t2i import LanguageModel

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(2, 42).view(2, 20)


class Halved(HfQuantizer):
    """A method that leaves some weights in bf16, and either stays or says that it has dequantised the model."""

    requires_calibration = True
    is_trainable = False

    def _process_model_before_weight_loading(self, model, **_):
        return model

    def _process_model_after_weight_loading(self, model, **_):
        if self.quantization_config.dequantises:
            model.lm_head.to(torch.bfloat16)
            self.remove_quantization_config(model)
        return model

    def is_serializable(self, **_):
        return True


class HalvedConfig(QuantizationConfigMixin):
    def __init__(self, quant_method="halved", dequantises=False, **_):
        self.quant_method, self.dequantises = quant_method, dequantises


@pytest.fixture
def quantised(tmp_path, monkeypatch):
    """Write a Llama's folder that is quantised by a method, and return its place."""
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "halved", Halved)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "halved", HalvedConfig)

    def write(**settings):
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        values = json.loads(file.read_text()) | {
            "quantization_config": {"quant_method": "halved", **settings}
        }
        file.write_text(json.dumps(values))
        return tmp_path

    return write


def test_quantised_weights_that_cannot_be_trained_are_refused(quantised):
    model = load_model(quantised())  # what measures, and trains nothing, takes it
    with pytest.raises(UserError, match="it is quantised by halved, whose weights cannot be trained"):
        check_trainable(model, name="it")


def test_dequantised_weights_are_of_one_precision(quantised):
    folder = quantised(dequantises=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert {value.dtype for value in load_model(folder, dtype=dtype).parameters()} == {dtype}
    assert len({value.dtype for value in load_model(folder, dtype="stored").parameters()}) == 1


def test_a_drawn_model_of_a_quantised_ones_architecture_opens_again(quantised, tmp_path):
    model = made_of(read_model_config(quantised()))
    model.save_pretrained(tmp_path / "drawn")
    assert "quantization_config" not in json.loads((tmp_path / "drawn" / "config.json").read_text())
    again = load_model(tmp_path / "drawn")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_capped_attention_is_computed_with_its_cap(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.5, attn_implementation="eager")
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(50)
            layer.self_attn.k_proj.weight.mul_(50)
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    drawn = made_of(read_model_config(tmp_path)).eval()
    drawn.load_state_dict(model.state_dict())
    of_pipeline = LanguageModel.from_pretrained(tmp_path / "language_model")  # it opens the folder above
    for one in (loaded, drawn, of_pipeline):
        with torch.no_grad():
            # fp32 rounding; without the cap, logits differ by a tenth.
            torch.testing.assert_close(one(IDS).logits, expected, atol=1e-5, rtol=1e-4)
