"""An exported folder as diffusers' pipeline: the lines that people type first, without t2i."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from t2i.model.open_lm import language_model_t2i
from t2i.model.open_lm.pipeline_t2i import sampler_of, seeds_of
from t2i.runs.export import export
from t2i.runs.loading import open_model


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(open_model(str(model_folder), needs_images=True), out=out, command="a test")
    return out


@pytest.fixture(scope="module")
def pipe(exported):
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_images_come_in_every_form(pipe):
    how = {"num_images_per_prompt": 2, "guidance_scale": 3}
    images = pipe(["a cat", "a dog"], generator=seeded(7), **how).images
    assert [image.size for image in images] == [(32, 32)] * 4
    arrays = pipe(["a cat", "a dog"], generator=seeded(7), output_type="np", **how).images
    tensors = pipe(["a cat", "a dog"], generator=seeded(7), output_type="pt", return_dict=False, **how)[0]
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert np.array_equal((arrays * 255).round(), np.stack([np.asarray(image) for image in images]))
    codes = pipe(["a cat", "a dog"], generator=seeded(7), output_type="latent", **how).images
    assert codes.shape == (4, 16)
    alone = pipe("a dog", generator=seeded(9), output_type="latent", **how).images
    assert torch.equal(codes[2:], alone)  # image i has seed 7 + i


def test_a_window_draws_the_same_image_in_fewer_passes(pipe, monkeypatch):
    sampler, windows = sampler_of(pipe.language_model), []
    by_window = sampler.sample_by_window

    def spy(*given, pace, **rest):
        windows.append(pace)
        return by_window(*given, pace=pace, **rest)

    monkeypatch.setattr(sampler, "sample_by_window", spy)
    one_by_one = pipe("a cat", generator=seeded(7), output_type="latent").images
    assert windows == []
    several = pipe("a cat", generator=seeded(7), output_type="latent", window=4).images
    assert windows == [4] and torch.equal(several, one_by_one)


def test_offloaded_parts_are_brought_to_their_device_before_they_are_used(pipe, monkeypatch):
    """The hooks of enable_model_cpu_offload wait for a part's forward, which the sampler does not call."""
    happened = []

    def note(name):
        return SimpleNamespace(pre_forward=lambda module: happened.append(name))

    sampler = sampler_of(pipe.language_model)
    for name, function in (("draw", "caption_codes"), ("decode", "codes_to_pixels")):
        own = getattr(sampler, function)

        def spied(*given, name=name, own=own, **rest):
            happened.append(name)
            return own(*given, **rest)

        monkeypatch.setattr(sampler, function, spied)
    for part in ("language_model", "image_tokenizer"):
        monkeypatch.setattr(getattr(pipe, part), "_hf_hook", note(part), raising=False)
    pipe("a cat")
    assert happened[:4] == ["language_model", "draw", "image_tokenizer", "decode"]
    with pytest.raises(NotImplementedError, match=r"expected enable_model_cpu_offload\(\)"):
        pipe.enable_sequential_cpu_offload()


def test_each_step_is_told_of_and_may_be_the_last(pipe):
    seen = []

    def look(pipeline, step, timestep, given):
        seen.append((step, tuple(given["codes"].shape)))
        pipeline._interrupt = step == 3

    codes = pipe("a cat", generator=seeded(1), output_type="latent", callback_on_step_end=look).images
    assert seen == [(step, (1, step + 1)) for step in range(4)]
    whole = pipe("a cat", generator=seeded(1), output_type="latent").images
    assert torch.equal(codes[:, :4], whole[:, :4])
    assert not codes[:, 4:].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 64}, "height is 64; expected 32"),
        ({"num_inference_steps": 50}, "num_inference_steps is 50; expected 16"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": []}, "prompt is"),
        ({"prompt": [3]}, "prompt is"),
        ({"generator": [seeded(1), seeded(2)]}, "expected one for each of 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "has latents; expected codes alone"),
        # Each of these would draw something, and nobody would know that it is noise.
        ({"guidance_scale": -1}, "guidance_scale is -1; expected a finite number >= 0"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"temperature": -0.5}, "temperature is -0.5; expected a finite number >= 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; expected a whole number >= 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0; expected a number > 0 and <= 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_what_this_model_cannot_draw_by_is_an_error(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **wrong})


def test_a_new_generators_seed_is_the_images_and_a_used_one_gives_others():
    generator = seeded(7)
    assert seeds_of(generator, num_images=3) == [7, 8, 9]
    others = seeds_of(generator, num_images=3)
    assert not set(others) & {7, 8, 9}
    assert seeds_of([seeded(7), seeded(2)], num_images=2) == [7, 2]
    torch.manual_seed(3)
    first = seeds_of(None, num_images=2)
    assert first != seeds_of(None, num_images=2)
    torch.manual_seed(3)
    assert first == seeds_of(None, num_images=2)


def test_code_is_run_only_where_it_is_trusted(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported)


def test_the_index_names_every_part(exported):
    index = json.loads((exported / "model_index.json").read_text())
    parts = [key for key in index if not key.startswith("_")]
    assert parts == ["language_model", "tokenizer", "image_tokenizer"]
    assert (exported / f"{index['_class_name'][0]}.py").is_file()
    assert (exported / "language_model" / f"{index['language_model'][0]}.py").is_file()


def test_a_folder_in_the_hubs_cache_is_completed_before_it_is_opened(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        language_model_t2i, "snapshot_download", lambda *name, **how: asked.append((name, how))
    )
    home = tmp_path / "models--user--a--name" / "snapshots" / "c0ffee"
    assert language_model_t2i.complete(home) == home
    assert asked == [(("user/a--name",), {"revision": "c0ffee", "cache_dir": tmp_path})]
    assert language_model_t2i.complete(Path("exported").absolute()) and len(asked) == 1


def test_a_class_of_transformers_own_draws_by_the_file_beside_it(tmp_path):
    (tmp_path / "draw.py").write_text("def draw():\n    pass\n\ndef caption_codes():\n    return 1\n")
    assert sampler_of(SimpleNamespace(name_or_path=str(tmp_path))).caption_codes() == 1
    with pytest.raises(ValueError, match="has no sampler"):
        sampler_of(SimpleNamespace(name_or_path=str(tmp_path / "elsewhere")))
