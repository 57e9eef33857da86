"""What a run starts from, and what of it learns: recipes under DeepSpeed, text-only pre-training, any CKPT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from built_models import built
from safetensors.torch import load_file

from t2i.config import ASSETS, DataConfig
from t2i.data.prepare.part_folder import ClaimedError
from t2i.data.prepare.text import prepare_text
from t2i.data.shards.manifest import Maker, read_manifest
from t2i.data.sources.documents import open_documents
from t2i.errors import Stopped, UserError
from t2i.model.resize import merged_state_dict
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train import inputs
from t2i.train.build import build_model
from t2i.train.inputs import prepare_embedded
from t2i.train.main import train

ROOT = Path(__file__).parents[2]
DS_CONFIG = ROOT / "ds_configs" / "zero2_fp32.json"
SEQ_LEN = 32


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


def checkpoint(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    return load_file(folder / "model.safetensors"), json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("recipe", ["embeddings", "norms", "first-half", "feed-forward"])
def test_what_is_frozen_does_not_change_by_one_bit_and_costs_no_state(recipe, finished, tokenizer, tmp_path):
    config = replace(
        finished,
        run_dir=tmp_path / "run",
        model=replace(finished.model, trainable=recipe),
        train=replace(finished.train, max_steps=2, save_every=2, eval_every=0),
    )
    model, _ = built(config, tokenizer)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen
    train(config, ds_config_path=DS_CONFIG)
    after, manifest = checkpoint(config.run_dir, 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before) - frozen
    num_learned = sum(before[name].numel() for name in changed)
    assert manifest["parameters"]["learned"] == num_learned
    # Two moments of four bytes a number; DeepSpeed pads each group of parameters by a few numbers.
    assert manifest["optimizer_state_bytes"] == pytest.approx(8 * num_learned, abs=256)


def test_a_partly_frozen_run_goes_on_bit_for_bit(finished, tmp_path):
    settings = replace(finished.train, max_steps=3, eval_every=0)
    config = replace(
        finished, run_dir=tmp_path / "whole", model=replace(finished.model, trainable="norms"), train=settings
    )
    train(config, ds_config_path=DS_CONFIG)
    halves = replace(config, run_dir=tmp_path / "halves")
    with pytest.raises(Stopped, match="Stopped at step 1 of 3"):
        train(halves, ds_config_path=DS_CONFIG, stop_at=1)
    train(halves, ds_config_path=DS_CONFIG)
    whole, resumed = (checkpoint(run, 3)[0] for run in (config.run_dir, halves.run_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def text_run(finished, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text(
        "\n\n".join(f"Paragraph {n} of a text says that {n} follows {n - 1}." for n in range(400))
    )
    prepare_text(
        open_documents(f"text:{folder / 'all.txt'}"),
        out=folder / "shards",
        text_tokenizer=tokenizer,
        seq_len=SEQ_LEN,
        heldout_share=0.2,
    )
    config = replace(
        finished,
        run_dir=folder / "run",
        data=DataConfig(shards=folder / "shards", mode="text-only", seq_len=SEQ_LEN),
        train=replace(finished.train, max_steps=30, save_every=30, eval_every=30, lr=1e-2),
    )
    train(config, ds_config_path=DS_CONFIG)
    return config


def test_text_only_training_makes_a_plain_language_model(text_run, tokenizer):
    rows = read_metrics(text_run.run_dir)
    steps = [row for row in rows if "split" not in row]
    heldout = [row for row in rows if row.get("split") == "heldout"]
    assert steps[0]["image_tokens"] == steps[0]["special_tokens"] == steps[0]["padded"] - 22 == 0
    floors = read_manifest(text_run.data.shards).floors_nats["heldout"]
    assert heldout[-1]["text_loss"] < floors["unigram"]
    language_model = open_model(str(text_run.run_dir), needs_images=False)
    assert language_model.model.config.vocab_layout is None
    assert language_model.layout.codebook_size == 0
    assert len(language_model.model.get_input_embeddings().weight) == tokenizer.num_tokens


@pytest.fixture(scope="module")
def grown_run(text_run, finished, tmp_path_factory):
    config = replace(
        finished,
        run_dir=tmp_path_factory.mktemp("grown") / "run",
        model=replace(finished.model, init=str(text_run.run_dir)),
        train=replace(finished.train, max_steps=1, eval_every=1, eval_text=str(text_run.data.shards)),
    )
    train(config, ds_config_path=DS_CONFIG)
    return config


def test_a_pre_trained_run_gives_its_text_rows_and_every_layer(text_run, grown_run, tokenizer):
    start = open_model(str(text_run.run_dir), needs_images=False).model.state_dict()
    model, layout = built(grown_run, tokenizer)
    for name, value in merged_state_dict(model).items():
        kept = value[: layout.num_text_rows] if value.shape[0] == layout.vocab_size else value
        assert torch.equal(kept, start[name]), name
    assert layout.codebook_size == read_manifest(grown_run.data.shards).codebook_size


def test_forgetting_is_measured_before_the_first_step_and_on(text_run, grown_run):
    before, after = [row for row in read_metrics(grown_run.run_dir) if row.get("split") == "text"]
    trained = [row for row in read_metrics(text_run.run_dir) if "split" in row][-1]
    assert (before["step"], after["step"]) == (0, 1)
    # Among text rows the grown model is the one that was trained, to fp32 rounding of a wider product; over all rows
    # it also pays for what its new rows draw away. A few sequences are measured here, so means differ.
    assert before["text_loss_text_rows"] == pytest.approx(trained["text_loss"], abs=1e-3)
    assert before["text_loss"] > before["text_loss_text_rows"]
    assert 0 < before["leaked"] < 1


def test_a_model_that_knows_the_codes_keeps_all_rows_and_another_its_text_and_markers(
    grown_run, tokenizer, monkeypatch
):
    config = replace(grown_run, model=replace(grown_run.model, init=str(grown_run.run_dir)))
    trained = open_model(str(grown_run.run_dir), needs_images=False)
    head = trained.model.get_output_embeddings().weight
    model, layout = built(config, tokenizer)
    assert layout == trained.layout
    assert torch.equal(model.get_output_embeddings().weight, head)
    manifest = read_manifest(grown_run.data.shards)
    other = replace(manifest, image_tokenizer=Maker("another", "another"), codebook_size=40)
    # The shards themselves have more codes than that.
    codes = layout.first_image_id + torch.arange(40).repeat(2, 1)
    config = replace(config, model=replace(config.model, new_embeddings="uniform"))
    monkeypatch.setattr("t2i.train.build.first_sequences", lambda *_, **__: codes)
    model, layout = build_model(
        config.model, data=config.data, train=config.train, manifest=other, text_tokenizer=tokenizer
    )
    rows = model.get_output_embeddings().weight
    first = trained.layout.first_image_id
    assert len(rows) == layout.vocab_size == 2048 + 7 + 40 + 1
    assert torch.equal(rows[:first], head[:first])
    assert not torch.equal(rows[first : first + 40], head[first : first + 40])


def test_a_start_is_scrambled_before_it_grows(text_run, grown_run, tokenizer):
    model = replace(grown_run.model, new_embeddings="random")  # which does not depend on the text rows
    plain, layout = built(replace(grown_run, model=model), tokenizer)
    shuffled, _ = built(replace(grown_run, model=replace(model, control_init="within-tensors")), tokenizer)
    rows = [model.get_input_embeddings().weight for model in (plain, shuffled)]
    text = [values[: layout.num_text_rows].flatten().sort().values for values in rows]
    assert torch.equal(text[0], text[1])
    assert not torch.equal(rows[0][: layout.num_text_rows], rows[1][: layout.num_text_rows])
    assert torch.equal(rows[0][layout.num_text_rows :], rows[1][layout.num_text_rows :])


def test_contradicting_starts_are_refused(finished, tokenizer):
    with pytest.raises(UserError, match="model.control_init is moments, but model.init is random"):
        built(replace(finished, model=replace(finished.model, control_init="moments")), tokenizer)
    with pytest.raises(UserError, match="is no run folder, checkpoint"):
        built(replace(finished, model=replace(finished.model, init="./nowhere")), tokenizer)


def test_runs_that_start_together_wait_for_the_one_that_prepares_the_embedded_images(tmp_path, monkeypatch):
    """The first one is killed while this one waits, which then prepares them itself."""
    out, held = tmp_path / "shards", [True, True, False]

    def prepare(source, *, out, **others):
        if held:
            raise ClaimedError("held by another")
        out.mkdir()

    monkeypatch.setattr(inputs, "prepare", prepare)
    monkeypatch.setattr(inputs, "is_claimed", lambda part, *, rank: held.pop(0))
    monkeypatch.setattr(inputs, "WAIT_SECONDS", 0.0)
    prepare_embedded(out)
    assert out.exists() and not held
