"""Score a model's pictures beside their yardsticks: the same reference, the same number, the same features.

Without COCO, the held-out pictures of the model's own data are read again from their source and cut in two halves:
one is the reference of every row, the captions of the other are drawn.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from t2i.config import DataConfig, SampleConfig
from t2i.data.hashing import hash_uniform
from t2i.data.pairs import Pair, reopen_source
from t2i.errors import DataError
from t2i.generate.draw import draw_folder
from t2i.measure.features import FeatureExtractor, extract, kernel_key, metric_key
from t2i.measure.frechet import frechet_distance, kernel_distance, sample_size_note, statistics
from t2i.measure.heldout import HELDOUT_SPLITS, caption_meter
from t2i.model.configuration_open_lm import OpenLMConfig
from t2i.model.modeling_open_lm import OpenLMForCausalLM
from t2i.runs.ckpt import DATA_MANIFEST, Checkpoint
from t2i.tokens.image import centre_crop_resize, pictures_of, to_pixels

SCORES = "scores.json"
ROWS = {
    "real": "real pictures, the other half",
    "reconstructions": "that half through the image tokenizer",
    "model": "drawn from that half's captions",
    "shuffled": "drawn from the same captions in another order",
    "untrained": "drawn by the same model before training",
}


@dataclass(frozen=True)
class Halves:
    """Held-out pairs cut in two by a hash of the key, with their pictures as the model's size."""

    reference: list[Pair]
    drawn: list[Pair]


def heldout_halves(manifest: dict[str, Any], *, num_samples: int | None) -> Halves:
    """Read the held-out pairs of a manifest's source and cut them into halves of equal size.

    Raises:
        DataError: the source has fewer than 20 held-out pairs.
    """
    source = reopen_source(manifest)
    pairs = [pair for pair in source.pairs if pair.split in HELDOUT_SPLITS]
    pairs.sort(key=lambda pair: hash_uniform("halves", pair.key))
    half = len(pairs) // 2 if num_samples is None else min(num_samples, len(pairs) // 2)
    if half < 10:
        raise DataError(
            f"{manifest['source']} has {len(pairs)} held-out pairs; a distance needs at least 20."
        )
    return Halves(reference=pairs[half : 2 * half], drawn=pairs[:half])


def score(
    checkpoint: Checkpoint,
    *,
    out: Path,
    extractor: FeatureExtractor,
    sample: SampleConfig,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Draw, measure every row, write out/scores.json and return it. Drawn pictures are kept and reused.

    Raises:
        DataError: the model's folder does not tell its data, or the data has too few held-out pictures.
    """
    started = time.perf_counter()
    manifest = read_data_manifest(checkpoint)
    halves = heldout_halves(manifest, num_samples=num_samples)
    size = manifest["image_size"]
    real = {name: pictures(getattr(halves, name), size=size) for name in ("reference", "drawn")}
    captions = {f"{index:05d}": pair.caption for index, pair in enumerate(halves.drawn)}
    names = list(captions)
    moved = dict(zip(names, [captions[name] for name in names[1:] + names[:1]], strict=True))
    images: dict[str, Any] = {
        "real": real["drawn"],
        "reconstructions": reconstruct(checkpoint, real["drawn"]),
        "model": draw_folder(checkpoint, captions, out=out / "model", config=sample, description="draw"),
        "shuffled": draw_folder(
            checkpoint, moved, out=out / "shuffled", config=sample, description="draw shuffled"
        ),
        "untrained": draw_folder(
            untrained(checkpoint),
            captions,
            out=out / "untrained",
            config=sample,
            description="draw untrained",
        ),
    }
    reference = extract(real["reference"], extractor, batch_size=32)
    features = {row: extract(images[row], extractor, batch_size=32) for row in ROWS}
    distance, kernel = metric_key(extractor.name), kernel_key(extractor.name)
    against = statistics(reference)
    rows = {
        row: {
            "what": what,
            distance: frechet_distance(statistics(features[row]), against),
            kernel: kernel_distance(features[row], reference, seed=0),
        }
        for row, what in ROWS.items()
    }
    scores = {
        distance: rows["model"][distance],
        kernel: rows["model"][kernel],
        "rows": rows,
        "note": sample_size_note(distance, n=len(halves.drawn), dims=extractor.dims),
        "n": len(halves.drawn),
        "features": extractor.name,
        "features_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "reference": f"{len(halves.reference)} held-out pictures of {manifest['source']}, centre crop, {size} pixels",
        "captions": f"held-out captions of {manifest['source']}, by hash of the key",
        "captions_sha256": hashlib.sha256("\n".join(captions.values()).encode()).hexdigest(),
        "sampler": asdict(sample),
        "checkpoint": str(checkpoint.folder),
        "captions_heard": caption_meters(checkpoint, manifest),
        "seconds": time.perf_counter() - started,
    }
    (out / SCORES).write_text(json.dumps(scores, indent=1))
    return scores


def untrained(checkpoint: Checkpoint) -> Checkpoint:
    """Swap the model for one of the same architecture with random weights (seed 0)."""
    torch.manual_seed(0)
    model = OpenLMForCausalLM(cast(OpenLMConfig, checkpoint.model.config)).eval()
    return replace(checkpoint, model=model.to(device=checkpoint.model.device))


def read_data_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what a run or an exported folder tells of its data.

    Raises:
        DataError: it tells nothing.
    """
    path = (checkpoint.run_dir or checkpoint.folder) / DATA_MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing, so the held-out pictures of this model are not known.")
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def caption_meters(checkpoint: Checkpoint, manifest: dict[str, Any]) -> dict[str, Any]:
    """Measure, per held-out split, the image loss under the right, a wrong and the empty caption, nats a code."""
    source = reopen_source(manifest)
    config = DataConfig(seq_len=checkpoint.model.config.max_position_embeddings)
    meters = {}
    for split in HELDOUT_SPLITS:
        pairs = [pair for pair in source.pairs if pair.split == split]
        if len(pairs) < 2:
            continue
        codes = encode(checkpoint, pictures(pairs, size=manifest["image_size"]))
        samples = [
            {"codes": row, "caption_ids": checkpoint.text_tokenizer.encode(pair.caption).numpy()}
            for pair, row in zip(pairs, codes.numpy(), strict=True)
        ]
        meters[split] = asdict(
            caption_meter(checkpoint.model, samples, config=config, layout=checkpoint.layout, batch_size=32)
        )
    return meters


def pictures(pairs: list[Pair], *, size: int) -> np.ndarray:
    """Read pairs' pictures, cropped and resized: uint8 (N, H, W, 3)."""
    return np.stack([np.asarray(centre_crop_resize(pair.open(), size=size)) for pair in pairs])


def encode(checkpoint: Checkpoint, images: np.ndarray) -> torch.Tensor:
    """Encode uint8 pictures (N, H, W, 3) in batches: codes (N, K)."""
    batches = [images[start : start + 32] for start in range(0, len(images), 32)]
    return torch.cat(
        [
            checkpoint.image_tokenizer.encode(to_pixels([Image.fromarray(i) for i in batch])).cpu()
            for batch in batches
        ]
    )


def reconstruct(checkpoint: Checkpoint, images: np.ndarray) -> np.ndarray:
    """Send uint8 pictures (N, H, W, 3) through the image tokenizer and back."""
    codes = encode(checkpoint, images).split(32)
    return np.concatenate(
        [pictures_of(checkpoint.image_tokenizer.decode(batch)).cpu().numpy() for batch in codes]
    )
