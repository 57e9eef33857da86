"""Every causal language model class that the installed transformers maps, each in a process of its own.

    python tests/backbones/table.py [--only TYPE ...] [--processes 2]

Writes what was found to tests/backbones/transformers_N.json, from which docs/backbones.md is made.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")

import processes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from backbones.one_class import FAILS, Found, try_class  # noqa: E402
from backbones.page import results_file, write_page  # noqa: E402
from made_shards import make_shards  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

TIMEOUT_SECONDS = 400


def tried(model_type: str, *, shards: Path, timeout_seconds: int = TIMEOUT_SECONDS) -> Found:
    """Try a class in a process of its own: a crash or a hang is a row."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = processes.FORK.Pipe(duplex=False)
        process = processes.fork(_send, theirs, model_type, shards, Path(folder))
        theirs.close()
        found = Found(model_type, result=FAILS, step="?", reason=f"did not end in {timeout_seconds} seconds")
        try:
            if ours.poll(timeout_seconds):
                found = ours.recv()
        except EOFError:
            process.join()
            found.reason = f"its process ended with exit status {process.exitcode}"
        process.kill()
        process.join()
        return found


def _send(pipe: Connection, model_type: str, shards: Path, folder: Path) -> None:
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # some classes ask on stdin
    pipe.send(try_class(model_type, shards=shards, folder=folder))


def main() -> None:
    """Try the classes, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    processes.guard()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    # Once here, not again in every process.
    for name in ("streaming", "peft", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"):
        importlib.import_module(name)
    started, file = time.monotonic(), results_file(transformers.__version__)
    is_whole = len(options.only) == len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = {} if is_whole or not file.exists() else json.loads(file.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        shards = make_shards(Path(folder), num_images=24, image_size=32)
        # Alone: the first process of an environment builds DeepSpeed's operators, for which the others would wait.
        tried(options.only[0], shards=shards, timeout_seconds=10 * TIMEOUT_SECONDS)
        # Kimi Linear's class hangs in a process that was forked from another thread than the first.
        tried_all = pool.map if options.processes > 1 else map
        for found in tried_all(lambda name: tried(name, shards=shards), options.only):
            rows[found.model_type] = asdict(found)
            results = {
                "transformers": transformers.__version__,
                "mapped": len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
                "rows": dict(sorted(rows.items())),
            }
            file.write_text(json.dumps(results, indent=1) + "\n")  # at once: what was tried is not lost
            print(f"{found.model_type}: {found.result} {found.step} {found.reason}", flush=True)
    write_page()
    print(f"{len(options.only)} classes in {(time.monotonic() - started) / 60:.0f} minutes; {file}")


if __name__ == "__main__":
    main()
