"""The server as OpenAI's own client sees it: the lines of docs/serve.md, its errors, its retries."""

import base64
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from t2i.config import SamplerConfig
from t2i.runs.loading import open_model
from t2i.serve.opening import start
from t2i.serve.stopping import accepting

openai = pytest.importorskip("openai", reason="pip install openai for these")
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
ADDRESS = "http://127.0.0.1:8000/v1"
"""What the page's lines name."""


@pytest.fixture(scope="module")
def opened(model_folder):
    return open_model(str(model_folder), needs_images=True)


@contextmanager
def served(opened, *, most_waiting=256, api_key=None):
    """Serve the model on a free port as the page's lines call it; yield the address and the server."""
    server = start(
        opened,
        sampler=SamplerConfig(),
        address=("127.0.0.1", 0),
        batch_size=2,
        most_waiting=most_waiting,
        most_images=10,
        model_name="exported",
        api_key=api_key,
    )
    with accepting(server):
        yield f"http://127.0.0.1:{server.server_port}/v1", server


def test_the_lines_of_the_page_draw_and_the_same_seed_gives_the_same_bytes(opened):
    [lines] = re.findall(r"^```\n([^`]*import OpenAI.*?)^```", PAGE.read_text(), re.M | re.S)
    assert ADDRESS in lines
    with served(opened) as (url, _):
        first, again = {}, {}
        for names in (first, again):
            exec(lines.replace(ADDRESS, url), names)
        assert list(first["files"]) == [7, 8]
        assert all(file.startswith(b"\x89PNG") for file in first["files"].values())
        assert first["files"] == again["files"]
        assert first["files"][7] != first["files"][8]
        client = first["client"]
        alone = client.images.generate(
            prompt="a red apple", extra_body={"seed": 8}
        )  # the model may be left out
        assert base64.b64decode(alone.data[0].b64_json) == first["files"][8]
        assert (first["answer"].size, first["answer"].output_format) == ("32x32", "png")
        assert [model.id for model in client.models.list()] == ["exported"]
        assert client.models.retrieve("exported").owned_by == "t2i"


def test_what_cannot_be_drawn_is_the_clients_own_error(opened):
    with served(opened) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none")
        for field, value in (
            ("n", 11),
            ("size", "1024x1024"),
            ("stream", True),
            ("background", "transparent"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                client.images.generate(model="exported", prompt="a cat", **{field: value})
            assert (refused.value.status_code, refused.value.param) == (400, field)
        with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
            client.images.generate(model="dall-e-3", prompt="a cat")


def test_a_missing_key_is_an_authentication_error(opened):
    with served(opened, api_key="secret") as (url, _):
        with pytest.raises(openai.AuthenticationError) as refused:
            openai.OpenAI(base_url=url, api_key="none").images.generate(prompt="a cat")
        assert refused.value.code == "invalid_api_key"
        assert len(openai.OpenAI(base_url=url, api_key="secret").images.generate(prompt="a cat").data) == 1


def test_a_full_queue_is_tried_again_by_the_client_itself(opened, monkeypatch):
    go = Event()

    def held(*_, **__):
        return lambda images: [b"a file"] * len(images) if go.wait(60) else []

    monkeypatch.setattr("t2i.serve.opening.batch_drawer", held)
    with served(opened, most_waiting=2) as (url, server), ThreadPoolExecutor(3) as visitors:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=10)

        def ask():
            return len(client.images.generate(prompt="a cat", n=2).data)

        waiting = server.service.waiting
        try:
            asked = [visitors.submit(ask)]
            until(lambda: waiting.num_drawing == 2)
            asked.append(visitors.submit(ask))
            until(lambda: len(waiting) == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                client.with_options(max_retries=0).images.generate(prompt="a cat")
            assert refused.value.code == "queue_full"
            asked.append(visitors.submit(ask))
            until(lambda: 'status="429"} 2' in server.service.meters.text(waiting=0))
        finally:
            go.set()
        assert [each.result(60) for each in asked] == [2, 2, 2]


def until(is_so):
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
