"""How many images does a measure need to see a known difference four times in five?

Examples:
    python benchmarks/needed_images.py
    python benchmarks/needed_images.py --cache /tmp/features --rounds 20

Sets of n images that differ in a known way from the real ones are compared with n real ones. A measure sees the
difference if it is larger than 95% of what it says of real images against real ones, at the same n. The table has the
least n of its steps from which on it does so in at least 80% of the rounds. Images and features are the embedded ones.
"""

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import side_by_side
import torch
from PIL import Image

from t2i.config import ASSETS
from t2i.data.sources import Pair, open_source
from t2i.files import hash_uniform
from t2i.measure.attributes import attributes_of
from t2i.measure.features import extract, load_features
from t2i.measure.images import Reconstructions, pictures
from t2i.measure.judge import judged, load_judge
from t2i.measure.shuffled import unrelated
from t2i.measure.sliced import directions_of
from t2i.tokens.image import ImageTokenizer

STEPS = (8, 16, 32, 64, 128, 256, 512)
CHANGED = 1_024
"""Images that are reconstructed and compressed: of each round's real ones, none is among them."""
SEEN, FALSE_ALARMS = 0.8, 0.05
JPEG_QUALITY = 30
SIDE = 64
MEASURES = ("Frechet", "kernel", "MIND")


@dataclass(frozen=True)
class Pool:
    """Features of all images, as distances need them."""

    gram: np.ndarray
    """(N, N) inner products."""
    projected: np.ndarray
    """(N, P) on MIND's directions."""
    dims: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cache", type=Path, help="folder that keeps features between two calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = sorted(open_source("openmoji").pairs, key=lambda pair: hash_uniform("needed", pair.key))
    pool, kinds = pool_of(pairs, cache=options.cache)
    rng = np.random.default_rng(0)
    power = {
        name: [powers(pool, choose, n=n, num_real=len(pairs), rounds=options.rounds, rng=rng) for n in STEPS]
        for name, choose in differences(kinds, num_real=len(pairs)).items()
    }
    held_out = [pair for pair in pairs if pair.split != "train"]
    read = load_judge().read(pictures(held_out, size=SIDE))
    captions = [pair.caption for pair in held_out]
    judge = [judge_powers(read, captions, n=n, rounds=options.rounds, rng=rng) for n in STEPS]
    lines = [table_line(name, found) for name, found in power.items()]
    lines.append(
        "| a quarter of captions exchanged | not seen | not seen | not seen | " + needed(judge) + " |"
    )
    print(
        "\n".join(
            [
                "| difference | Frechet | kernel (KID) | MIND | exact judge |",
                "| --- | --- | --- | --- | --- |",
                *lines,
            ]
        )
    )
    facts = {
        "machine": side_by_side.machine(),
        "rounds": options.rounds,
        "steps": STEPS,
        "num_real": len(pairs),
    }
    print(json.dumps({**facts, "power": power, "judge": judge}))


def pool_of(pairs: Sequence[Pair], *, cache: Path | None) -> tuple[Pool, list[str]]:
    """Compute features of the real images, then of the first CHANGED reconstructed, and compressed."""
    real = pictures(pairs, size=SIDE)
    some = pictures(pairs[:CHANGED], size=SIDE)
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    sets = {
        "real": real,
        "reconstructions": Reconstructions(some, tokenizer),
        "compressed": (compressed(image) for image in some),
    }
    extractor = load_features("efficientnet_lite0")
    features = []
    for name, images in sets.items():
        file = cache / f"{name}.npy" if cache else None
        if file and file.is_file():
            features.append(np.load(file))
            continue
        features.append(extract(images, extractor, batch_size=32))
        if file:
            np.save(file, features[-1])
    everything = np.concatenate(features).astype(np.float64)
    projected = np.concatenate([everything @ each for each in directions_of(everything.shape[1])], axis=1)
    kinds = [attributes_of(pair.caption).get("kind", "") for pair in pairs]
    return Pool(everything @ everything.T, projected, everything.shape[1]), kinds


