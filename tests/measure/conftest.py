"""A COCO-shaped folder, and a stand-in for Inception's file."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from t2i.measure import features

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
