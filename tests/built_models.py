"""Models as training builds them, before the first step."""

import torch

from t2i.data.shards.manifest import read_manifest
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.vocab import VocabLayout
from t2i.train.build import build_model
from t2i.train.engine import Learner

LAYOUT = VocabLayout(num_text_rows=512, num_text_tokens=512, codebook_size=1_024)


def learner():
    """A small model whose embedding and LM head are large enough for parameter groups of their own."""
    torch.manual_seed(0)
    config = OpenLMConfig(LAYOUT.vocab_size, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    return Learner(OpenLMForCausalLM(config).train(), layout=LAYOUT)


def adamw(parameters, config):
    """Make torch's own AdamW of a run's settings: matrices have weight decay, vectors none."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def step_both(engine, plain, *optimizers, grad_clip):
    """Take a step of an engine, and by torch alone of a plain copy; return the plain gradient's norm."""
    ids = torch.randint(LAYOUT.vocab_size - 8, (4, 40))
    loss, _ = engine(ids, ids.roll(-1, 1))
    engine.backward(loss)
    engine.step()
    plain.zero_grad()
    plain(ids, ids.roll(-1, 1))[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    return float(norm)


def built(config, tokenizer, **given):
    """Build the model of a run's settings: it and its vocabulary layout."""
    return build_model(
        config.model,
        data=config.data,
        train=config.train,
        manifest=read_manifest(config.data.shards),
        text_tokenizer=tokenizer,
        **given,
    )
