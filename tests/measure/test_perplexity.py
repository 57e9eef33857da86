import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from t2i.config import DataConfig
from t2i.data.shards.reader import read_split
from t2i.errors import DataError, UserError
from t2i.measure.gradients import heldout_sequences
from t2i.measure.perplexity import by_place, data_of, measure_perplexity, write_perplexity
from t2i.runs.loading import open_model
from t2i.tokens.sequence import encode_sequence


@pytest.fixture(scope="module")
def model(finished):
    return open_model(str(finished.run_dir), needs_images=False)


@pytest.fixture(scope="module")
def results(model, finished):
    return measure_perplexity(model, config=data_of(model, shards=None, mode=None), batch_size=5)


def test_shards_that_lie_elsewhere_are_measured_as_if_they_were_here(
    model, finished, results, tmp_path, capsys
):
    settings = data_of(model, shards=None, mode=None)
    config = replace(settings, shards=tmp_path / "cache", remote=str(finished.data.shards))
    assert measure_perplexity(model, config=config, batch_size=5) == results
    said = capsys.readouterr().err
    assert "heldout losses: 100%" in said and "heldout captions: 100%" in said
    elsewhere = replace(config, shards=tmp_path / "another cache")
    assert len(heldout_sequences(model, config=elsewhere, num_sequences=2)) == 2


def test_every_kind_equals_a_twin_image_by_image(model, finished, results):
    costs = {"text": [], "image": [], "special": []}
    by_code = []
    layout = model.layout
    for sample in read_split(finished.data.shards, "heldout"):
        ids = encode_sequence(
            torch.from_numpy(sample["caption_ids"].astype("int64")),
            torch.from_numpy(sample["codes"].astype("int64")),
            layout=layout,
            mode="text-to-image",
            seq_len=90,
        )
        ids = ids[ids != layout.pad_id]
        with torch.no_grad():
            logs = model.model(ids[None]).logits[0].double().log_softmax(-1)
        row = [-float(logs[place, ids[place + 1]]) for place in range(len(ids) - 1)]
        for loss, label in zip(row, ids[1:].tolist(), strict=True):
            kind = (
                "text"
                if label < layout.num_text_rows
                else "image"
                if label >= layout.first_image_id
                else "special"
            )
            costs[kind].append(loss)
        by_code.append(
            [one for one, label in zip(row, ids[1:], strict=True) if label >= layout.first_image_id]
        )
    found = results["heldout"].to_json()
    for kind, losses in costs.items():
        assert found[kind]["tokens"] == len(losses)
        assert found[kind]["nats"] == pytest.approx(
            sum(losses) / len(losses), abs=1e-4
        )  # fp32 against double
        assert found[kind]["perplexity"] == pytest.approx(math.exp(found[kind]["nats"]))
    total = sum(sum(losses) for losses in costs.values()) / sum(len(losses) for losses in costs.values())
    assert found["total"]["nats"] == pytest.approx(total, abs=1e-4)
    means = torch.tensor(by_code).mean(0)
    assert found["image_loss_by_code"] == pytest.approx(means.tolist(), abs=1e-4)
    assert found["image_loss_by_row"][2] == pytest.approx(means[16:24].mean().item(), abs=1e-4)
    assert found["image_loss_by_column"][3] == pytest.approx(means[3::8].mean().item(), abs=1e-4)


def test_bits_a_pixel_count_the_whole_image():
    # Four codes of log 2 nats, a bit each, over four pixels.
    assert by_place(torch.full((4,), math.log(2)), image_size=2).bits_per_pixel == pytest.approx(1)
    assert "image_loss_by_row" not in by_place(torch.ones(5), image_size=2).to_json()


def test_image_only_sequences_have_no_text(model, finished):
    found = measure_perplexity(model, config=DataConfig(finished.data.shards, mode="image-only", seq_len=90))[
        "heldout"
    ]
    assert found.text is None
    assert found.image.tokens == 64 * found.num_pictures


def test_results_name_checkpoint_and_data(model, finished, results, tmp_path):
    config = data_of(model, shards=None, mode=None)
    write_perplexity(results, model=model, config=config, path=tmp_path / "perplexity.json")
    written = json.loads((tmp_path / "perplexity.json").read_text())
    assert set(written["splits"]["heldout"]) == {
        *("num_pictures", "text", "image", "special", "total", "bits_per_pixel"),
        *("image_loss_by_code", "image_loss_by_row", "image_loss_by_column", "captions", "cut_captions"),
    }
    assert set(written["splits"]["heldout"]["image"]) == {"tokens", "nats", "perplexity"}
    assert written["shards"] == str(finished.data.shards)
    assert written["splits"] == {split: costs.to_json() for split, costs in results.items()}


