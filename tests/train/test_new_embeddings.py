"""New embeddings from the shards' image tokenizer and captions: built, at the uniform cost, refused, and resumed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from built_models import built
from train.test_backbones import DS_CONFIG, made

from t2i.config import ASSETS, AlignConfig, AlignRun, ModelConfig
from t2i.data.shards.manifest import read_manifest
from t2i.distributed.launch import start_processes
from t2i.errors import DataError, UserError
from t2i.model.uniform_start import FAIR_EXCESS_NATS, Probe, code_cost, uniform_cost
from t2i.runs.loading import open_model
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.train import build as building
from t2i.train.align import ROWS_FILE, align
from t2i.train.inputs import check_before_start
from t2i.train.main import train
from t2i.train.new_embeddings import first_sequences, kind_of


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(ASSETS / "text_tokenizer")


@pytest.fixture(scope="module", params=["tied", "untied"])
def start(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return made("llama", folder / request.param, tokenizer, tie_word_embeddings=request.param == "tied")


def begun(finished, start, kind, **settings):
    model = replace(finished.model, init=str(start), new_embeddings=kind)
    return replace(finished, model=model, train=replace(finished.train, **settings))


@pytest.mark.parametrize("kind", ["codebook", "captions"])
def test_codes_differ_by_what_is_known_of_them_at_the_uniform_cost(kind, finished, start, tokenizer):
    config = begun(finished, start, kind)
    model, layout = built(config, tokenizer)
    probe = Probe.of(
        first_sequences(config.data, layout=layout, tokenizer=tokenizer),
        layout=layout,
        num_old=layout.num_text_rows,
    )
    # Not to the last hundredth: hidden states of a random model hardly share a direction to shift along.
    assert code_cost(model, probe) <= uniform_cost(model) + FAIR_EXCESS_NATS
    again, _ = built(config, tokenizer)
    other, _ = built(begun(finished, start, kind, seed=1), tokenizer)
    codes = slice(layout.first_image_id, layout.first_image_id + layout.codebook_size)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        rows, same, others = (getattr(one, end)().weight.detach() for one in (model, again, other))
        assert torch.equal(rows, same) and not torch.equal(rows[codes], others[codes])
        assert torch.equal(rows[: layout.num_text_rows], others[: layout.num_text_rows])
        # More than the noise of a hundredth, by which codes that begin alike differ.
        assert rows[codes].std(0).mean() > 0.02 * rows[: layout.num_text_tokens].std(0).mean()


def test_codes_with_near_vectors_begin_near_each_other(finished, start, tokenizer):
    model, layout = built(begun(finished, start, "codebook"), tokenizer)
    vectors = ImageTokenizer.load(finished.data.shards / "image_tokenizer").code_vectors()
    rows = model.get_input_embeddings().weight.detach()[layout.first_image_id :][: layout.codebook_size]
    near = torch.cdist(vectors, vectors).fill_diagonal_(torch.inf).argmin(1)
    distances = torch.cdist(rows, rows)
    assert distances.gather(1, near[:, None]).mean() < 0.3 * distances.mean()


def test_what_shards_lack_is_refused_before_deepspeed_starts(finished, start, tmp_path):
    config = begun(finished, start, "codebook")
    shards = tmp_path / "shards"
    shutil.copytree(finished.data.shards, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**manifest, "given_ids": True}))
    with pytest.raises(
        UserError, match="is codebook; expected shards with an image tokenizer, but .*precomputed"
    ):
        check_before_start(replace(config, data=replace(config.data, shards=shards)), world_size=1)


def test_captions_that_are_all_empty_are_refused(finished, start, tokenizer, monkeypatch):
    monkeypatch.setattr("t2i.train.new_embeddings.caption_ids_of", lambda *_, **__: torch.empty(0).long())
    with pytest.raises(DataError, match="expected captions in .*, but those of its [0-9]+ images are empty"):
        built(begun(finished, start, "captions"), tokenizer)


def test_a_resumed_run_measures_nothing_anew_and_ends_as_one_that_was_never_stopped(
    finished, start, tmp_path, monkeypatch
):
    config = begun(finished, start, "captions", max_steps=4, save_every=2, eval_every=0, l2_sp=0.1)
    whole = replace(config, run_dir=tmp_path / "whole")
    train(whole, ds_config_path=DS_CONFIG)
    halves = replace(config, run_dir=tmp_path / "halves")
    with pytest.raises(Exception, match="step 2"):
        train(halves, ds_config_path=DS_CONFIG, stop_at=2)
    for name in ("rows_from_shards", "begin_fairly", "first_sequences"):
        monkeypatch.setattr(building, name, None)
    train(halves, ds_config_path=DS_CONFIG)
    one, two = (
        open_model(str(run.run_dir), needs_images=False).model.state_dict() for run in (whole, halves)
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_probe_has_as_many_null_captions_as_training(finished, tokenizer, monkeypatch):
    _, layout = built(finished, tokenizer)
    monkeypatch.setattr("t2i.train.new_embeddings.NUM_SEQUENCES", 10)
    for share in (0.0, 0.2, 1.0):
        data = replace(finished.data, caption_dropout=share)
        sequences = first_sequences(data, layout=layout, tokenizer=tokenizer)
        lengths = ((sequences < layout.num_text_tokens) & (sequences != layout.pad_id)).sum(1)
        assert (lengths == lengths.min()).sum() == round(share * 10) or not share
        assert share < 1 or lengths.max() == lengths.min()


def probed(config, tokenizer):
    """Measure what an image code costs at a run's start, and what a uniform guess does."""
    model, layout = built(config, tokenizer)
    sequences = first_sequences(config.data, layout=layout, tokenizer=tokenizer)
    return code_cost(model, Probe.of(sequences, layout=layout, num_old=layout.num_text_rows)), uniform_cost(
        model
    )


