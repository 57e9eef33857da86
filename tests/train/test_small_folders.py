"""Twenty images of one's own: what cannot be done is said with the flag that helps, and the rest is done."""

import errno
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, config_of
from PIL import Image

from t2i.config import ASSETS, AlignConfig, AlignRun, DataConfig, PrepareConfig, TrainConfig
from t2i.data.loader import StepLoader
from t2i.data.prepare.images import prepare
from t2i.data.shards.manifest import read_manifest
from t2i.data.shards.reader import read_split
from t2i.data.sources import open_source, reopen_source
from t2i.errors import DataError, UserError
from t2i.measure.gradients import heldout_sequences
from t2i.measure.heldout_images import heldout_halves
from t2i.report.run import write_report
from t2i.runs.run_folder import read_status
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train import main as run_main
from t2i.train import periodic
from t2i.train.align import align
from t2i.train.main import train

COUNT = 20


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Shards of twenty images, of which none is held out."""
    folder = tmp_path_factory.mktemp("small") / "images"
    folder.mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}")
    prepare(
        open_source(str(folder), heldout_share=0.0),
        out=folder.with_name("shards"),
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        text_tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        config=PrepareConfig(),
    )
    return folder.with_name("shards")


def test_a_run_with_nothing_held_out_draws_captions_of_training_and_says_so(small, tmp_path, caplog):
    config = config_of(small, tmp_path / "run", max_steps=2, sample_every=2, eval_every=2)
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    captions = (config.run_dir / "samples" / "captions.txt").read_text().splitlines()
    assert captions and set(captions) <= {sample["caption"] for sample in read_split(small, "train")}
    assert (config.run_dir / "samples" / "step_000002.png").is_file()
    assert read_status(config.run_dir).state == "done"
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "holds nothing out, so samples are drawn from captions of training images" in said
    assert (
        "holds nothing out, so there is no held-out loss and no score. Prepare with `--heldout-share" in said
    )
    page = write_report(config.run_dir).read_text()
    assert "these are captions of training images" in page and "None of these images" not in page
    assert "drawn at step 2" in page
    with pytest.raises(
        DataError, match="has 0 held-out images; a distance needs at least 20. It has 20 images in all"
    ):
        heldout_halves(reopen_source(read_manifest(small)), num_samples=None)


def test_what_needs_held_out_pairs_says_how_to_have_them(small, tmp_path, one_process):
    run = AlignRun(tmp_path / "aligned", data=DataConfig(small), model="none", align=AlignConfig(num_pairs=8))
    with pytest.raises(DataError, match="holds out 0 pairs; .* Prepare with a larger --heldout-share"):
        align(run)
    sizes = read_manifest(small)
    model = SimpleNamespace(
        layout=VocabLayout(2048, 2048, sizes.codebook_size),
        model=SimpleNamespace(config=SimpleNamespace(codes_per_image=sizes.codes_per_image)),
        home=tmp_path,
    )
    with pytest.raises(DataError, match="has no held-out pairs; prepare with a larger --heldout-share"):
        heldout_sequences(model, config=DataConfig(small), num_sequences=4)


def test_a_step_of_more_sequences_than_there_are_names_the_value_that_fits(small):
    manifest = read_manifest(small)
    settings = {
        "layout": VocabLayout(2048, 2048, manifest.codebook_size),
        "world_size": 1,
        "seed": 0,
        "tokenizer": TextTokenizer.load(ASSETS / "text_tokenizer"),
    }
    config = DataConfig(small, seq_len=96)
    with pytest.raises(UserError, match=f"has {COUNT} training sequences; one step takes 32") as refusal:
        StepLoader(config, global_batch=32, **settings)
    tokens = int(re.search(r"`--train.global-batch-tokens (\d+)` makes a step of 20", str(refusal.value))[1])
    assert tokens == COUNT * 96
    StepLoader(config, global_batch=tokens // 96, **settings)


@pytest.mark.parametrize(("steps", "is_said"), [(62, False), (63, True), (1_600, True)])
def test_a_run_that_would_learn_its_images_by_heart_is_told_how_many_steps_it_needs(
    small, caplog, steps, is_said
):
    inputs = SimpleNamespace(manifest=read_manifest(small))
    config = TrainConfig(max_steps=steps, global_batch_tokens=32 * 96)
    periodic._say_what_is_small(config, data=DataConfig(small, seq_len=96), inputs=inputs)
    said = [record.getMessage() for record in caplog.records if "times" in record.getMessage()]
    assert bool(said) == is_said
    if said:
        assert "`--train.max-steps 62` trains 100 times on each" in said[0]


def test_a_grid_and_an_end_that_find_no_room_end_no_run(small, tmp_path, caplog, monkeypatch):
    config = config_of(small, tmp_path / "run", max_steps=2, sample_every=1, eval_every=0)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = run_main.write_status
    monkeypatch.setattr(periodic, "whole_file", full)
    monkeypatch.setattr(
        run_main, "write_status", lambda *a, **k: (full if k["state"] == "done" else real)(*a, **k)
    )
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be written: No space left on device" in one for one in said) == 2
    assert any("status.json cannot say that the run is done: No space" in one for one in said)
    assert (config.run_dir / "checkpoints" / "step_000002").is_dir()