def test_what_cannot_be_measured_is_refused(model, finished):
    with pytest.raises(UserError, match="say with --data.shards"):
        data_of(replace(model, run_dir=None), shards=None, mode=None)
    other = replace(model, layout=replace(model.layout, codebook_size=5))
    with pytest.raises(DataError, match="has 1024 codes, 64 per image; the model of .* has 5 codes, 64"):
        measure_perplexity(other, config=DataConfig(finished.data.shards, seq_len=90))


@pytest.mark.parametrize("sizes", [{"max_position_embeddings": 64}, {}])
def test_a_language_model_that_knows_no_images_is_refused_in_a_sentence(sizes, model, finished):
    """Of a class with a number of positions, as Llama's, and of one without, as Bloom's."""
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**sizes))
    layout = replace(model.layout, codebook_size=0)
    other = replace(model, model=SimpleNamespace(config=config), layout=layout, run_dir=None)
    with pytest.raises(DataError, match="has 1024 codes, 64 per image; the model of .* has 0 codes"):
        measure_perplexity(other, config=data_of(other, shards=finished.data.shards, mode=None))


def test_shards_of_another_image_tokenizer_are_refused_though_it_has_as_many_codes(model, finished, tmp_path):
    shards = shutil.copytree(finished.data.shards, tmp_path / "shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["image_tokenizer"] = {"name": "another", "fingerprint": "0" * 64}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    config = DataConfig(shards, seq_len=90)
    with pytest.raises(DataError, match="was made with the image tokenizer another; the model of"):
        measure_perplexity(model, config=config)
    with pytest.raises(DataError, match="was made with the image tokenizer another; the model of"):
        heldout_sequences(model, config=config, num_sequences=2)


def test_a_model_without_a_run_is_measured_at_the_length_that_it_was_trained_with(model, finished):
    exported = replace(model, run_dir=None)
    assert model.model.config.sequence_length == 90
    assert data_of(exported, shards=finished.data.shards, mode=None).seq_len == 90
    model.model.config.sequence_length = 80
    try:
        assert data_of(exported, shards=finished.data.shards, mode=None).seq_len == 80
    finally:
        model.model.config.sequence_length = 90


def test_a_model_without_a_run_is_measured_in_the_form_that_it_was_trained_in(model, finished):
    alone = replace(model, run_dir=None)
    config = SimpleNamespace(**vars(model.model.config) | {"sequence_mode": "image-only"})
    asked = replace(alone, model=SimpleNamespace(config=config))
    assert data_of(asked, shards=finished.data.shards, mode=None).mode == "image-only"
    assert data_of(asked, shards=finished.data.shards, mode="text-to-image").mode == "text-to-image"
    assert data_of(alone, shards=finished.data.shards, mode=None).mode == "text-to-image"


def test_fewer_images_are_spread_and_captions_are_measured(model, finished, results):
    config = data_of(model, shards=None, mode=None)
    few = measure_perplexity(model, config=config, num_images=4)["heldout"]
    assert few.num_pictures == few.captions.num_pictures == 4
    whole = results["heldout"]
    assert whole.captions.own == pytest.approx(whole.image.nats, abs=1e-5)
    assert whole.captions.wrong != whole.captions.own != whole.captions.empty


def test_a_wording_is_measured_beside_the_usual_captions_of_the_same_images(
    model, finished, results, tmp_path, monkeypatch
):
    shards = shutil.copytree(finished.data.shards, tmp_path / "shards")
    shutil.copytree(shards / "heldout", shards / "heldout-tags")
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["counts"]["heldout-tags"] = manifest["counts"]["heldout"]
    manifest["wordings"] = {"heldout-tags": "heldout"}
    (shards / "manifest.json").write_text(json.dumps(manifest))

    def in_other_words(folder, split, **keywords):
        samples = list(read_split(folder, split, **keywords))
        if split == "heldout-tags":
            samples.reverse()  # so that only the codes tell which image is which
            for sample in samples:
                sample["caption_ids"] = sample["caption_ids"][::-1].copy()
        return samples

    monkeypatch.setattr("t2i.measure.perplexity.read_split", in_other_words)
    config = DataConfig(shards, seq_len=90)
    found = measure_perplexity(model, config=config)
    usual, words = found["heldout"], found["heldout-tags"]
    assert words.label_captions.num_pictures == words.captions.num_pictures == usual.num_pictures
    assert words.label_captions.own == pytest.approx(usual.captions.own, abs=1e-5)
    assert words.captions.own != pytest.approx(usual.captions.own, abs=1e-5)
    assert words.label_captions.empty is None and words.captions.empty is not None
    assert "label_captions" in words.to_json() and "label_captions" not in usual.to_json()
    assert usual.to_json()["cut_captions"] == 0
    short = measure_perplexity(model, config=replace(config, seq_len=72))[
        "heldout"
    ]  # two text tokens are left
    assert short.cut_captions == usual.num_pictures
