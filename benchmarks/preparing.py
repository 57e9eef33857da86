"""Pictures to codes: t2i's image tokenizer, the loop that a user of diffusers would write, and the convolutions alone.

A VQModel of MoVQGAN's 67M shape with random weights, pictures of 256 x 256.

Examples:
    python benchmarks/preparing.py
    python benchmarks/preparing.py --image-size 64 --channels 32 32 64
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import side_by_side
import torch
from diffusers import VQModel
from torch import Tensor, nn

from t2i.tokens.image import ImageTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 256, 512])
    parser.add_argument("--rounds", type=int, default=side_by_side.ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, options.image_size, options.image_size) * 2 - 1
    plain = model_of(options.channels)
    same = model_of(options.channels)
    same.load_state_dict(plain.state_dict())
    tokenizer = ImageTokenizer(same, folder=Path())
    candidates = {
        "limit": convolutions_alone(tokenizer, pixels),
        "t2i": lambda: tokenizer.encode(pixels),
        "diffusers": lambda: plain_codes(plain, pixels),
    }
    seconds = side_by_side.alternate(candidates, rounds=options.rounds)
    ours = seconds["t2i"]
    equal = (tokenizer.encode(pixels).flatten() == plain_codes(plain, pixels)).float().mean().item()
    rows = [
        side_by_side.compared("encoding: t2i / its products alone", ours, seconds["limit"], target="<= 1.15"),
        side_by_side.compared("encoding: diffusers' loop / t2i", seconds["diffusers"], ours, target=">= 1"),
        side_by_side.Row(
            "encoding: share of codes equal to diffusers' own", equal, equal, (equal, equal), 1, ">= 0.999"
        ),
    ]
    side_by_side.write("preparing", rows, figures={"least seconds": {k: min(v) for k, v in seconds.items()}})


def model_of(channels: list[int]) -> VQModel:
    """Make a VQModel with a spatially normed decoder, as MoVQGAN has."""
    return VQModel(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16_384,
        vq_embed_dim=4,
        norm_type="spatial",
        lookup_from_codebook=True,
    ).eval()


@torch.inference_mode()
def plain_codes(model: VQModel, pixels: Tensor) -> Tensor:
    """Encode as diffusers does out of the box."""
    return model.quantize(model.encode(pixels).latents)[2][2]


def convolutions_alone(tokenizer: ImageTokenizer, pixels: Tensor) -> Callable[[], None]:
    """Record what each convolution and linear layer of the encoder is given; prepare to run these alone."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, given, _: calls.append((module, given[0].clone())))
        for part in (tokenizer.model.encoder, tokenizer.model.quant_conv)
        for module in part.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    tokenizer.encode(pixels)
    for hook in hooks:
        hook.remove()

    @torch.inference_mode()
    def run() -> None:
        for module, given in calls:
            module(given)

    return run


if __name__ == "__main__":
    main()
