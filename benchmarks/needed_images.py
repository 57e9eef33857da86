"""How many images does a measure need to see a known difference four times in five?

Examples:
    python benchmarks/needed_images.py
    python benchmarks/needed_images.py --cache /tmp/features --rounds 20
    python benchmarks/needed_images.py --quick

Sets of n images that differ in a known way from the real ones are compared with n real ones. A measure sees the
difference if it is larger than 95% of what it says of real images against real ones, at the same n. The table has the
least n of its steps from which on it does so in at least 80% of the rounds. Images and features are the embedded ones.
"""

import io
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
from t2i.measure.images import Reconstructions, images_of_pairs
from t2i.measure.judge import load_judge
from t2i.measure.shuffled import unrelated
from t2i.measure.sliced import directions_of
from t2i.measure.verdict import POOLED, judged
from t2i.tokens.image import ImageTokenizer

STEPS = (8, 16, 32, 64, 128, 256, 512)
ROUNDS, CHANGED = 100, 1_024
QUICK = {"images": 256, "changed": 64, "steps": STEPS[:3]}
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
    num_real: int
    num_changed: int
    """Images that are reconstructed and compressed: of each round's real ones, none is among them."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.set_defaults(rounds=ROUNDS)
    parser.add_argument("--cache", type=Path, help="folder that keeps features between two calls")
    parser.add_argument("--images", type=int, help="use so many of the embedded images; by default all")
    parser.add_argument("--changed", type=int, default=CHANGED, help="so many of them are made worse")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, help="images per side, up to --changed"
    )
    options = side_by_side.parse(parser, **QUICK)
    torch.set_num_threads(1)
    pairs = sorted(open_source("openmoji").pairs, key=lambda pair: hash_uniform("needed", pair.key))
    pairs = pairs[: options.images]
    pool, kinds = pool_of(pairs, num_changed=options.changed, cache=options.cache)
    rng, steps = np.random.default_rng(0), options.steps
    power = {
        name: [powers(pool, choose, n=n, rounds=options.rounds, rng=rng) for n in steps]
        for name, choose in differences(kinds, pool).items()
    }
    held_out = [pair for pair in pairs if pair.split != "train"]
    read = load_judge().read(images_of_pairs(held_out, size=SIDE))
    captions = [pair.caption for pair in held_out]
    judge = [judge_powers(read, captions, n=n, rounds=options.rounds, rng=rng) for n in steps]
    lines = [table_line(name, found, steps) for name, found in power.items()]
    lines.append(
        f"| a quarter of captions exchanged | not seen | not seen | not seen | {needed(judge, steps)} |"
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
    figures = {
        "rounds": options.rounds,
        "steps": steps,
        "num_real": len(pairs),
        "power": power,
        "judge": judge,
    }
    side_by_side.write("needed_images", [], figures=figures, is_kept=not options.quick)


def pool_of(pairs: Sequence[Pair], *, num_changed: int, cache: Path | None) -> tuple[Pool, list[str]]:
    """Compute features of the real images, then of the first `num_changed` reconstructed, and compressed."""
    real = images_of_pairs(pairs, size=SIDE)
    some = images_of_pairs(pairs[:num_changed], size=SIDE)
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    sets = {
        "real": real,
        "reconstructions": Reconstructions(some, tokenizer),
        "compressed": (compressed(image) for image in some),
    }
    extractor = load_features("efficientnet_lite0")
    features = []
    for name, images in sets.items():
        file = cache / f"{name}-{len(pairs)}-{num_changed}.npy" if cache else None
        if file and file.is_file():
            features.append(np.load(file))
            continue
        features.append(extract(images, extractor, batch_size=32))
        if file:
            np.save(file, features[-1])
    everything = np.concatenate(features).astype(np.float64)
    projected = np.concatenate([everything @ each for each in directions_of(everything.shape[1])], axis=1)
    kinds = [attributes_of(pair.caption).get("kind", "") for pair in pairs]
    gram = everything @ everything.T
    return Pool(gram, projected, everything.shape[1], len(pairs), num_changed), kinds


def compressed(image: np.ndarray) -> np.ndarray:
    """Return an image after JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


Choose = Callable[[np.ndarray], np.ndarray]
"""Places of n real images among the changed -> places of the images that a bad model would have drawn."""


def differences(kinds: Sequence[str], pool: Pool) -> dict[str, Choose]:
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
        others = [place for place in range(pool.num_changed) if kinds[place] != "flag" and place not in taken]
        kept = [place for place in places if kinds[place] != "flag"]
        return np.array(kept + others[: len(places) - len(kept)])

    return {
        "all reconstructed by the embedded tokenizer": some(1, pool.num_real),
        "a quarter reconstructed": some(0.25, pool.num_real),
        f"all compressed (JPEG, quality {JPEG_QUALITY})": some(1, pool.num_real + pool.num_changed),
        "no flags (a kind of 6% is missing)": without_flags,
        "half of the images twice": lambda places: np.concatenate([places[: len(places) // 2]] * 2),
    }


def powers(pool: Pool, choose: Choose, *, n: int, rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Count how often each measure sees a difference at n images per side."""
    null: dict[str, list[float]] = {name: [] for name in MEASURES}
    seen: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(rounds):
        made = rng.permutation(pool.num_changed)[:n]
        real = pool.num_changed + rng.permutation(pool.num_real - pool.num_changed)[: 2 * n]
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
            share = judged(chosen, said).estimates(replicates=0).get(POOLED)
            found.append(share.value if share else 0.0)
    return {"judge": float(np.mean(np.array(seen) < np.quantile(null, FALSE_ALARMS)))}


def table_line(name: str, found: Sequence[dict[str, float]], steps: Sequence[int]) -> str:
    cells = [needed([{"one": each[measure]} for each in found], steps) for measure in MEASURES]
    return f"| {name} | {' | '.join(cells)} | |"


def needed(found: Sequence[dict[str, float]], steps: Sequence[int]) -> str:
    """Name the least n from which on the difference is seen."""
    powers_by_step = [next(iter(each.values())) for each in found]
    for place, n in enumerate(steps):
        if all(power >= SEEN for power in powers_by_step[place:]):
            return str(n)
    return f"more than {steps[-1]}"


if __name__ == "__main__":
    main()
