"""Codes that are aligned to a vision encoder: what it sees in each place, of which networks, and a training with it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
)

from t2i.data.sources import open_source
from t2i.errors import UserError
from t2i.image_tokenizer import alignment as alignments
from t2i.image_tokenizer.alignment import (
    Alignment,
    SentenceEncoder,
    VisionTarget,
    encoder_sha256,
    load_encoder,
)
from t2i.image_tokenizer.make import make_tokenizer
from t2i.image_tokenizer.train import train_image_tokenizer
from t2i.image_tokenizer.vision_encoder import EFFICIENTNET, VisionEncoder
from t2i.measure.features import extract, load_features

MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = {"image_size": 28, "patch_size": 14}


def clip():
    words = {**TINY, "vocab_size": 8}
    return CLIPModel(CLIPConfig(text_config=words, vision_config={**TINY, **PATCHES}, projection_dim=8))


MODELS = {
    "clip": clip,
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, **PATCHES)),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**TINY, **PATCHES, num_register_tokens=4)
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**TINY, **PATCHES)),
    "resnet": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    # Two by two patches are merged, so that seven pixels per patch are two by two tokens.
    "swin": lambda: SwinModel(
        SwinConfig(image_size=28, patch_size=7, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    ),
}
NUM_FIRST = {"clip": 1, "dinov2": 1, "registers": 5, "siglip": 0, "swin": 0}
"""Tokens before those of patches."""


def folder_of(name, folder):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    size = {"height": 28, "width": 28}
    # As SigLIP and DINOv3 say it, which do not crop, and as the others do.
    side = {"size": size} if name == "siglip" else {"crop_size": size, "size": {"shortest_edge": 32}}
    words = {**side, "image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    return folder


@pytest.mark.parametrize("name", NUM_FIRST)
def test_a_place_is_described_by_the_patch_that_lies_there(name, tmp_path):
    encoder = VisionEncoder.load(str(folder_of(name, tmp_path)))
    pixels = torch.rand(3, 3, 28, 28) * 2 - 1
    found = encoder.grid(pixels, side=2)
    assert found.shape == (3, 2, 2, 16)
    model = MODELS[name]().eval()
    torch.manual_seed(0)
    model = type(model).from_pretrained(tmp_path).eval()
    scaled = ((pixels + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    tower = model.vision_model if name == "clip" else model
    with torch.no_grad():
        tokens = tower(pixel_values=scaled).last_hidden_state
    for row in range(2):
        for column in range(2):
            wanted = tokens[:, NUM_FIRST[name] + 2 * row + column]
            assert found[:, row, column].allclose(wanted, atol=1e-4), (row, column)


def test_a_convolution_has_maps_and_a_finer_encoder_is_averaged(tmp_path):
    encoder = VisionEncoder.load(str(folder_of("resnet", tmp_path)))
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    assert encoder.width == 16 and encoder.grid(pixels, side=4).shape == (2, 4, 4, 16)
    assert (
        encoder.grid(pixels, side=1).flatten(1).allclose(encoder.grid(pixels, side=4).mean((1, 2)), atol=1e-5)
    )


def test_the_installed_network_sees_what_distances_are_measured_on():
    pixels = torch.rand(2, 3, 224, 224)
    images = (pixels * 255).round().to(torch.uint8)
    wanted = extract(
        list(images.permute(0, 2, 3, 1).numpy()), load_features("efficientnet_lite0"), batch_size=2
    )
    found = VisionEncoder.load(EFFICIENTNET).grid(images.float() / 127.5 - 1, side=1)[:, 0, 0]
    assert found.allclose(torch.from_numpy(wanted), atol=1e-3)


def test_a_folder_that_cannot_be_opened_is_refused_by_name(tmp_path):
    folder = folder_of("dinov2", tmp_path)
    (folder / "config.json").write_text('{"model_type": "of nothing"}')
    with pytest.raises(UserError, match=f"--align-to {folder} cannot be opened as a vision encoder"):
        load_encoder(str(folder))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [1]}')
    with pytest.raises(UserError, match="expected a size, three means and three deviations"):
        load_encoder(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot be opened as a sentence encoder"):
        load_encoder(str(folder))


class Colours:
    """Stands for an encoder: the mean colour of each place."""

    width = 3

    def grid(self, pixels, *, side):
        return F.adaptive_avg_pool2d(pixels, side).permute(0, 2, 3, 1)


def test_each_code_is_paired_with_its_own_place(monkeypatch):
    torch.manual_seed(0)
    alignment, pixels = Alignment(VisionTarget(Colours()), latent_channels=4), torch.randn(3, 3, 8, 8)
    latents = torch.randn(3, 4, 2, 2)
    said, seen = [], []
    for image in range(3):
        for row in range(2):
            for column in range(2):
                place = pixels[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                seen.append(place.mean((1, 2)))
                said.append(F.normalize(alignment.head(latents[image, :, row, column]), dim=0))
    seen = F.normalize(torch.stack(seen) - torch.stack(seen).mean(0), dim=-1)

    def loss(said, seen):
        scores = torch.stack(said) @ seen.T / 0.07
        return -(scores.log_softmax(0).diagonal() + scores.log_softmax(1).diagonal()).mean() / 2

    images = torch.arange(3)
    assert alignment(latents, pixels, images).allclose(loss(said, seen), atol=1e-4)
    # Of many places some: every third of twelve.
    monkeypatch.setattr(alignments, "MOST_PLACES", 4)
    assert alignment(latents, pixels, images).allclose(loss(said[::3], seen[::3]), atol=1e-4)


CONFIG = replace(tiny_tokenizers.TINY, max_steps=40, batch_size=8, lr=5e-3, save_every=500, revive_every=50)


def test_codes_come_to_say_what_is_seen(few_latents, tmp_path, monkeypatch):
    kinds = np.random.default_rng(0).integers(0, 3, (24, 2, 2))
    colours = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250]], dtype=np.uint8)[kinds]
    images = colours.repeat(8, axis=1).repeat(8, axis=2)
    losses, forward = [], Alignment.forward
    monkeypatch.setattr(Alignment, "forward", lambda *args: losses.append(forward(*args)) or losses[-1])
    train_image_tokenizer(images, config=CONFIG, out=tmp_path, target=VisionTarget(Colours()))
    assert torch.stack(losses[-5:]).mean() < losses[0] - 0.5


def test_a_source_is_aligned_to_the_installed_network(few_latents, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("RGB", (16, 16), (20 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text("a square")
    source = open_source(str(tmp_path / "images"), heldout_share=0.3)
    config = replace(CONFIG, max_steps=3, align_to=EFFICIENTNET)
    make_tokenizer(source, out=tmp_path / "out", config=config, command="test")
    made = json.loads((tmp_path / "out" / "made.json").read_text())
    assert made["encoder"] == load_features(EFFICIENTNET).weights_sha256
    assert f"- align_to: {EFFICIENTNET}" in (tmp_path / "out" / "README.md").read_text()


def test_captions_are_for_sentence_encoders_alone(tmp_path):
    assert isinstance(load_encoder(EFFICIENTNET), VisionEncoder)
    with pytest.raises(
        UserError, match="expected a folder of a sentence encoder or a vision encoder, or effic"
    ):
        SentenceEncoder.load(tmp_path / "nowhere")
    # Hashed before it is opened.
    with pytest.raises(UserError, match="--align-to is .*nowhere, which has no config.json"):
        encoder_sha256(str(tmp_path / "nowhere"))
