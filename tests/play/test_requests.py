"""What a browser may ask of the page, asked by hand: Gradio's own routes, without a browser."""

import json
import shutil
import tempfile
from contextlib import contextmanager

import pytest
from PIL import Image

from t2i.config import SamplerConfig
from t2i.generate.image_files import png_text
from t2i.play.opening import open_page
from t2i.runs.loading import open_model

pytest.importorskip("gradio", reason="pip install '.[play]' for these")
from starlette.testclient import TestClient

FACTS = {"caption": "a cat", "seed": 7, **vars(SamplerConfig(guidance_scale=12.0, top_k=2_000, top_p=0.001))}


class Asked:
    """A page, and what it answers to one visitor."""

    def __init__(self, client):
        self.client, self.config = client, client.get("/config").json()

    def component(self, name):
        """Find the first component of a class."""
        components = self.config["components"]
        return next(each for each in components if name in (each["props"].get("elem_classes") or []))

    def event(self, component, data):
        """Let the event happen that begins with a component's value and takes so many; return how it ended."""
        event = next(
            each
            for each in self.config["dependencies"]
            if each["inputs"][:1] == [component["id"]] and len(each["inputs"]) == len(data)
        )
        asked = {"data": data, "fn_index": event["id"], "session_hash": "me"}
        assert self.client.post("/gradio_api/queue/join", json=asked).status_code == 200
        with self.client.stream("GET", "/gradio_api/queue/data?session_hash=me") as said:
            for line in said.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("there was no end")

    def upload(self, path):
        with path.open("rb") as file:
            [kept] = self.client.post("/gradio_api/upload", files={"files": (path.name, file)}).json()
        return as_file(kept)


def as_file(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@contextmanager
def asked(folder, **how):
    settings = {
        "reference": None,
        "sampler": SamplerConfig(),
        "batch_size": 1,
        "most_images": 2,
        "most_waiting": 4,
    }
    models = [open_model(str(folder), needs_images=True)]
    with (
        open_page(models, **{**settings, **how}) as page,
        TestClient(page.application, base_url="http://localhost") as client,
    ):
        yield Asked(client)


@pytest.fixture
def drawn(tmp_path):
    path = tmp_path / "drawn.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=png_text(FACTS))
    return path


def test_a_browser_cannot_name_a_file_that_it_did_not_upload(model_folder, drawn):
    with asked(model_folder) as page:
        dropped = page.component("dropped")
        stolen = page.event(dropped, [as_file(drawn)])
        assert not stolen["success"] and "a cat" not in str(stolen)
        given = page.event(dropped, [page.upload(drawn)])
        assert given["success"] and given["output"]["data"][0] == "a cat"


def test_settings_beyond_the_sliders_can_be_drawn_with(model_folder, drawn):
    beyond = SamplerConfig(guidance_scale=11.0, temperature=2.5, top_k=5_000, top_p=0.005)
    with asked(model_folder, sampler=beyond) as page:
        prompt = page.component("prompt")  # of the tab that draws
        assert page.event(prompt, ["a cat", 1, "7", *vars(beyond).values()])["success"]
        of_file = page.event(page.component("dropped"), [page.upload(drawn)])["output"]["data"]
        assert [slider["value"] for slider in of_file[3:7]] == [*FACTS.values()][2:]
        ended = page.event(prompt, ["a cat", 1, "7", *[*FACTS.values()][2:]])
        assert ended["success"] and "Drawn: 16 of 16" in str(ended["output"])


def copy_of(run_dir, folder):
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("engine", "samples"))
    (folder / "samples").mkdir()
    for step in (3, 6):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"step_{step:06d}.png")
    return folder


def test_the_grids_of_a_run_are_shown_wherever_it_lies(finished, tmp_path, monkeypatch):
    run = copy_of(finished.run_dir, tmp_path / "run")
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with asked(run) as page:
        ended = page.event(page.component("steps"), [0])
        assert ended["success"]
        shown = ended["output"]["data"][0]["value"]
        assert page.client.get(shown["url"]).status_code == 200
        for path in ("status.json", "resolved.yaml"):
            assert page.client.get(f"/gradio_api/file={run / path}").status_code == 403


@pytest.mark.parametrize("broken", ["status.json", "data_manifest.json", "resolved.yaml"])
def test_a_page_opens_beside_a_run_that_cannot_be_read(finished, tmp_path, broken):
    run = copy_of(finished.run_dir, tmp_path / "run")
    (run / broken).write_text("train: {}\n" if broken == "resolved.yaml" else "{")
    with asked(run) as page:
        said = [each["props"].get("value") for each in page.config["components"]]
        [found] = [text for text in said if str(text).startswith("The run cannot be shown: ")]
        assert broken in found
