"""Images to codes: t2i's image tokenizer, the loop that a user of diffusers would write, and the matmul lower bound.

The model is a randomly initialised VQModel of MoVQGAN's shape (67M parameters), on images of 256 x 256. Then a folder
of JPEG files becomes shards: by one process, by one with a reader beside it, and by two.

Examples:
    python benchmarks/preparing.py
    python benchmarks/preparing.py --image-size 64 --channels 32 32 64
"""

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import side_by_side
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn

from t2i.config import ASSETS, PrepareConfig
from t2i.data.prepare.images import prepare
from t2i.data.sources import open_source
from t2i.env import keep_memory
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.text import TextTokenizer

JPEG_SIDE = 512
MOST_SECONDS = 300


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 256, 512])
    parser.add_argument("--images", type=int, default=2_048)
    options = side_by_side.parse(parser, image_size=64, channels=[32, 32, 64], images=128)
    keep_memory()  # as prepare.py does, for every candidate
    torch.set_num_threads(1)  # with more, a machine's other load decides who waits for whom
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, options.image_size, options.image_size) * 2 - 1
    plain = model_of(options.channels)
    spread_codebook(plain, pixels)
    # A second model: ImageTokenizer changes the memory layout of its own, which must not speed up the plain loop.
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
    # Speed is compared only beside equal codes: single ties may fall otherwise, so not all need be equal.
    equal = (tokenizer.encode(pixels).flatten() == plain_codes(plain, pixels)).float().mean().item()
    rows = [
        side_by_side.compared(
            "encoding: t2i / its matmul lower bound", ours, seconds["limit"], target="<= 1.15"
        ),
        side_by_side.compared("encoding: diffusers' loop / t2i", seconds["diffusers"], ours, target=">= 1"),
        side_by_side.stated("encoding: share of codes equal to diffusers' own", [equal], target=">= 0.999"),
    ]
    per_second = [len(pixels) / value for value in ours]
    note = f"{options.image_size} x {options.image_size}, fp32, CPU seconds"
    rows.append(side_by_side.stated("encoding: images per second and core", per_second, best=max, note=note))
    rows += folders(options.images, rounds=options.rounds)
    figures = {
        "least seconds": {name: min(times) for name, times in seconds.items()},
        "share of the encoder's time by operator, profiled once": side_by_side.time_by_operator(
            candidates["t2i"]
        ),
    }
    side_by_side.write("preparing", rows, figures=figures, is_kept=not options.quick)


def folders(number: int, *, rounds: int) -> list[side_by_side.Row]:
    """Prepare a folder of images in three ways; wall-clock seconds without start-up."""
    ways = {"one process": (1, 0), "one process and a reader": (1, 1), "two processes": (2, 0)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        write_images(folder, number=number)
        for _, (name, (processes, readers)) in itertools.product(range(rounds), ways.items()):
            seconds[name].append(prepared(folder, processes=processes, readers=readers))
    alone = seconds.pop("one process")
    targets = {"one process and a reader": ">= 1", "two processes": ">= 1.7"}
    note = f"seconds; {number} JPEG files of {JPEG_SIDE} x {JPEG_SIDE}, the embedded tokenizer"
    per_second = [number / value for value in alone]
    what = "preparing: images per second, one process of one thread"
    rates = side_by_side.stated(what, per_second, best=max, note=note)
    return [rates] + [
        side_by_side.compared(
            f"preparing: one process / {name}", alone, values, target=targets[name], note=note
        )
        for name, values in seconds.items()
    ]


def write_images(folder: Path, *, number: int) -> None:
    """Write JPEG files of smooth noise, with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(number):
        # Smooth: pure noise makes JPEG files several times as large, and decoding them as slow.
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg")
        (folder / f"{index:04d}.txt").write_text(f"image {index}")


def prepared(folder: Path, *, processes: int, readers: int) -> float:
    """Prepare `folder` once; seconds from when all processes are ready until the last is done, without its exit."""
    # Spawned, as ranks start afresh too: forked ones would share this process's loaded model and memory.
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)  # this process too, which holds the clock
    with tempfile.TemporaryDirectory() as out:
        started = [
            context.Process(
                target=rank_of, args=(rank, processes, readers, folder, Path(out) / "shards", ready)
            )
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        ready.wait(timeout=MOST_SECONDS)
        began = time.perf_counter()
        ready.wait(timeout=MOST_SECONDS)
        seconds = time.perf_counter() - began
        for process in started:
            process.join()
    if any(process.exitcode for process in started):
        raise SystemExit("a process of the preparation failed")
    return seconds


def rank_of(rank: int, world_size: int, readers: int, folder: Path, out: Path, ready: Barrier) -> None:
    """Do one process's part once all are ready, and signal that it is done."""
    keep_memory()
    torch.set_num_threads(1)
    source = open_source(str(folder))
    unit_pairs = sum(1 for _ in folder.glob("*.jpg")) // 8
    image_tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    text_tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    ready.wait(timeout=MOST_SECONDS)
    prepare(
        source,
        out=out,
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer,
        config=PrepareConfig(unit_pairs=unit_pairs, workers=readers),
        rank=rank,
        world_size=world_size,
    )
    ready.wait(timeout=MOST_SECONDS)


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


@torch.no_grad()
def spread_codebook(model: VQModel, pixels: Tensor) -> None:
    """Spread the codes over the latents, as training does."""
    # diffusers' initial codes lie so near to zero that all are ties, and equal codes would say nothing.
    latents = model.encode(pixels).latents
    codes = model.quantize.embedding.weight
    codes.copy_(torch.randn_like(codes) * latents.std((0, 2, 3)) + latents.mean((0, 2, 3)))


@torch.inference_mode()
def plain_codes(model: VQModel, pixels: Tensor) -> Tensor:
    """Encode as diffusers does out of the box."""
    return model.quantize(model.encode(pixels).latents)[2][2]


def convolutions_alone(tokenizer: ImageTokenizer, pixels: Tensor) -> Callable[[], None]:
    """Record the inputs of the encoder's convolutions and linear layers; prepare to run these alone."""
    calls: list[tuple[nn.Module, Tensor]] = []
    # By hooks on a real pass: shapes written down by hand would fall behind the model.
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