@pytest.mark.parametrize("control", ["fresh", "within-tensors", "moments", "layer-order"])
def test_a_control_begins_no_dearer_than_a_uniform_guess(control, finished, start, tokenizer):
    config = begun(finished, start, "auto")
    cost, uniform = probed(replace(config, model=replace(config.model, control_init=control)), tokenizer)
    assert cost <= uniform + FAIR_EXCESS_NATS


def test_auto_is_one_rule_for_a_loaded_model_for_its_controls_and_for_a_random_start(finished):
    manifest = read_manifest(finished.data.shards)
    loaded = ModelConfig(init="models/any")
    controls = [replace(loaded, control_init=control) for control in ("fresh", "within-tensors")]
    assert {kind_of(one, manifest=manifest) for one in (loaded, *controls, ModelConfig())} == {"codebook"}
    without = replace(manifest, given_ids=True)
    assert {kind_of(one, manifest=without) for one in (loaded, *controls)} == {"uniform"}
    assert kind_of(ModelConfig(), manifest=without) == "random"
    assert kind_of(replace(loaded, new_embeddings="own"), manifest=manifest) == "own"


def test_aligned_embeddings_begin_at_the_uniform_cost(finished, start, tokenizer, tmp_path):
    start_processes()
    data = replace(finished.data, seq_len=96)
    run = AlignRun(
        run_dir=tmp_path / "aligned", model=str(start), data=data, align=AlignConfig(num_pairs=8, max_steps=2)
    )
    align(run)
    cost, uniform = probed(begun(finished, start, str(tmp_path / "aligned" / ROWS_FILE)), tokenizer)
    assert cost <= uniform + FAIR_EXCESS_NATS


@pytest.mark.parametrize(
    ("excess", "is_drawn", "is_said"),
    [(0.5, False, True), (0.05, False, False), (0.5, True, False), (1.5, True, True)],
)
def test_a_loaded_model_is_warned_of_a_start_that_a_drawn_one_may_have(
    excess, is_drawn, is_said, finished, start, tokenizer, monkeypatch, caplog
):
    monkeypatch.setattr(
        "t2i.train.new_embeddings.code_cost", lambda model, probe: uniform_cost(model) + excess
    )
    control = "fresh" if is_drawn else "none"
    config = begun(finished, start, "auto")
    built(replace(config, model=replace(config.model, control_init=control)), tokenizer)
    assert ("nats before the first step" in caplog.text) == is_said
