"""Features by a DINOv2 and a CLIP of the user's, randomly initialised ones in transformers' layout."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from t2i.errors import UserError
from t2i.measure.features import extract, load_features
from t2i.runs.loading import weights_sha256

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "resample": 3}


@pytest.fixture
def dinov2(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(**CROP).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=64, max_position_embeddings=8, **SIZES)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **SIZES)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(**CROP).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def images():
    """Images of the network's own size, which no resize touches."""
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)


@torch.inference_mode()
def test_dinov2_features_are_the_normed_class_token_of_its_own_preprocessing(dinov2):
    extractor = load_features("dinov2", folder=dinov2)
    pixels = BitImageProcessor.from_pretrained(dinov2)(
        images=[Image.fromarray(image) for image in images()], return_tensors="pt"
    )["pixel_values"]
    wanted = Dinov2Model.from_pretrained(dinov2).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    found = extract(images(), extractor, batch_size=2)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)  # fp32, other batches
    assert (extractor.name, extractor.dims, extractor.resize) == ("dinov2", 16, "clean")
    assert extractor.weights_sha256 == weights_sha256(dinov2)


@torch.inference_mode()
def test_clip_features_are_its_image_embeddings(clip):
    extractor = load_features("clip", folder=clip)
    pixels = CLIPImageProcessor.from_pretrained(clip)(
        images=[Image.fromarray(image) for image in images()], return_tensors="pt"
    )["pixel_values"]
    model = CLIPModel.from_pretrained(clip).eval()
    wanted = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    np.testing.assert_allclose(extract(images(), extractor, batch_size=5), wanted.numpy(), atol=1e-5)
    assert extractor.dims == 8


@pytest.mark.parametrize("file", ["preprocessor_config.json", "config.json"])
def test_the_same_weights_under_another_description_are_other_features(dinov2, file):
    found = load_features("dinov2", folder=dinov2)
    said = json.loads((dinov2 / file).read_text()) | {"transformers_version": "9"}
    (dinov2 / file).write_text(json.dumps(said))
    assert load_features("dinov2", folder=dinov2).preprocessing == found.preprocessing
    change = {"image_mean": [0.1, 0.2, 0.3]} if "pre" in file else {"hidden_act": "relu"}
    (dinov2 / file).write_text(json.dumps(said | change))
    other = load_features("dinov2", folder=dinov2)
    assert other.weights_sha256 == found.weights_sha256 and other.preprocessing != found.preprocessing


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_weights_of_half_precision_are_read_in_full_and_missing_ones_refused(name, dinov2, clip):
    folder = {"dinov2": dinov2, "clip": clip}[name]
    file = folder / "model.safetensors"
    weights = {key: value.half() for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    assert extract(images(), load_features(name, folder=folder), batch_size=5).dtype == np.float32
    weights.pop(
        next(key for key in weights if key.endswith("layernorm.weight") or "layer_norm1.weight" in key)
    )
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"cannot be loaded as {name}: its weights do not fit .*missing_keys"):
        load_features(name, folder=folder)


def test_folders_of_another_kind_are_refused(dinov2, clip, tmp_path):
    with pytest.raises(UserError, match=r"holds a model of type clip; expected dinov2"):
        load_features("dinov2", folder=clip)
    with pytest.raises(UserError, match=r"^--features dinov2 wants --features-folder DIR"):
        load_features("dinov2")
    with pytest.raises(UserError, match=r"features efficientnet_lite0; it is for --features dinov2 or clip"):
        load_features("efficientnet_lite0", folder=dinov2)
    (dinov2 / "preprocessor_config.json").write_text(json.dumps({"crop_size": 28}))
    with pytest.raises(UserError, match=r"three means and three deviations"):
        load_features("dinov2", folder=dinov2)
    words = {"crop_size": 28, "image_mean": ["a", 0, 0], "image_std": [1, 1, 1]}
    (dinov2 / "preprocessor_config.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="expected a size, three means and three deviations"):
        load_features("dinov2", folder=dinov2)
    (dinov2 / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json missing"):
        load_features("dinov2", folder=dinov2)
