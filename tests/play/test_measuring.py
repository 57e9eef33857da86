"""The caption's worth, completions, and a run that is watched."""

import math
import shutil
from dataclasses import replace
from threading import Event, Lock

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.errors import UserError
from t2i.generate.best_of import caption_gains
from t2i.play.texts import MOST_TOKENS, Origin, complete_both
from t2i.play.watching import grids_of, is_watchable, version_of, watch
from t2i.play.worth import HELPS, HURTS, SHOWN_PIXELS, Worth, worth_of
from t2i.runs.checkpoint_manifest import read_checkpoint_manifest
from t2i.runs.loading import open_model
from t2i.runs.metrics_log import append_metrics
from t2i.runs.run_folder import write_status
from t2i.tokens.image import to_pixels
from t2i.tokens.sequence import prompt


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


def test_the_worth_of_places_adds_up_to_that_of_the_image(opened):
    torch.manual_seed(1)
    image = Image.fromarray(torch.randint(256, (48, 64, 3), dtype=torch.uint8).numpy())
    worth = worth_of(opened, "a red apple", image)
    assert worth.by_place.shape == (4, 4) and worth.image.size == (32, 32)
    codes = opened.needed_image_tokenizer().encode(to_pixels([worth.image]))
    ids = opened.text_tokenizer.encode("a red apple")
    prompts = [prompt(each, layout=opened.layout).tolist() for each in (ids, torch.tensor([]))]
    gain = caption_gains(opened.model, prompts[:1], codes, null_prompt=prompts[1], layout=opened.layout)
    assert math.isclose(worth.by_place.sum().item(), gain.item(), abs_tol=1e-4)
    assert worth.by_place.abs().max() > 0
    assert worth_of(opened, "", image).by_place.abs().max() < 1e-4  # the null caption is worth nothing


def test_a_heat_map_is_red_where_the_caption_helps_and_blue_where_it_hurts():
    by_place = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    shown = np.asarray(Worth(by_place, Image.new("RGB", (32, 32), (10, 250, 10))).heat_map()).astype(int)
    assert len(shown) >= SHOWN_PIXELS and shown.shape[0] == shown.shape[1]
    first, last, middle = shown[5, 5], shown[-5, -5], shown[5, -5]
    assert first[0] > first[2] + 50 and last[2] > last[0] + 50
    assert len(set(middle)) == 1  # grey: no worth, no colour
    assert np.abs(first - HELPS).max() < np.abs(first - HURTS).max()


def test_the_worth_of_a_whole_image_is_said():
    said = Worth(torch.tensor([[2.0, -1.0], [0.5, 0.5]]), Image.new("RGB", (32, 32))).status()
    assert said.startswith("+2.0 nats, +0.500 per code; it helps at 75% of the places, by at most 2.00 nats")
    flat = Worth(torch.zeros(2, 2), Image.new("RGB", (32, 32)))
    assert np.isfinite(np.asarray(flat.heat_map())).all()


def test_a_model_that_reads_no_captions_says_so(opened, monkeypatch):
    monkeypatch.setattr(opened.model.config, "sequence_mode", "image-only")
    with pytest.raises(UserError, match="reads no captions"):
        worth_of(opened, "a cat", Image.new("RGB", (32, 32)))


def completed(opened, origin, text="To be or", tokens=5):
    how = {"max_new_tokens": tokens, "is_chat": False, "busy": Lock(), "given_up": Event()}
    return list(complete_both(opened, origin, text, **how))


def test_a_text_is_completed_by_both_models_without_image_codes(opened, model_folder):
    first, both = completed(opened, Origin(opened, asked=str(model_folder)))
    assert first.own and not first.origin
    assert both.own == both.origin == first.own  # one folder under two names
    ids = opened.text_tokenizer.encode(both.own)
    assert len(ids) and ids.max() < opened.layout.num_text_tokens


def test_where_the_model_came_from_is_said_if_it_is_not_known(opened, tmp_path):
    unknown = Origin(opened, asked=None)
    assert not unknown.name and "--reference" in unknown.why_not
    assert "--reference" in completed(opened, unknown)[-1].origin
    gone = completed(opened, Origin(opened, asked=str(tmp_path / "gone")))[-1]
    assert gone.own and "cannot be opened" in gone.origin


def test_a_run_knows_where_its_model_came_from(finished):
    run = open_model(str(finished.run_dir), needs_images=True)
    assert "randomly initialised" in Origin(run, asked=None).why_not


def test_texts_that_are_too_long_are_refused(opened):
    origin = Origin(opened, asked=None)
    with pytest.raises(UserError, match="prompt has 4,001 characters"):
        completed(opened, origin, text="x" * 4_001)
    with pytest.raises(UserError, match=f"expected 1 to {MOST_TOKENS}"):
        completed(opened, origin, tokens=MOST_TOKENS + 1)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run's record, to be changed."""
    folder = tmp_path / "run"
    shutil.copytree(
        finished.run_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "engine", "*.pt")
    )
    return folder


def test_a_finished_run_shows_its_curves_and_what_it_cost(run):
    assert is_watchable(run) and not is_watchable(None) and not is_watchable(run / "samples")
    watched = watch(run, price=2.0)
    assert set(watched.curves) == {"image", "text"} and watched.curves["image"].startswith("<svg")
    assert (watched.forecast.state, watched.forecast.step, watched.forecast.max_steps) == ("done", 6, 6)
    said = watched.forecast.lines(now=0)
    assert said[0].startswith("done: step 6 of 6, ") and len(said) == 2
    assert "device-hours on 1 process, 0.0" in said[1] and "US dollars" in said[1]
    assert "dollars" not in watch(run).forecast.lines(now=0)[1]


def test_a_run_that_trains_says_when_it_ends(run):
    before = version_of(run)
    resolved = (run / "resolved.yaml").read_text().replace("max_steps: 6", "max_steps: 1000")
    (run / "resolved.yaml").write_text(resolved)
    write_status(run, state="running", step=100, next_command="")
    # An early slow step, then a steady pace of 36 s.
    rows = [
        {"step": step, "tokens": step, "seconds": 36.0 * step, "step_seconds": 900.0 if step < 50 else 36.0}
        for step in range(7, 101)
    ]
    append_metrics(run, *rows)
    assert version_of(run) != before
    forecast = watch(run, price=2.0).forecast
    assert (forecast.step, forecast.seconds_left) == (100, 36.0 * 900)
    assert math.isclose(forecast.hours, 10)
    said = forecast.lines(now=0)
    assert "9 h 00 min are left at the pace of the last 50 steps: until Thursday" in said[1]
    assert said[2] == "It takes 10.00 device-hours on 1 process, 20.00 US dollars."


def test_grids_are_in_the_order_of_their_steps_and_captions_are_text(run):
    samples = run / "samples"
    samples.mkdir(exist_ok=True)
    for step in (1_000_000, 6, 200):
        Image.new("RGB", (8, 8)).save(samples / f"step_{step:06d}.png")
    (samples / "captions.txt").write_text("<b>a cat</b>\na dog\n")
    assert list(grids_of(run)) == [6, 200, 1_000_000]
    assert watch(run).captions == ["<b>a cat</b>", "a dog"]


def test_a_run_on_two_ranks_costs_twice(run):
    one = watch(run, price=1.0).forecast
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    manifest = read_checkpoint_manifest(newest)
    two = replace(manifest, facts=replace(manifest.facts, world_size=2))
    (newest / "manifest.json").write_text(two.text())
    said = watch(run, price=1.0).forecast.lines(now=0)[1]
    assert f"{2 * one.hours:,.2f} device-hours on 2 processes" in said
