"""Pixels, codes and the proof that a tokenizer is the one that made them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from t2i.config import ASSETS
from t2i.errors import DataError, UserError
from t2i.tokens.image import ImageTokenizer, check_round_trip, images_of, pixels_of, shifted


def test_every_level_comes_back_and_what_lies_between_is_rounded():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(images_of(pixels_of(levels)), levels)
    assert pixels_of(levels).min() == -1 and pixels_of(levels).max() == 1
    pixels = torch.tensor([-1.2, -1, -0.9953, 0, 0.9938, 1, 1.2]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    # 127.5 (x + 1) is -25.5, 0, 0.6, 127.5, 254.2, 255 and 280.5; torch rounds halves to even.
    assert images_of(pixels)[0, 0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_a_shift_moves_right_and_down():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[1, 2] = 200
    moved = np.asarray(shifted(Image.fromarray(pixels), right=3, down=1))
    assert np.argwhere(moved[..., 0]).tolist() == [[2, 5]]
    assert np.argwhere(np.asarray(shifted(Image.fromarray(pixels), right=-2, down=-1))[..., 0]).tolist() == [
        [0, 0]
    ]


def test_codes_of_another_tokenizer_are_refused_though_half_of_them_agree(tmp_path):
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    pictures = torch.randint(
        256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    codes = tokenizer.encode(pixels_of(pictures)).clone()
    save_file({"pictures": pictures, "codes": codes}, tmp_path / "own.safetensors")
    check_round_trip(tokenizer, tmp_path / "own.safetensors")
    codes[0] = (codes[0] + 1) % tokenizer.codebook_size
    save_file({"pictures": pictures, "codes": codes}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="reproduces 50%"):
        check_round_trip(tokenizer, tmp_path / "other.safetensors")
    save_file({"pictures": pictures, "codes": codes[:, :16].clone()}, tmp_path / "fewer.safetensors")
    with pytest.raises(DataError, match="reproduces 0%"):  # of a tokenizer with other pixels per code
        check_round_trip(tokenizer, tmp_path / "fewer.safetensors")
    (tmp_path / "fewer.safetensors").write_bytes((tmp_path / "own.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match="fewer.safetensors is broken"):
        check_round_trip(tokenizer, tmp_path / "fewer.safetensors")


@pytest.mark.parametrize("kind", ["missing_keys", "unexpected_keys"])
def test_weights_that_do_not_fit_their_description_are_refused(kind, tmp_path):
    folder = shutil.copytree(ASSETS / "image_tokenizer", tmp_path / "other")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if kind == "missing_keys":
        weights.pop("decoder.conv_in.bias")
    else:
        weights["decoder.more.bias"] = torch.zeros(3)
    save_file(weights, file)
    with pytest.raises(
        UserError, match=f"of the image tokenizer .*other do not fit its config.json: .*{kind}"
    ):
        ImageTokenizer.load(folder)


def test_float32_codes_are_made_without_tf32_whatever_the_process_has_set(monkeypatch):
    """A GPU's convolutions would round to ten bits, and its codes not be those of a CPU."""
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    seen, encode = [], type(tokenizer.model).encode

    def spied(model, pixels):
        seen.append(torch.backends.cudnn.allow_tf32)
        return encode(model, pixels)

    monkeypatch.setattr(type(tokenizer.model), "encode", spied)
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        tokenizer.encode(torch.zeros(1, 3, 64, 64))
        assert torch.backends.cudnn.allow_tf32 is before
    assert seen == [False, False]
