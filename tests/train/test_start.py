"""A fresh start draws every weight with the deviation that is asked for."""

from types import SimpleNamespace

import pytest
import torch
from backbones.tiny import tiny_config

from t2i.config import ASSETS, ModelConfig
from t2i.model.trainable import layers_of
from t2i.tokens.text import TextTokenizer
from t2i.train.start import fresh_start


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma3"])
def test_a_deviation_is_that_of_the_layers_whatever_it_is_called(model_type, tmp_path):
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    tiny_config(model_type, vocab_size=tokenizer.num_tokens + 5).save_pretrained(tmp_path)
    torch.manual_seed(0)
    start = fresh_start(
        ModelConfig(init=str(tmp_path), control_init="fresh", init_std=0.3),
        manifest=SimpleNamespace(codebook_size=16, is_text=False),
        text_tokenizer=tokenizer,
    )
    matrices = [value for value in layers_of(start.model).parameters() if value.dim() == 2]
    assert len(matrices) > 8
    for value in matrices:
        # 5 standard errors of a deviation from at least 512 numbers are 16%.
        assert value.std().item() == pytest.approx(0.3, rel=0.16)
