"""Image codes learned among image rows alone: recorded wherever a loss of it stands, and never mixed with others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from t2i.errors import UserError
from t2i.measure.perplexity import data_of, measure_perplexity
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.train.main import train

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"


def test_a_run_says_so_everywhere_and_its_losses_are_over_the_rows_it_learned(finished, tmp_path):
    settings = replace(finished.train, max_steps=2, eval_images=10_000, image_vocab_only=True)
    config = replace(finished, run_dir=tmp_path / "run", train=settings)
    train(config, ds_config_path=DS_CONFIG)
    assert yaml.safe_load((config.run_dir / "resolved.yaml").read_text())["train"]["image_vocab_only"]
    manifest = config.run_dir / "checkpoints" / "step_000002" / "manifest.json"
    assert json.loads(manifest.read_text())["image_rows_only"]
    heldout = next(row for row in read_metrics(config.run_dir) if row.get("split") == "heldout")
    assert heldout["image_rows_only"]
    full, alone = (read_metrics(one.run_dir)[0] for one in (finished, config))
    a_token = [row["flops_per_second"] / row["tokens_per_second"] for row in (full, alone)]
    shape = json.loads((manifest.parent / "config.json").read_text())
    left_out = 64 / 90 * (shape["vocab_size"] - shape["vocab_layout"]["codebook_size"]) * 32
    assert a_token[0] - a_token[1] == pytest.approx(6 * left_out)

    model = open_model(str(config.run_dir), needs_images=False)
    measured = measure_perplexity(model, config=data_of(model, shards=None, mode=None))["heldout"]
    # fp32 sums in batches of other shapes.
    assert measured.image.nats == pytest.approx(heldout["image_loss"], abs=1e-4)
    model.model.config.image_rows_only = False
    over_all = measure_perplexity(model, config=data_of(model, shards=None, mode=None))["heldout"]
    assert over_all.image.nats > measured.image.nats + 0.1
    for kind in ("text", "special"):
        assert getattr(over_all, kind).nats == pytest.approx(getattr(measured, kind).nats, rel=1e-5)

    with pytest.raises(UserError, match="train.image_vocab_only is True there, False here"):
        train(replace(config, train=replace(settings, image_vocab_only=False)), ds_config_path=DS_CONFIG)
