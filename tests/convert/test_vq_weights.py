"""Random tokenizers of the released structure, under the released names, converted and compared."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from twins.image_tokenizers import NAMES, SMALL, Released, in_released_form

from t2i.convert.vq import LLAMAGEN, MOVQGAN, load_vq, vq_config, vq_tensors
from t2i.convert.vq_reference import source_codes, source_latents, source_pixels
from t2i.errors import CheckpointError
from t2i.tokens.image import ImageTokenizer, centre_crop_resize, code_agreement, to_pixels

# fp32 convolutions in another order. Against a double-precision twin, latents up to 16 were off by 2e-5 in the usual
# memory format and by 1e-4 in channels last, 7e-6 of the largest; pixels by 1e-5 to 3e-5.
LATENTS, PIXELS = 2e-5, 2e-4
SOURCE = "a test"


LAYOUTS = {"movqgan": MOVQGAN, "llamagen": LLAMAGEN}


@pytest.fixture(scope="module", params=NAMES)
def released(request):
    return Released(request.param, **SMALL[request.param]).eval()


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(64, 64), mode="bilinear")


def converted(model, folder):
    layout = LAYOUTS[model.kind]
    tensors, _ = vq_tensors(in_released_form(model), layout=layout)
    load_vq(tensors, layout=layout, source=SOURCE).save_pretrained(folder)
    return ImageTokenizer.load(folder), tensors, layout


@torch.inference_mode()
def test_a_converted_tokenizer_gives_the_same_codes_and_images(released, pixels, tmp_path):
    tokenizer, tensors, layout = converted(released, tmp_path)
    latents = released.quant_conv(released.encoder(pixels))
    codes = released.codes(latents)
    assert codes.unique().numel() > 20
    bound = LATENTS * latents.abs().max().item()
    assert torch.allclose(tokenizer.model.encode(pixels).latents, latents, atol=bound)
    assert tokenizer.encode(pixels).tolist() == codes.flatten(1).tolist()
    pictures = released.decode(codes)
    assert torch.allclose(tokenizer.decode(codes.flatten(1)), pictures, atol=PIXELS)
    # The steps that a conversion is proved by are the release's own too.
    assert torch.allclose(source_latents(tensors, pixels, layout=layout), latents, atol=bound)
    assert source_codes(tensors, latents, layout=layout).tolist() == codes.tolist()
    assert torch.allclose(source_pixels(tensors, codes, layout=layout), pictures, atol=PIXELS)


@pytest.mark.parametrize(
    ("kind", "channels", "latents", "width", "num_layers", "num_tensors"),
    [
        ("movqgan", (128, 256, 256, 512), 4, 4, 2, 431),
        ("movqgan", (128, 256, 256, 512), 4, 4, 4, 671),
        ("movqgan", (256, 512, 512, 1024), 4, 4, 2, 431),
        ("llamagen", (128, 128, 256, 256, 512), 256, 8, 2, 343),
        ("llamagen", (128, 256, 256, 512), 256, 8, 2, 299),
    ],
)
def test_the_released_sizes_fit_name_by_name(kind, channels, latents, width, num_layers, num_tensors):
    layout = LAYOUTS[kind]
    with torch.device("meta"):
        sizes = {"latents": latents, "width": width, "num_codes": 16_384, "num_layers": num_layers}
        model = Released(kind, channels=channels, **sizes)
        tensors, _ = vq_tensors(in_released_form(model), layout=layout)
        assert len(tensors) == num_tensors
        assert load_vq(tensors, layout=layout, source=SOURCE).config.block_out_channels == channels
    config = vq_config(tensors, layout=layout, source=SOURCE)
    assert (config["layers_per_block"], config["num_vq_embeddings"]) == (num_layers, 16_384)


def test_training_files_are_read_and_what_is_left_out_is_told():
    state = Released("movqgan", **SMALL["movqgan"]).state_dict()
    extra = {"loss.discriminator.main.0.weight": torch.zeros(3), "ema_encoder.convinweight": torch.zeros(3)}
    tensors, left_out = vq_tensors({"state_dict": state | extra, "epoch": 4}, layout=MOVQGAN)
    assert set(tensors) == set(state)
    assert left_out == ["ema_encoder", "epoch", "loss"]
    model = Released("llamagen", **SMALL["llamagen"]).state_dict()
    ema = {name: value + 1 for name, value in model.items()}
    content = {"model": model, "ema": ema, "optimizer": {"state": {}}, "steps": 7}
    tensors, left_out = vq_tensors(content, layout=LLAMAGEN)
    assert torch.equal(tensors["encoder.conv_in.weight"], ema["encoder.conv_in.weight"])
    assert left_out == ["model", "optimizer", "steps"]


def test_a_misfit_names_tensor_and_shapes():
    state = Released("movqgan", **SMALL["movqgan"]).state_dict()
    with pytest.raises(
        CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.bias has shape \(7,\), expected"
    ):
        load_vq(state | {"encoder.mid.block_1.conv1.bias": torch.zeros(7)}, layout=MOVQGAN, source=SOURCE)
    with pytest.raises(CheckpointError, match=r"unknown here, encoder\.conv_extra\.weight"):
        load_vq(state | {"encoder.conv_extra.weight": torch.zeros(7)}, layout=MOVQGAN, source=SOURCE)
    with pytest.raises(CheckpointError, match=r"is no such checkpoint: it has no encoder\.conv_blocks"):
        load_vq(state, layout=LLAMAGEN, source=SOURCE)


def test_bf16_changes_few_codes_and_fp32_none(released, pixels, tmp_path):
    exact, _, _ = converted(released, tmp_path)
    lower = ImageTokenizer.load(tmp_path, dtype=torch.bfloat16)
    assert code_agreement(exact, exact, pixels) == 1
    assert 0.5 < code_agreement(lower, exact, pixels) < 1  # random latents lie close to many codes
    codes = exact.encode(pixels)
    error = (lower.decode(codes) - exact.decode(codes)).abs().mean()
    assert 0 < error < 0.05
    assert lower.fingerprint() == exact.fingerprint()


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (33, 32), (64, 64), (90, 57)])
def test_preprocessing_is_movqgans(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    # MoVQGAN's rule: the centre square first, by Pillow's rounding of its corners, then bicubic.
    side = min(size)
    corners = [round((length + sign * side) / 2) for sign in (-1, 1) for length in size]
    left, top, right, bottom = corners
    square = Image.fromarray(np.asarray(image)[top:bottom, left:right])
    wanted = np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC, reducing_gap=1), dtype=np.float32)
    found = to_pixels([centre_crop_resize(image, size=16)])
    assert torch.equal(found[0], torch.from_numpy(wanted / 127.5 - 1).permute(2, 0, 1))


def test_a_folder_without_the_codebook_switch_decodes_all_the_same(released, pixels, tmp_path):
    tokenizer, _, _ = converted(released, tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert '"lookup_from_codebook": true' in config
    (tmp_path / "config.json").write_text(config.replace('"lookup_from_codebook": true', '"sample_size": 32'))
    codes = tokenizer.encode(pixels)
    assert torch.equal(ImageTokenizer.load(tmp_path).decode(codes), tokenizer.decode(codes))
