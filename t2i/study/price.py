"""What a study will take, before it runs: tokens, floating-point operations, time on this machine."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2i.config import ASSETS, ModelConfig, RunConfig
from t2i.model.configuration_open_lm import OpenLMConfig
from t2i.model.modeling_open_lm import OpenLMForCausalLM
from t2i.study.arms import read_json
from t2i.study.grid import Study, run_config, run_name
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

USED_SHARE = 0.4
"""Of the speed of plain matrix products, what training reaches."""


@dataclass(frozen=True)
class Price:
    """One run."""

    name: str
    tokens: int
    flops: float
    seconds: float
    """Measured where the run is done, else estimated."""
    is_measured: bool


def prices(study: Study, *, out: Path, flops_a_second: float) -> list[Price]:
    """Price every run: 6 operations a token and number of the model; what is done costs what it cost."""
    found = []
    for arm, seed in study.runs():
        config = run_config(study, arm=arm, seed=seed, out=out)
        sequences = max(1, round(config.train.global_batch_tokens / config.data.seq_len))
        tokens = config.train.max_steps * sequences * config.data.seq_len
        flops = 6.0 * tokens * num_multiplied(config)
        record = read_json(out / "jobs" / f"{run_name(arm, seed)}.json")
        is_done = record.get("state") == "done"
        seconds = record["seconds"] if is_done else flops / (flops_a_second * USED_SHARE)
        found.append(Price(run_name(arm, seed), tokens, flops, seconds, is_done))
    return found


def num_multiplied(config: RunConfig) -> int:
    """Count the numbers that a token is multiplied by: all but the embedding.

    A start that is not there yet is taken to be as large as a random model of the same settings.
    """
    folder = Path(config.model.init)
    if (folder / "config.json").is_file():
        shape = OpenLMConfig(**json.loads((folder / "config.json").read_text()))
    else:
        shape = _shape(config.model, vocab_size=_vocab_size(config))
    with torch.device("meta"):
        model: Any = OpenLMForCausalLM(shape)
    total = sum(value.numel() for value in model.parameters())
    return total - model.get_input_embeddings().weight.numel()


def measured_flops() -> float:
    """Time a product of 1,024-square fp32 matrices here, the best of three; operations a second."""
    matrix = torch.ones(1_024, 1_024)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2 * 1_024**3 / min(times)


def _shape(model: ModelConfig, *, vocab_size: int) -> OpenLMConfig:
    return OpenLMConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
    )


def _vocab_size(config: RunConfig) -> int:
    """Rows of the grown vocabulary; of the shipped tokenizers where the shards are not there yet."""
    manifest = read_json(config.data.shards / "manifest.json")
    num_tokens = manifest.get("text_tokenizer", {}).get("num_tokens")
    num_tokens = num_tokens or TextTokenizer.load(ASSETS / "text_tokenizer").num_tokens
    shipped = read_json(ASSETS / "image_tokenizer" / "config.json")["num_vq_embeddings"]
    codes = manifest.get("codebook_size", 0 if manifest else shipped)
    return VocabLayout(-(-num_tokens // 8) * 8, num_tokens, codebook_size=codes).vocab_size