def compressed(image: np.ndarray) -> np.ndarray:
    """Return an image after JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


Choose = Callable[[np.ndarray], np.ndarray]
"""Places of n real images among the first CHANGED -> places of the images that a bad model would have drawn."""


def differences(kinds: Sequence[str], *, num_real: int) -> dict[str, Choose]:
    """Name ways in which images can differ from real ones."""

    def some(share: float, first: int) -> Choose:
        def choose(places: np.ndarray) -> np.ndarray:
            changed = places.copy()
            count = round(share * len(places))
            changed[:count] = first + places[:count]
            return changed

        return choose

    def without_flags(places: np.ndarray) -> np.ndarray:
        taken = set(places.tolist())
        others = [place for place in range(CHANGED) if kinds[place] != "flag" and place not in taken]
        kept = [place for place in places if kinds[place] != "flag"]
        return np.array(kept + others[: len(places) - len(kept)])

    return {
        "all reconstructed by the embedded tokenizer": some(1, num_real),
        "a quarter reconstructed": some(0.25, num_real),
        f"all compressed (JPEG, quality {JPEG_QUALITY})": some(1, num_real + CHANGED),
        "no flags (a kind of 6% is missing)": without_flags,
        "half of the images twice": lambda places: np.concatenate([places[: len(places) // 2]] * 2),
    }


def powers(
    pool: Pool, choose: Choose, *, n: int, num_real: int, rounds: int, rng: np.random.Generator
) -> dict[str, float]:
    """Count how often each measure sees a difference at n images per side."""
    null: dict[str, list[float]] = {name: [] for name in MEASURES}
    seen: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(rounds):
        made = rng.permutation(CHANGED)[:n]
        real = CHANGED + rng.permutation(num_real - CHANGED)[: 2 * n]
        for found, places in ((null, real[n:]), (seen, choose(made))):
            for name, value in distances(pool, places, real[:n]).items():
                found[name].append(value)
    return {
        name: float(np.mean(np.array(seen[name]) > np.quantile(null[name], 1 - FALSE_ALARMS)))
        for name in MEASURES
    }


def distances(pool: Pool, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compute the distances of two sets of n images from inner products and projections."""
    aa, bb, ab = (pool.gram[np.ix_(x, y)] for x, y in ((a, a), (b, b), (a, b)))
    n = len(a)
    across = ab - ab.mean(0) - ab.mean(1)[:, None] + ab.mean()
    traces = sum((np.trace(own) - n * own.mean()) / (n - 1) for own in (aa, bb))
    means = aa.mean() + bb.mean() - 2 * ab.mean()
    overlap = np.linalg.svd(across, compute_uv=False).sum() / (n - 1)
    cubes = [(inner / pool.dims + 1) ** 3 for inner in (aa, bb, ab)]
    within = sum((cube.sum() - np.trace(cube)) / (n * (n - 1)) for cube in cubes[:2])
    lines = [np.sort(pool.projected[places], axis=0) for places in (a, b)]
    return {
        "Frechet": means + traces - 2 * overlap,
        "kernel": within - 2 * cubes[2].mean(),
        "MIND": 3 * pool.dims * ((lines[0] - lines[1]) ** 2).mean(),
    }


def judge_powers(
    read: dict[str, list[str]], captions: list[str], *, n: int, rounds: int, rng: np.random.Generator
) -> dict[str, float]:
    """Count how often the exact judge sees that a quarter of n images have captions of others.

    Args:
        read: what the judge reads from every image, by attribute.
    """
    others = unrelated(captions, shift=1) or []
    null: list[float] = []
    seen: list[float] = []
    for _ in range(rounds):
        for found, count in ((null, 0), (seen, n // 4)):
            places = rng.permutation(len(captions))[:n].tolist()
            said = [captions[others[at] if turn < count else at] for turn, at in enumerate(places)]
            chosen = {name: [values[at] for at in places] for name, values in read.items()}
            found.append(judged(chosen, said).mean() or 0.0)
    return {"judge": float(np.mean(np.array(seen) < np.quantile(null, FALSE_ALARMS)))}


def table_line(name: str, found: Sequence[dict[str, float]]) -> str:
    cells = [needed([{"one": each[measure]} for each in found]) for measure in MEASURES]
    return f"| {name} | {' | '.join(cells)} | |"


def needed(found: Sequence[dict[str, float]]) -> str:
    """Name the least n from which on the difference is seen."""
    powers_by_step = [next(iter(each.values())) for each in found]
    for place, n in enumerate(STEPS):
        if all(power >= SEEN for power in powers_by_step[place:]):
            return str(n)
    return f"more than {STEPS[-1]}"


if __name__ == "__main__":
    main()
