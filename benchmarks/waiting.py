"""What a user waits for: --help, the first step of a run, a checkpoint and an export beside cp and a hash.

Times are wall-clock seconds of a process per command. The first run, which warms the disk's cache, is not counted.

Examples:
    python benchmarks/waiting.py
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import side_by_side

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("train", "prepare", "sample", "export", "study", "plan")


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    options = side_by_side.parse(parser)
    rows = []
    for name in LAUNCHERS[: 1 if options.quick else None]:
        # The most frequent wait of all, and the first: help should not import torch.
        command = [sys.executable, f"launchers/{name}.py", "--help"]
        rows.append(
            timed(f"waiting: {name}.py --help, seconds", command, rounds=options.rounds, target="<= 0.5")
        )
    with tempfile.TemporaryDirectory() as folder:
        rows.append(first_step(Path(folder), rounds=options.rounds))
        rows += saves_against_copies(Path(folder), rounds=options.rounds)
    side_by_side.write("waiting", rows, is_kept=not options.quick)


def timed(what: str, command: list[str], *, rounds: int, target: str) -> side_by_side.Row:
    """Run a command `rounds` times, after one that warms the disk's cache."""
    seconds = side_by_side.alternate({what: lambda: run(command)}, rounds=rounds, clock=time.perf_counter)[
        what
    ]
    return side_by_side.stated(what, seconds, target=target)


def run(command: list[str]) -> None:
    """Run from the repository's root, without output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )


def first_step(folder: Path, *, rounds: int) -> side_by_side.Row:
    """Train one step on the embedded images, which are prepared first if needed; includes the checkpoint."""
    what, places = "waiting: train.py to the end of its first step, seconds", iter(range(rounds + 1))

    def once() -> None:
        # A new folder each time: an existing run would resume, and have nothing left to do.
        run_dir = folder / f"run{next(places)}"
        flags = ["--run-dir", str(run_dir), "--train.max-steps", "1", "--train.eval-every", "0"]
        run([sys.executable, "launchers/train.py", "--ds_config", "ds_configs/zero2_fp32.json", *flags])

    seconds = side_by_side.alternate({what: once}, rounds=rounds, clock=time.perf_counter)[what]
    return side_by_side.stated(what, seconds, target="<= 30")


def saves_against_copies(folder: Path, *, rounds: int) -> list[side_by_side.Row]:
    """Save a model of 41M parameters as training does, and export it; compare with cp and xxh64 of the same files."""
    # Here, as the waits above are of processes: this one holds no torch while it times them.
    import training_step

    from t2i.config import ASSETS, TrainConfig
    from t2i.env import keep_memory
    from t2i.model.backbone import load_model
    from t2i.runs.checkpoint_store import step_folder
    from t2i.runs.export import export
    from t2i.runs.loading import OpenedModel
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer
    from t2i.train.checkpoint import Saver
    from t2i.train.progress import Progress

    keep_memory()
    run_dir, exported = folder / "large", folder / "exported"
    run_dir.mkdir()
    engine, text_tokenizer = training_step.engine_of(), TextTokenizer.load(ASSETS / "text_tokenizer")
    # One step first, as before every checkpoint of a run: what Adam keeps is then there to be saved.
    loss, _ = engine(*training_step.batch())
    engine.backward(loss)
    engine.step()
    saver = Saver(
        TrainConfig(keep_last=1),
        run_dir=run_dir,
        engine=engine,
        loader=SimpleNamespace(state_dict=dict, global_batch=1),
        inputs=SimpleNamespace(text_tokenizer=text_tokenizer),
    )
    steps = itertools.count(1)

    def save() -> Path:
        step = next(steps)
        saver.save(Progress(step=step), must_succeed=True)
        return step_folder(run_dir, step)

    what = "waiting: a checkpoint of 41M parameters / cp and hash"
    saves = against_copy(what, save, scratch=folder, rounds=rounds)
    saved = save()
    checkpoint = OpenedModel(
        saved,
        run_dir=None,
        model=load_model(saved).eval(),
        text_tokenizer=text_tokenizer,
        image_tokenizer=ImageTokenizer.load(ASSETS / "image_tokenizer"),
        layout=training_step.LAYOUT,
    )

    def export_anew() -> Path:
        shutil.rmtree(exported, ignore_errors=True)  # an export never overwrites a folder
        export(checkpoint, out=exported, command="")
        return exported

    what = "waiting: an export of 41M parameters / cp and hash"
    return [saves, against_copy(what, export_anew, scratch=folder, rounds=rounds)]


def against_copy(what: str, write: Callable[[], Path], *, scratch: Path, rounds: int) -> side_by_side.Row:
    """Write a folder; compare with cp and xxh64 of its files.

    Before each, more bytes are written and removed, so that both find memory for the disk's cache. The host of a
    virtual machine may lend it page by page, which takes ten times as long.
    """
    from t2i.files import file_hash

    written, place = [write()], scratch / "copy"
    room = bytes(2 * sum(path.stat().st_size for path in written[0].rglob("*")))

    def write_anew() -> None:
        written[0] = write()

    def copy() -> None:
        shutil.copytree(written[0], place)
        for path in place.rglob("*"):
            if path.is_file():  # hashed, as a checkpoint's manifest has a hash of each file
                file_hash(path)

    def make_room() -> None:
        shutil.rmtree(place, ignore_errors=True)
        (scratch / "room").write_bytes(room)
        (scratch / "room").unlink()

    candidates = {"write": write_anew, "copy": copy}
    seconds = side_by_side.alternate(candidates, rounds=rounds, clock=time.perf_counter, before=make_room)
    shutil.rmtree(place)
    return side_by_side.compared(what, seconds["write"], seconds["copy"], target="<= 1.5")


if __name__ == "__main__":
    main()
