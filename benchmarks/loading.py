"""Loading pairs: time to the first batch of a million, memory against their number, speed beside other formats.

Examples:
    python benchmarks/loading.py
    python benchmarks/loading.py --samples 100000
    python benchmarks/loading.py --first-batch FOLDER     seconds and bytes of one folder
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import side_by_side
import torch

from t2i.config import ASSETS, DataConfig
from t2i.data.shards.manifest import FORMAT_VERSION
from t2i.files import HASH
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout

CODES, CODEBOOK, BATCH, IN_A_SHARD = 1_024, 16_384, 64, 512
RANK_PAIRS = 14
STEP_SECONDS = RANK_PAIRS * 1_152 / 22_000
"""Time of the paper's step on 64 A100 at llm-foundry's 22,000 tokens per second."""
NOTE = "the step time is from llm-foundry's benchmarks, not measured here"


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--first-batch", type=Path)
    options = side_by_side.parse(parser, samples=51_200)
    torch.set_num_threads(1)  # as a DataLoader's workers have
    if options.first_batch:
        print(json.dumps(first_batch(options.first_batch)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = against_number(folder, num_samples=options.samples, rounds=options.rounds)
        rows += against_formats(folder, rounds=options.rounds)
    side_by_side.write("loading", rows, is_kept=not options.quick)


def against_number(folder: Path, *, num_samples: int, rounds: int) -> list[side_by_side.Row]:
    """Start on few and on many samples, each in its own process."""
    # A hundredth as the baseline: if memory held an index of all samples, the ratio would show it at once.
    few, many = (make_shards(folder / str(number), number) for number in (num_samples // 100, num_samples))
    # In new processes: a second opening would find imports, caches and Streaming's shared memory of the first.
    found = [[start(path) for path in (few, many)] for _ in range(rounds)]
    seconds = [pair[1]["seconds"] for pair in found]
    growth = [pair[1]["bytes"] / pair[0]["bytes"] for pair in found]
    case = f"loading {num_samples:,} pairs"
    return [
        side_by_side.stated(f"{case}: seconds to the first batch", seconds, target="<= 3"),
        side_by_side.stated(f"{case}: memory / that of a hundredth of them", growth, target="<= 1.1"),
    ]


def start(folder: Path) -> dict[str, float]:
    """Run first_batch in a new process."""
    command = [sys.executable, __file__, "--first-batch", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def first_batch(folder: Path) -> dict[str, float]:
    """Open shards; return the seconds until the first batch and the resident bytes then."""

    import t2i.data.loader  # noqa: F401  imported before the clock starts, as imports are not what is measured

    started = time.perf_counter()
    next(t2i_batches(folder))
    seconds = time.perf_counter() - started
    # What is resident now, not at the peak: it is what a run keeps for its whole time.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"seconds": seconds, "bytes": pages * os.sysconf("SC_PAGE_SIZE")}


def against_formats(folder: Path, *, rounds: int) -> list[side_by_side.Row]:
    """Read 20 batches of 64 through each format's usual loop."""
    sources = {
        "t2i": t2i_batches(make_shards(folder / "own", 8 * IN_A_SHARD)),
        "webdataset": webdataset_batches(folder),
        "datasets": datasets_batches(folder),
        "numpy memmap": memmap_batches(folder),
    }
    # Iterators are kept between rounds: each format's start-up is not what a long run pays for.
    iterators = {name: iter(source) for name, source in sources.items()}
    candidates: dict[str, Callable[[], object]] = {
        name: lambda batches=batches: [next(batches) for _ in range(20)]
        for name, batches in iterators.items()
    }
    seconds = side_by_side.alternate(candidates, rounds=rounds)
    rows = [waiting(folder / "own"), cpu_share(seconds["t2i"])]
    # Of each format, so that other loaders can be put beside them.
    for name, times in seconds.items():
        per_second = [20 * BATCH * CODES / value for value in times]
        what = f"loading: codes per CPU second, one process, {name}"
        rows.append(side_by_side.stated(what, per_second, best=max))
    for name in ("webdataset", "datasets", "numpy memmap"):
        rows.append(side_by_side.compared(f"loading: {name} / t2i", seconds[name], seconds["t2i"]))
    return rows


def waiting(folder: Path) -> side_by_side.Row:
    """Read a rank's pairs of each step by four workers, as the paper's run file does; measure the share of waiting."""
    batches = t2i_batches(folder, num_pairs=RANK_PAIRS, num_workers=4)
    next(batches)  # starts the workers
    shares = []
    for _ in range(10):
        time.sleep(STEP_SECONDS)  # stands for the device's step, in which workers read ahead
        started = time.perf_counter()
        next(batches)
        shares.append((time.perf_counter() - started) / STEP_SECONDS)
    what = f"loading: waiting for a rank's {RANK_PAIRS} pairs, four workers / the step of an A100"
    return side_by_side.stated(what, shares, best=statistics.median, target="<= 0.01", note=NOTE)


