"""Several codes per pass against one: passes, seconds and equal codes.

Passes depend on what a model was trained on, so a run is needed: `make codes256` trains it. --exact asks whether codes
are equal, and takes a randomly initialised model. Seconds are those of the whole drawing with the run's model on one
core, and of one whole pass, draws included, on two cores by a model of SmolLM2-135M's size, which is bound by memory.

Examples:
    python benchmarks/window.py
    python benchmarks/window.py --exact 10000
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import side_by_side
import torch
from exactness import EMPTY, NUM_CODES, compare, random_model
from guesses import bigram_chances, counting, guessing, rules_of
from torch import Tensor

from t2i.config import SampleConfig
from t2i.data.shards.reader import read_split
from t2i.generate.sample import Drawer, draw_codes, drawer_of
from t2i.model.open_lm import window_open_lm
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.products_open_lm import product
from t2i.model.open_lm.race_open_lm import Draws, image_keys, kept_codes
from t2i.model.open_lm.window_open_lm import Batch, Passes
from t2i.runs.loading import open_model

CAPTIONS = 8
"""Captions whose passes are counted."""
PARTS = ("passes", "images", "pass")
HOWS: dict[str, dict[str, float]] = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 3": {"guidance_scale": 3.0},
    "temperature 0": {"temperature": 0.0},
    "top-k 0": {"top_k": 0},
    "top-p 0.9": {"top_p": 0.9},
}
"""Beside the default: guidance 2, temperature 0.9, top-k 50."""
WINDOWS = (2, 4, 8, 16, 32, 64)
PASSES_PER_ROUND = 4
"""A single pass takes hundredths of a second, so more of them are timed than of whole images."""
SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1_536}
"""SmolLM2-135M's size as an open_lm model."""
CODEBOOK = range(1_024, 2_048)
"""Its image ids: as many codes as the run's model draws from."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/codes256"), help="a run of 256 codes per image"
    )
    parser.add_argument(
        "--shards", type=Path, default=Path("data/openmoji128"), help="its shards, for captions"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="results are kept of all parts only"
    )
    parser.add_argument(
        "--exact", type=int, default=0, help="only compare so many images of a randomly initialised model"
    )
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of --exact")
    options = side_by_side.parse(parser, parts=["images"])
    torch.set_num_threads(1)
    if options.exact:
        print(compare(options.exact, dtype=getattr(torch, options.dtype)))
        return
    if not options.run.exists():
        # A quick look at everything else does not wait for it.
        print(
            f"window: {options.run} does not exist; `make codes256` trains it in half an hour on two cores."
        )
        sys.exit(0 if options.quick else 1)
    drawer = drawer_of(open_model(str(options.run), needs_images=True), settings=SampleConfig())
    captions = [sample["caption"] for sample in read_split(options.shards, "heldout", num_samples=64)]
    few = captions[:CAPTIONS]
    figures, profiles, rows = {}, {}, []
    if "passes" in options.parts:
        figures = {name: count_passes(drawer, few, (8, 32), how) for name, how in HOWS.items()}
        chances = bigram_chances(options.shards, codebook_size=drawer.layout.codebook_size)
        for name, rule in rules_of(chances).items():
            with guessing(rule):
                figures[f"guesses: {name}"] = count_passes(drawer, few, (8, 32), {})
    if "images" in options.parts:
        for batch in (1, 8) if options.quick else (1, 8, 32):
            rows += time_images(drawer, captions[:batch], rounds=options.rounds)
    if "pass" in options.parts:
        figures["by default"] = passes = count_passes(drawer, few, WINDOWS, {})
        for window in WINDOWS:
            what = f"window {window}: passes of one code at a time / passes, {CAPTIONS} captions"
            # Of the largest window that is chosen by default.
            target = ">= 3" if window == max(window_open_lm.WINDOWS) else ""
            ratio = (NUM_CODES - 1) / passes[f"window {window}"]
            rows.append(side_by_side.stated(what, [ratio], target=target))
        timed, shares = time_passes(passes, rounds=options.rounds)
        rows += timed
        profiles = {"share of a pass's time by operator, profiled once": shares}
    if len(options.parts) == len(PARTS):
        figures_of = {"passes per image": figures, **profiles}
        side_by_side.write("window", rows, figures=figures_of, is_kept=not options.quick)


def count_passes(
    drawer: Drawer, captions: list[str], windows: tuple[int, ...], how: dict[str, float]
) -> dict[str, float]:
    """Count the passes per image, after the prompt's, by window; and measure the entropy of a code's probabilities."""
    found: dict[str, float] = {}
    for window in windows:
        settings = replace(drawer.settings, window=window, **how)
        with counting() as rows, measuring_entropy() as entropies:
            draw_codes(replace(drawer, settings=settings), captions)
        per_image = 2 if settings.guidance_scale != 1 else 1
        # Of the images of the batch together, so that those which are finished no longer count.
        found[f"window {window}"] = round(sum(rows) / per_image / len(captions), 1)
        found["nats per code"] = round(sum(entropies) / len(entropies), 2)
    print(how, found, flush=True)
    return found


@contextmanager
def measuring_entropy() -> Iterator[list[float]]:
    """Collect the mean entropy of what is drawn from in each pass (of guessed places too)."""
    entropies: list[float] = []

    def measured(logits: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
        likely = kept_codes(logits, **settings)
        entropies.append(torch.special.entr(likely[0]).sum(-1).mean().item())
        return likely

    window_open_lm.kept_codes = measured
    try:
        yield entropies
    finally:
        window_open_lm.kept_codes = kept_codes


def time_images(drawer: Drawer, captions: list[str], *, rounds: int) -> list[side_by_side.Row]:
    """Time whole drawings of one batch: window auto and 8 against one code at a time."""
    candidates = {
        str(window): functools.partial(
            draw_codes, replace(drawer, settings=replace(drawer.settings, window=window)), captions
        )
        for window in ((1, "auto", 4, 8) if len(captions) == 1 else (1, "auto"))
    }
    seconds = side_by_side.alternate(candidates, rounds=rounds)
    what = f"the run's model, 256 codes, batch {len(captions)}: window 1 / window"
    return [
        side_by_side.compared(
            f"{what} {name}", seconds["1"], seconds[name], target=">= 0.97" if name == "auto" else ""
        )
        for name in candidates
        if name != "1"
    ]


@torch.inference_mode()
def time_passes(
    passes: dict[str, float], *, rounds: int
) -> tuple[list[side_by_side.Row], dict[str, dict[str, float]]]:
    """Time single passes of SmolLM2-135M's size on two cores; multiply with the run's model's passes per image."""
    halfway, rewind = half_an_image(random_model(SMOLLM2, image_ids=CODEBOOK, dtype=torch.float32))
    windows = (2, 4, 8, 16, 32)
    candidates: dict[str, Callable[[], object]] = {"1": halfway.single}
    candidates |= {str(window): functools.partial(halfway.several, window) for window in windows}
    torch.set_num_threads(2)
    # On two cores a person waits for the slower one, so these are seconds on the clock.
    seconds = side_by_side.alternate(
        candidates, rounds=rounds * PASSES_PER_ROUND, clock=time.perf_counter, before=rewind
    )
    torch.set_num_threads(1)
    rows = []
    for window in windows:
        saved = (NUM_CODES - 1) / passes[f"window {window}"]
        what = f"SmolLM2-135M's size, batch 1, two cores: seconds per image, window 1 / window {window}"
        times = [value * saved for value in seconds["1"]]
        rows.append(
            side_by_side.compared(what, times, seconds[str(window)], note=f"{saved:.2f} times fewer passes")
        )
    best = max(rows, key=lambda row: row.ratio)
    best = replace(best, what="SmolLM2-135M's size, batch 1, two cores: the best window", target=">= 1.5")
    shares = {}
    for name in ("1", "4", "8", "16"):
        rewind()
        shares[f"{name} codes"] = side_by_side.time_by_operator(candidates[name])
    return [*rows, best.say()], shares


