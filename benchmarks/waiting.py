"""What a person waits for: --help, the first step of a run, and a checkpoint beside cp and a hash of the same bytes.

Seconds are of the clock, each command a process of its own, warm: the second run counts.

Examples:
    python benchmarks/waiting.py
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import side_by_side
import xxhash

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("train", "prepare", "sample", "export", "study", "plan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=side_by_side.ROUNDS)
    options = parser.parse_args()
    rows = []
    for name in LAUNCHERS:
        command = [sys.executable, f"launchers/{name}.py", "--help"]
        rows.append(
            timed(f"waiting: {name}.py --help, seconds", command, rounds=options.rounds, target="<= 0.5")
        )
    with tempfile.TemporaryDirectory() as folder:
        rows.append(first_step(Path(folder), rounds=options.rounds))
        rows.append(commit_against_copy(Path(folder), rounds=options.rounds))
    side_by_side.write("waiting", rows)


def timed(what: str, command: list[str], *, rounds: int, target: str) -> side_by_side.Row:
    """Run a command so many times after one that warms the disk's cache."""
    seconds = side_by_side.alternate({what: lambda: run(command)}, rounds=rounds, clock=time.perf_counter)[
        what
    ]
    return side_by_side.stated(what, seconds, target=target)


def run(command: list[str]) -> None:
    """Run from the repository's root, quietly."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )


def first_step(folder: Path, *, rounds: int) -> side_by_side.Row:
    """Train one step on the embedded pictures, which are prepared first if need be; the checkpoint is included."""
    what, places = "waiting: train.py to the end of its first step, seconds", iter(range(rounds + 1))

    def once() -> None:
        run_dir = folder / f"run{next(places)}"
        flags = ["--run-dir", str(run_dir), "--train.max-steps", "1", "--train.eval-every", "0"]
        run([sys.executable, "launchers/train.py", "--ds_config", "ds_configs/zero2_fp32.json", *flags])

    seconds = side_by_side.alternate({what: once}, rounds=rounds, clock=time.perf_counter)[what]
    return side_by_side.stated(what, seconds, target="<= 30")


def commit_against_copy(folder: Path, *, rounds: int) -> side_by_side.Row:
    """Commit the files of a checkpoint as training does; against cp and xxh64 of the same bytes."""
    from t2i.runs import checkpoints

    run_dir = folder / "run0"
    source = next((run_dir / checkpoints.CHECKPOINTS).glob("step_*"))
    target, places = folder / "copies", iter(range(1_000))
    files = [path for path in source.rglob("*") if path.is_file() and path.name != checkpoints.MANIFEST]

    def copy(to: Path) -> None:
        for path in files:
            place = to / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)

    def plain() -> None:
        place = target / str(next(places))
        copy(place)
        for path in files:
            xxhash.xxh64((place / path.relative_to(source)).read_bytes()).hexdigest()

    def committed() -> None:
        other = target / f"run{next(places)}"
        other.mkdir(parents=True)
        copy(checkpoints.begin(other))
        checkpoints.commit(other, step=1, facts={}, keep_last=2)

    seconds = side_by_side.alternate(
        {"plain": plain, "ours": committed}, rounds=rounds, clock=time.perf_counter
    )
    return side_by_side.compared(
        "waiting: a checkpoint's commit / cp and hash", seconds["ours"], seconds["plain"], target="<= 1.5"
    )


if __name__ == "__main__":
    main()