def cpu_share(seconds: list[float]) -> side_by_side.Row:
    """Compare the CPU seconds of 20 batches, read without workers, with a rank's step."""
    shares = [value / 20 / BATCH * RANK_PAIRS / STEP_SECONDS for value in seconds]
    what = f"loading: CPU of a rank's {RANK_PAIRS} pairs / the step of an A100"
    return side_by_side.stated(what, shares, note=NOTE)


def t2i_batches(folder: Path, *, num_pairs: int = BATCH, num_workers: int = 0) -> Iterator[object]:
    """Read as training does."""
    # Here and not above: --first-batch times what stands after its own imports.
    from t2i.data.loader import StepLoader
    from t2i.distributed.launch import prepare_environment

    prepare_environment()
    layout = VocabLayout(50_432, num_text_tokens=50_277, codebook_size=CODEBOOK)
    return iter(
        StepLoader(
            DataConfig(shards=folder, seq_len=1_152, num_workers=num_workers),
            layout=layout,
            global_batch=num_pairs,
            world_size=1,
            seed=0,
            tokenizer=TextTokenizer.load(ASSETS / "text_tokenizer"),
        )
    )


def pairs(number: int) -> Iterator[dict[str, np.ndarray]]:
    """Make pairs of 30 caption ids and 1,024 codes."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        yield {
            "caption_ids": rng.integers(0, 2_000, 30, dtype=np.uint16),
            "codes": rng.integers(0, CODEBOOK, CODES, dtype=np.uint16),
        }


def make_shards(folder: Path, number: int) -> Path:
    """Write one shard, and hard-link it until there are `number` samples."""
    from streaming import MDSWriter  # seconds of import that the process of --first-batch does without

    columns = {"key": "str", "caption": "str", "caption_ids": "ndarray:uint16", "codes": "ndarray:uint16"}
    with MDSWriter(out=str(folder / "train"), columns=columns, size_limit=None, hashes=[HASH]) as writer:
        for index, pair in enumerate(pairs(IN_A_SHARD)):
            writer.write({"key": str(index), "caption": "a caption", **pair})
    index_file = folder / "train" / "index.json"
    index = json.loads(index_file.read_text())
    first = index["shards"][0]
    name = first["raw_data"]["basename"]
    copies = []
    for place in range(number // IN_A_SHARD):
        copy = f"shard.{place:05d}.mds"
        if copy != name:
            # A link and not a copy: a million pairs would be 2 GB, and reading them is the same.
            os.link(folder / "train" / name, folder / "train" / copy)
        copies.append({**first, "raw_data": {**first["raw_data"], "basename": copy}})
    index_file.write_text(json.dumps({**index, "shards": copies}))
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": "benchmarks/loading.py",
        "heldout_share": 0.0,
        "counts": {"train": len(copies) * IN_A_SHARD},
        "files": {},
        "arguments": {},
        "text_tokenizer": {
            "name": "embedded",
            "fingerprint": tokenizer.fingerprint(),
            "num_tokens": tokenizer.num_tokens,
        },
        "image_tokenizer": {"name": "none", "fingerprint": "none"},
        "given_ids": True,
        "codes_per_image": CODES,
        "codebook_size": CODEBOOK,
        "floors_nats": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def webdataset_batches(folder: Path) -> Iterator[object]:
    """Read a tar of .npy files as webdataset's own examples do."""
    import webdataset  # an extra of the benchmarks alone

    path = folder / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for index, pair in enumerate(pairs(8 * IN_A_SHARD)):
            for name, values in pair.items():
                buffer = io.BytesIO()
                np.save(buffer, values)
                info = tarfile.TarInfo(f"{index:06d}.{name}.npy")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    data = webdataset.WebDataset(str(path), shardshuffle=False).repeat().shuffle(1_000).decode()
    return iter(
        torch.utils.data.DataLoader(
            data.to_tuple("caption_ids.npy", "codes.npy"), batch_size=BATCH, collate_fn=list
        )
    )


def datasets_batches(folder: Path) -> Iterator[object]:
    """Read parquet as `datasets` does, shuffled by index."""
    import datasets  # slow to import, and only one candidate needs it

    rows = [{name: values.tolist() for name, values in pair.items()} for pair in pairs(8 * IN_A_SHARD)]
    path = folder / "pairs.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    data = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache")
    )
    loader = torch.utils.data.DataLoader(
        data.with_format("numpy"), batch_size=BATCH, shuffle=True, collate_fn=list
    )
    return (batch for _ in iter(int, 1) for batch in loader)


def memmap_batches(folder: Path) -> Iterator[object]:
    """Gather rows of one array on disk: a lower bound for reading."""
    path = folder / "pairs.npy"
    np.save(path, np.stack([np.concatenate(list(pair.values())) for pair in pairs(8 * IN_A_SHARD)]))
    whole = np.load(path, mmap_mode="r")
    rng = np.random.default_rng(0)
    return (
        torch.from_numpy(whole[rng.integers(0, len(whole), BATCH)].astype(np.int64)) for _ in iter(int, 1)
    )


if __name__ == "__main__":
    main()
