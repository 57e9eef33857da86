"""A server under load, and whether the shape of a batch changes an image: counts, not ratios.

Clients are threads of this process, which share the processor with the server; seconds are of a clock on the wall.

Examples:
    python benchmarks/serving.py runs/train
    python benchmarks/serving.py exported --clients 50 --requests 200 --batch-size 8
    python benchmarks/serving.py exported --quick
"""

import base64
import json
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import emoji
import side_by_side
import torch

from t2i.config import SampleConfig, SamplerConfig
from t2i.generate.sample import draw_codes, drawer_of
from t2i.runs.loading import open_model
from t2i.serve.opening import start
from t2i.serve.stopping import accepting

SIZES = (1, 2, 4, 8, 16, 32)


def captions(count: int) -> list[str]:
    """List names of emoji, which the embedded images are called by."""
    names = [data["en"].strip(":").replace("_", " ") for data in emoji.EMOJI_DATA.values()]
    return [names[index * 7 % len(names)] for index in range(count)]


def ask(port: int, *, prompt: str, seed: int) -> tuple[float, bytes]:
    """Ask for one image; return the seconds that it took, and its file."""
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        data=body,
        headers={"Content-Type": "application/json"},
    )
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=3_600) as answer:
        file = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    return time.perf_counter() - begun, file


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("ckpt")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="drawn at each batch size")
    given = side_by_side.parse(parser, clients=4, requests=8, images=4)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(given.ckpt, needs_images=True, device=device)
    prompts = captions(given.requests)
    limits = {"batch_size": given.batch_size, "most_waiting": given.requests, "most_images": 10}
    server = start(opened, sampler=SamplerConfig(), address=("127.0.0.1", 0), **limits)
    with accepting(server), ThreadPoolExecutor(given.clients) as clients:
        begun = time.perf_counter()
        jobs = [
            clients.submit(ask, server.server_port, prompt=prompt, seed=seed)
            for seed, prompt in enumerate(prompts)
        ]
        answers = [job.result() for job in jobs]
        seconds = time.perf_counter() - begun
        checked = range(0, given.requests, max(1, given.requests // 8))
        again = [ask(server.server_port, prompt=prompts[seed], seed=seed)[1] for seed in checked]
        batches = int(server.service.meters.counts["t2i_batches_total"]) - len(again)
    same = sum(file == answers[seed][1] for seed, file in zip(checked, again, strict=True))
    took = sorted(each for each, _ in answers)
    print(
        f"{len(answers)} of {given.requests} requests of {given.clients} clients answered in {seconds:.1f} s:"
        f" {len(answers) / seconds:.2f} images/s in {batches} batches of up to {given.batch_size};"
        f" median {statistics.median(took):.1f} s, longest {took[-1]:.1f} s."
        f" Drawn again alone: {same} of {len(again)} files the same."
    )
    drawer = drawer_of(opened, settings=SampleConfig())
    texts = captions(given.images)
    by_size = {
        size: torch.cat(
            [
                draw_codes(drawer, texts[first : first + size], first_seed=first)
                for first in range(0, given.images, size)
            ]
        )
        for size in SIZES
    }
    reference = by_size[SIZES[0]]
    for size, codes in by_size.items():
        other = (codes != reference).any(dim=1).sum().item()
        print(f"batches of {size}: {other} of {given.images} images with other codes than alone")


if __name__ == "__main__":
    main()
