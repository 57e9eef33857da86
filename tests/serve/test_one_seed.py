"""The same seed gives the same image: by `t2i sample`, diffusers' pipeline, the server, the page; in every batch."""

import base64
import io
import json
import math
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModelForCausalLM

from t2i.config import SampleConfig, SamplerConfig
from t2i.generate.best_of import caption_gains
from t2i.generate.sample import draw_codes, draw_folder, drawer_of
from t2i.play.asked import Drawing
from t2i.play.drawing import draw_by_rows
from t2i.play.opening import painters_of
from t2i.play.worth import worth_of
from t2i.runs.export import export
from t2i.runs.loading import open_model
from t2i.serve.drawing import OneShape, batch_drawer, cut_caption, room_of
from t2i.serve.opening import check_exposure, start
from t2i.serve.stopping import accepting
from t2i.serve.waiting import Asked
from t2i.tokens.image import to_pixels
from t2i.tokens.sequence import prompt as prompt_of

CAPTIONS = [f"picture {index} of a cat" for index in range(6)]
SEED = 40


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


def asked(server, **fields):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.server_port}/v1/images/generations",
        data=json.dumps(fields).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


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


def codes_of_draw(model, captions, *, pipe, seed):
    """Draw as an exported folder's card says; return the codes (B, K) that its image tokenizer is given."""
    with patch.object(pipe.image_tokenizer, "decode", wraps=pipe.image_tokenizer.decode) as decode:
        model.draw(
            captions, tokenizer=pipe.tokenizer, image_tokenizer=pipe.image_tokenizer, seed=seed, window=1
        )
    return decode.call_args.args[0].unflatten(0, (len(captions), -1))


def test_one_seed_gives_the_same_codes_by_all_ways_and_at_each_batch_size(opened, tmp_path):
    export(opened, out=tmp_path / "exported", command="a test")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    drawer = drawer_of(opened, settings=SampleConfig(seed=SEED, window=1))
    whole = draw_codes(drawer, CAPTIONS)  # (6, K)
    assert len(whole.unique(dim=0)) == len(CAPTIONS)
    for size in (1, 2, 6):
        shape, found = OneShape(opened, batch_size=size), []
        for at in range(0, len(CAPTIONS), size):
            captions, seed = CAPTIONS[at : at + size], SEED + at
            images = [Asked(text, seed + index) for index, text in enumerate(captions)]
            generator = torch.Generator().manual_seed(seed)
            ways = {
                "sample": draw_codes(drawer, captions, first_seed=seed),
                "server": shape.codes(images, sampler=SamplerConfig()),
                "pipeline": pipe(captions, generator=generator, output_type="latent").images,
                "draw": codes_of_draw(model, captions, pipe=pipe, seed=seed),
            }
            found.append(ways)
        for way in found[0]:
            assert torch.equal(torch.cat([ways[way] for ways in found]), whole), f"{way}, {size} at a time"


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
        [answer] = asked(server, prompt=CAPTIONS[seed % 6], seed=seed)["data"]
        return base64.b64decode(answer["b64_json"])

    with accepting(server), ThreadPoolExecutor(50) as clients:
        together = list(clients.map(drawn, range(50)))
        assert [drawn(seed) for seed in (0, 17, 49)] == [together[seed] for seed in (0, 17, 49)]
    assert len(set(together)) == 50


def test_a_prompt_is_cut_to_what_the_model_reads(opened):
    long = cut_caption(opened, "a cat " * 100)
    assert "a cat a cat" in long
    assert len(long) < 300
    assert cut_caption(opened, "a cat") == "a cat"


def test_a_prompt_that_is_cut_within_a_letter_gives_one_image_by_all_ways(opened, tmp_path):
    prompt = "\U0001f9ff" * 60
    read = cut_caption(opened, prompt)
    ids = [opened.text_tokenizer.encode(text)[: room_of(opened)].tolist() for text in (prompt, read)]
    assert ids[0] != ids[1]  # what a part of a letter is shown as is another text
    sampler = SamplerConfig(temperature=0)
    paths = draw_folder(opened, {"0": prompt}, out=tmp_path, config=SampleConfig(temperature=0), batch_size=1)
    server = start(
        opened, sampler=sampler, address=("127.0.0.1", 0), batch_size=1, most_waiting=1, most_images=1
    )
    with accepting(server):
        [answer] = asked(server, prompt=prompt, seed=SEED)["data"]
    by_server = base64.b64decode(answer["b64_json"])
    assert answer["revised_prompt"] == read
    [painter] = painters_of([opened], batch_size=1)
    by_page = [*draw_by_rows(painter, Drawing(prompt, 1, SEED, sampler), given_up=Event())][-1].files[0]
    assert by_server == by_page
    assert np.abs(pixels(paths[0]) - pixels(io.BytesIO(by_server))).max() <= 1
    image = Image.open(paths[0])
    codes = opened.needed_image_tokenizer().encode(to_pixels([image]))
    prompts = [prompt_of(torch.tensor(text), layout=opened.layout).tolist() for text in (ids[0], [])]
    gain = caption_gains(opened.model, prompts[:1], codes, null_prompt=prompts[1], layout=opened.layout)
    assert math.isclose(worth_of(opened, prompt, image).by_place.sum().item(), gain.item(), abs_tol=1e-4)


def test_more_images_than_may_wait_are_not_said_to_come_later(opened):
    how = {"sampler": SamplerConfig(), "batch_size": 1, "most_waiting": 3, "most_images": 10}
    with accepting(start(opened, address=("127.0.0.1", 0), **how)) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(server, prompt="a cat", n=4)
        assert "n is 4; expected a whole number from 1 to 3" in refused.value.read().decode()
        assert len(asked(server, prompt="a cat", n=3)["data"]) == 3


def test_other_machines_need_a_key(opened):
    from t2i.errors import UserError

    with pytest.raises(UserError, match="--host is 0.0.0.0.*T2I_API_KEY"):
        check_exposure("0.0.0.0", api_key=None)
    check_exposure("0.0.0.0", api_key="secret")
    how = {"sampler": SamplerConfig(), "batch_size": 1, "most_waiting": 1, "most_images": 1}
    first = start(opened, address=("127.0.0.1", 0), **how)
    with accepting(first), pytest.raises(UserError, match="cannot be listened at"):
        start(opened, address=("127.0.0.1", first.server_port), **how)
