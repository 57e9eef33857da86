"""How time grows with width, depth, sequence length, vocabulary, batch and ranks, with fitted exponents.

An exponent is the slope of log seconds over the two largest sizes, as small sizes are all overhead. Ranks are processes
of one thread, each with the same share of a batch, started by the launcher. Growth with samples is in loading.py.

Examples:
    python benchmarks/growth.py
"""

import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import side_by_side
import torch

from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.vocab import VocabLayout
from t2i.train.engine import Learner

ROOT = Path(__file__).parents[1]
BASE = {"width": 256, "depth": 4, "length": 128, "codes": 1_024, "batch": 4}
SIZES = {
    "width": (128, 256, 512),
    "depth": (2, 4, 8),
    "length": (128, 256, 512),
    "codes": (1_024, 4_096, 16_384),
    "batch": (2, 4, 8),
}
MOST = {"width": 2.1, "depth": 1.1, "length": 2.1, "codes": 1.1, "batch": 1.1}
"""The largest exponents: what the mathematics says, plus 0.1 for the measurement. Products grow with the square of the
width, attention with that of the length."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    options = side_by_side.parse(parser)
    torch.set_num_threads(1)  # threads would add their own overhead, which grows with no size
    rows, figures = [], {}
    for work, make in {"training": training, "sampling": sampling}.items():
        for axis, all_sizes in SIZES.items():
            sizes = all_sizes[: 2 if options.quick else None]
            steps = {str(size): make(**{**BASE, axis: size}) for size in sizes}
            seconds = side_by_side.alternate(steps, rounds=options.rounds)
            slopes = [slope(seconds, sizes, pick=round_) for round_ in range(options.rounds)]
            # Of the least times: the exponent of one round is a ratio of two noisy numbers, and its spread is shown.
            least = slope({name: [min(times)] for name, times in seconds.items()}, sizes, pick=0)
            middle = sorted(slopes)[len(slopes) // 2]
            target = f"<= {MOST[axis]}"
            what = f"growth of {work} with {axis}: exponent"
            row = side_by_side.Row(what, least, middle, (min(slopes), max(slopes)), len(slopes), target)
            rows.append(row.say())
            figures[f"{work}, {axis}"] = {name: min(times) for name, times in seconds.items()}
    if not options.quick:
        rows.append(ranks(rounds=options.rounds))
        plot(figures, ROOT / "docs" / "growth.svg")
    side_by_side.write("growth", rows, figures={"least seconds": figures}, is_kept=not options.quick)


def slope(seconds: dict[str, list[float]], sizes: tuple[int, ...], *, pick: int) -> float:
    """Fit the exponent between the two largest sizes."""
    before, last = sizes[-2:]
    return math.log(seconds[str(last)][pick] / seconds[str(before)][pick]) / math.log(last / before)


def model_of(width: int, depth: int, *, length: int, codes: int) -> tuple[OpenLMForCausalLM, VocabLayout]:
    """Make a randomly initialised model with heads of 64."""
    layout = VocabLayout(2_048, num_text_tokens=2_000, codebook_size=codes)
    # Heads of one size: with one number of heads, attention's own shape would change with the width.
    config = OpenLMConfig(layout.vocab_size, width, depth, width // 64, max_position_embeddings=length)
    return OpenLMForCausalLM(config), layout


def training(width: int, depth: int, *, length: int, codes: int, batch: int) -> Callable[[], None]:
    """Prepare a forward and backward pass of image ids (B, S)."""
    model, layout = model_of(width, depth, length=length, codes=codes)
    learner = Learner(model.train(), layout=layout)
    ids = layout.image_ids(torch.randint(codes, (batch, length)))

    def step() -> None:
        learner.zero_grad()
        learner(ids, ids.roll(-1, 1))[0].backward()

    return step


def sampling(width: int, depth: int, *, length: int, codes: int, batch: int) -> Callable[[], object]:
    """Prepare sampling `batch` images of `length` codes."""
    model, layout = model_of(width, depth, length=length + 8, codes=codes)
    images = range(layout.first_image_id, layout.first_image_id + codes)
    prompts = [[layout.special_id("<doc>"), layout.special_id("<image>")]] * batch
    return lambda: sample_codes(
        model.eval(),
        prompts,
        empty_prompt=prompts[0],
        image_ids=images,
        num_codes=length,
        seeds=range(batch),
        top_k=50,
    )


def ranks(*, rounds: int) -> side_by_side.Row:
    """Train on one and on two ranks: wall-clock seconds of a step, with as many tokens per rank."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for round_, number in itertools.product(range(rounds), seconds):
            run_dir = Path(scratch) / f"{number}-{round_}"
            flags = [f"--train.global-batch-tokens={number * 16 * 96}", "--train.max-steps=12"]
            flags += [
                "--train.eval-every=0",
                f"--run-dir={run_dir}",
                "--ds_config=ds_configs/zero2_fp32.json",
            ]
            deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(number)]
            # One rank runs without the launcher, as a user would start it.
            launcher = deepspeed if number > 1 else [sys.executable]
            subprocess.run(
                [*launcher, "launchers/train.py", *flags], cwd=ROOT, check=True, capture_output=True
            )
            steps = [row["step_seconds"] for row in read_metrics(run_dir) if "split" not in row]
            seconds[number].append(min(steps[2:]))  # the first steps allocate memory and load the first shard
    what = "growth of training with ranks: a step of 2 ranks / of 1, as many tokens per rank, seconds"
    return side_by_side.compared(what, seconds[2], seconds[1])


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Draw seconds over size, both in logarithms."""
    import matplotlib.pyplot as plt  # only here: it takes a second to import, and timings come first

    plt.rcParams["svg.hashsalt"] = path.name  # the same image is the same file
    drawing, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for name, points in figures.items():
        work, axis = name.split(", ")
        place = axes[0 if work == "training" else 1]
        first = int(next(iter(points)))
        place.loglog([int(size) / first for size in points], list(points.values()), marker="o", label=axis)
        place.set(title=work, xlabel="size, as a multiple of the smallest", ylabel="CPU seconds")
        place.legend()
    drawing.tight_layout()
    drawing.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
