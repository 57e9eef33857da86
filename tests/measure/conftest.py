"""A COCO-shaped folder, a stand-in for Inception's file, and one for a reward service."""

import base64
import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from t2i.measure import features
from t2i.measure.judge_wire import request_of
from t2i.measure.remote_judge import RemoteJudge

NUM_IMAGES = 24


def write_coco(folder: Path, *, num_pictures: int = NUM_IMAGES) -> Path:
    """Write smooth JPEGs of many shapes, the first grey, the second CMYK; five captions each, ids out of order."""
    rng = np.random.default_rng(0)
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number, image_id in enumerate(rng.permutation(900)[:num_pictures].tolist()):
        name = f"COCO_val2014_{image_id:012d}.jpg"
        corners = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
        picture = corners.resize((40 + number, 64 - number), Image.Resampling.BICUBIC)
        picture.convert({0: "L", 1: "CMYK"}.get(number, "RGB")).save(folder / "val2014" / name)
        images.append({"id": image_id, "file_name": name, "width": picture.width, "height": picture.height})
        for turn in range(5):
            caption = f"Sentence {turn} about\n picture {image_id}. "
            annotations.append({"id": 10 * image_id + 4 - turn, "image_id": image_id, "caption": caption})
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


class Mark(nn.Module):
    """Says on stdout that loading has run the file's code."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool) -> None:
        print("code of the file ran")
        self.training = training


class StubInception(nn.Module):
    """The interface of the real TorchScript file with one small layer."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.mark = Mark()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, dims))

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        resized = nn.functional.interpolate(img, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((self.mark(resized) - 128) / 128)


def write_inception(path: Path, monkeypatch: pytest.MonkeyPatch, *, dims: int) -> Path:
    """Write a stub whose SHA-256 is the pinned one."""
    torch.manual_seed(0)
    torch.jit.script(StubInception(dims)).save(str(path))
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(features, "INCEPTION_DIMS", dims)
    return path


@pytest.fixture
def inception_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_inception(tmp_path / "inception-2015-12-05.pt", monkeypatch, dims=2048)


@pytest.fixture
def narrow_inception_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with 32 features, whose distances take no time."""
    return write_inception(tmp_path / "inception-2015-12-05.pt", monkeypatch, dims=32)


class Service:
    """A reward service whose score is the image's brightness plus a hundred per letter of its caption."""

    def __init__(self):
        self.bodies, self.answers, self.paths = [], [], []
        self.pause, self.revision = 0.0, ""

    def score(self, body):
        results = []
        for request in body["requests"]:
            (turn,) = request["history"]
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(turn["image_b64"]))))
            (reward,) = request["required_rewards"]
            results.append({reward: {reward: float(image.mean()) + 100 * len(turn["text"]), "style": 1}})
        stated = [{"scorer_version": self.revision}] * len(results) if self.revision else []
        return {"results": results, "errors": [{} for _ in results], "identities": stated}

    def score_of(self, images, captions):
        """Answer for images as it would be asked."""
        pairs = zip(images, captions, strict=True)
        return self.score(
            {"requests": [request_of(Image.fromarray(each), text, reward="hpsv3") for each, text in pairs]}
        )

    def reply(self, path, body):
        """Take the next prepared answer, a status and what is said with it; else the right one."""
        if self.answers:
            return self.answers.pop(0)
        if path == "/rewards":
            return 200, {"rewards": ["hpsv3", "pickscore"]}
        return 200, self.score(body)


@pytest.fixture
def service():
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.bodies.append(body)
            self.answer(body)

        def answer(self, body):
            service.paths.append(self.path)
            time.sleep(service.pause)
            status, said = service.reply(self.path, body)
            text = said if isinstance(said, bytes) else json.dumps(said).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except OSError:
                pass  # the client did not wait

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    yield service
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def judge(service):
    return RemoteJudge(service.url, "hpsv3", revision="v3.0", wait_seconds=0.01)
