"""Which models draw with a compiled step is said before any is compiled."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.generate.sample import drawer_of
from t2i.model.class_form import check_head
from t2i.runs.loading import OpenedModel
from t2i.tokens.vocab import VocabLayout

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("granite", {"logits_scaling": 6.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 25.0}),
    ],
)
def test_logits_that_are_scaled_or_capped_are_refused(kind, changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes)).eval()
    check_head(model, name=kind)
    model.config.sequence_mode = "text-to-image"
    layout = VocabLayout(num_text_rows=33, num_text_tokens=33, codebook_size=24)
    opened = OpenedModel(Path("folder"), None, model, None, layout)
    with pytest.raises(
        UserError, match=r"--compile: folder is a \w+, which scales, caps or shifts its logits"
    ):
        drawer_of(opened, settings=SampleConfig(compile=True))
