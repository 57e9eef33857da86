"""The same seed gives the same image: by `t2i sample`, diffusers' pipeline, the server, the page; in every batch."""

import base64
import io
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from t2i.config import SampleConfig, SamplerConfig
from t2i.generate.sample import draw_codes, draw_folder, drawer_of
from t2i.play.asked import Drawing
from t2i.play.drawing import draw_by_rows
from t2i.play.opening import painters_of
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.serve.drawing import batch_drawer, cut_caption
from t2i.serve.opening import check_exposure, start
from t2i.serve.stopping import accepting
from t2i.serve.waiting import Asked

CAPTIONS = [f"picture {index} of a cat" for index in range(6)]
SEED = 40


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_one_seed_gives_one_image_by_all_ways_and_at_each_batch_size(opened, tmp_path):
    export(opened, out=tmp_path / "exported", command="a test")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + index) for index in range(len(CAPTIONS))]
    by_pipe = pipe(CAPTIONS, generator=generators).images
    for size in (1, 2, 6):
        out = tmp_path / f"sampled_{size}"
        captions = {str(index): caption for index, caption in enumerate(CAPTIONS)}
        paths = draw_folder(opened, captions, out=out, config=SampleConfig(seed=SEED), batch_size=size)
        draw = batch_drawer(opened, sampler=SamplerConfig(), batch_size=size)
        by_server = [draw([Asked(text, SEED + index)])[0] for index, text in enumerate(CAPTIONS)]
        [painter] = painters_of([opened], batch_size=size)
        drawings = [Drawing(text, 1, SEED + index, SamplerConfig()) for index, text in enumerate(CAPTIONS)]
        by_page = [[*draw_by_rows(painter, each, given_up=Event())][-1].files[0] for each in drawings]
        assert by_page == by_server
        for path, file, image in zip(paths, by_server, by_pipe, strict=True):
            # Rounding of the image tokenizer moves a pixel by 1; another code would move some by 4 at least.
            assert np.abs(pixels(path) - np.asarray(image)).max() <= 1
            assert np.abs(pixels(path) - pixels(io.BytesIO(file))).max() <= 1


def test_codes_of_the_pipeline_are_those_of_sample(opened, tmp_path):
    export(opened, out=tmp_path / "exported", command="a test")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    drawer = drawer_of(opened, settings=SampleConfig(seed=SEED, window=1))
    generator = torch.Generator().manual_seed(SEED)
    assert torch.equal(
        pipe(CAPTIONS, generator=generator, output_type="latent").images, draw_codes(drawer, CAPTIONS)
    )


def test_a_batch_of_the_server_gives_the_same_file_at_every_place_and_beside_anything(opened):
    draw = batch_drawer(opened, sampler=SamplerConfig(), batch_size=4)
    one = Asked("a red apple", 5)
    alone = draw([one])[0]
    for place in range(4):
        others = [Asked(f"something else {index} " * index, 100 * index) for index in range(3)]
        assert draw([*others[:place], one, *others[place:]])[place] == alone
    assert draw([Asked("a red apple", 6)])[0] != alone
    facts = Image.open(io.BytesIO(alone)).text
    assert (facts["caption"], facts["seed"], facts["guidance_scale"]) == ("a red apple", "5", "2.0")


def test_fifty_clients_get_what_one_alone_gets(opened):
    how = {"sampler": SamplerConfig(), "batch_size": 4, "most_waiting": 256, "most_images": 10}
    server = start(opened, address=("127.0.0.1", 0), **how)

    def drawn(seed):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}/v1/images/generations",
            data=json.dumps({"prompt": CAPTIONS[seed % 6], "seed": seed}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return base64.b64decode(json.load(answer)["data"][0]["b64_json"])

    with accepting(server), ThreadPoolExecutor(50) as clients:
        together = list(clients.map(drawn, range(50)))
        assert [drawn(seed) for seed in (0, 17, 49)] == [together[seed] for seed in (0, 17, 49)]
    assert len(set(together)) == 50


def test_a_prompt_is_cut_to_what_the_model_reads(opened):
    long = cut_caption(opened, "a cat " * 100)
    assert "a cat a cat" in long
    assert len(long) < 300
    assert cut_caption(opened, "a cat") == "a cat"


def test_other_machines_need_a_key(opened):
    from t2i.errors import UserError

    with pytest.raises(UserError, match="--host is 0.0.0.0.*T2I_API_KEY"):
        check_exposure("0.0.0.0", api_key=None)
    check_exposure("0.0.0.0", api_key="secret")
    how = {"sampler": SamplerConfig(), "batch_size": 1, "most_waiting": 1, "most_images": 1}
    first = start(opened, address=("127.0.0.1", 0), **how)
    with accepting(first), pytest.raises(UserError, match="cannot be listened at"):
        start(opened, address=("127.0.0.1", first.server_port), **how)