@torch.inference_mode()
def half_an_image(model: OpenLMForCausalLM) -> tuple[Passes, Callable[[], object]]:
    """Begin an image as sample_codes does, and go to its middle, where the cache is as long as it is on average.

    Returns:
        what makes a whole pass: the body, the head, top-k, the race and guesses; and a function that undoes a pass.
    """
    _, decoder = model.begin_decoding([[3, 4, 5, *range(10)]], empty_prompt=EMPTY, num_codes=NUM_CODES)
    to_logits = product(model.output.weight[CODEBOOK.start :], num_rows=1)
    how = Draws(CODEBOOK, guidance_scale=2.0, temperature=0.9, top_k=50, top_p=1.0)
    codes = torch.randint(len(CODEBOOK), (1, NUM_CODES + 1), generator=torch.Generator().manual_seed(0))
    keys = image_keys(torch.tensor([0]), num_codes=NUM_CODES)
    batch = Batch(codes.clone(), keys, torch.arange(1), [NUM_CODES // 2])

    def rewind() -> None:
        # Else the guesses of one pass would be right in the next, and more and more be guessed behind them.
        batch.codes.copy_(codes)
        batch.known = [NUM_CODES // 2]

    return Passes(batch, decoder, decoder.length - 1, to_logits, how), rewind


if __name__ == "__main__":
    main()
