"""How fast can a model learn to draw the embedded emoji? Seconds of training on this machine, to a target.

A try is a set of flags of `t2i train`, trained once per seed on two cores. It holds the record where the means over
five seeds reach both targets in the least seconds. What failed is kept too: all tries go into results/speedrun.json
and docs/speedrun.md.

Examples:
    python benchmarks/speedrun.py                             # the record again, or the fastest pilot
    python benchmarks/speedrun.py --name "half the batch" -- --train.global-batch-tokens 1536
    python benchmarks/speedrun.py --name "twice the rate" --seeds 1 -- --train.lr 3e-3

Stop it and run it again to resume: seeds that this commit has finished are not trained again.
"""

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import side_by_side

from t2i.errors import Stopped
from t2i.runs.metrics_log import read_metrics
from t2i.study.statistics import paired_test

ROOT = Path(__file__).parents[1]
FILE, PAGE = side_by_side.RESULTS / "speedrun.json", ROOT / "docs" / "speedrun.md"
BF16, FP32 = "ds_configs/zero2_bf16_cpu.json", "ds_configs/zero2_fp32.json"
LOSS_TARGET, JUDGE_TARGET = 3.60, 0.80
"""What the demo reached before any try: 1,600 steps of 32 images, with train's defaults (one seed)."""
FIXED = (
    "--config",  # a file may set any of the others
    "--data.",
    "--run-dir",
    "--train.seed",
    "--train.eval-",
    "--train.save-every",
    "--train.sample-every",
)
"""Flags that are no try's to set: images, and what is measured."""
CORES = 2
ENOUGH_SEEDS = 5
"""Fewer are a pilot, which sets no record."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="", help="what is tried, in a few words; default: the record again")
    parser.add_argument(
        "--seeds", type=int, default=ENOUGH_SEEDS, help="number of runs; fewer than 5 are a pilot"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "speedrun", help="folder of the runs")
    parser.add_argument("flags", nargs="*", help="flags of `t2i train`, behind --")
    options = parser.parse_args()
    tries = read_tries()
    name, flags = options.name, options.flags
    if not name:
        if flags:
            parser.error("flags are of something new; name it with --name")
        best = record_of(tries) or fastest(filter(is_met, tries))
        if not best:
            parser.error("no try has reached the targets yet; name a new one with --name")
        name, flags = best["name"], best["flags"]
    for flag in flags:
        if spelt(flag).startswith(FIXED):
            parser.error(f"{flag} is the same for all tries: images, seeds and what is measured")
    # The same try again, with more seeds or on another machine, takes the place of the earlier one.
    for one in (one for one in tries if one["name"] == name):
        if one["flags"] != flags:
            parser.error(
                f"{name} is a try with other flags, {shlex.join(one['flags'])}; choose another --name"
            )
        if len(one["runs"]) > options.seeds:
            parser.error(f"{name} has {len(one['runs'])} seeds, which --seeds {options.seeds} would replace")
    # Of this commit: seconds of another one's code are no seconds of this one's.
    facts = side_by_side.facts()
    if facts["commit"].endswith("+"):
        sys.exit("Files differ from the last commit, by which a try is kept; commit them first.")
    use_two_cores()
    folder = options.out / f"{slug(name)}-{facts['commit'][:8]}"
    runs = []
    for seed in range(options.seeds):
        runs.append(run_of(flags, seed=seed, folder=folder / f"seed{seed}"))
        print(f"{name}, seed {seed}: {said(runs[-1])}", flush=True)
    made = {"name": name, "flags": flags, "runs": runs, **facts}
    # Read again: another try may have ended in these hours.
    tries = [one for one in read_tries() if one["name"] != name] + [made]
    FILE.write_text(json.dumps(tries, indent=1) + "\n")
    PAGE.write_text(page_of(tries))
    print(f"{name}: {verdict_of(made)}. {PAGE} has all tries.")


def read_tries() -> list[dict]:
    """Read all tries; none before the first."""
    return json.loads(FILE.read_text()) if FILE.exists() else []


def spelt(flag: str) -> str:
    """Return the name in a flag in one spelling: both `-` and `_` are taken, and a value may follow `=`."""
    return flag.partition("=")[0].replace("_", "-")


def run_of(flags: list[str], *, seed: int, folder: Path) -> dict[str, float]:
    """Train and score one seed, or read what an earlier call has done of it."""
    command = [sys.executable, "-m", "t2i", "train", *flags, "--train.seed", str(seed)]
    if not any(spelt(flag) == "--ds-config" for flag in flags):
        command += ["--ds_config", BF16 if multiplies_bf16() else FP32]
    # Nothing but training is timed: what is measured is measured at the end.
    once = ["--train.eval-every", "1000000", "--train.eval-images", "1000", "--train.save-every", "0"]
    call([*command, *once, "--run-dir", str(folder)])
    scores = folder / "eval" / Path((folder / "latest").read_text().strip()).name / "scores.json"
    if not scores.is_file():
        call([sys.executable, "-m", "t2i", "score", str(folder), "--controls", "--bootstrap", "0"])
    rows = read_metrics(folder)
    last_step = [row for row in rows if "step_seconds" in row][-1]
    heldout = [row for row in rows if row.get("split") == "heldout"]
    scored = json.loads(scores.read_text())["rows"]
    drawn = scored["model"]
    return {
        "seed": seed,
        "steps": last_step["step"],
        "seconds": round(last_step["seconds"], 1),
        "loss": heldout[-1]["image_loss"],
        "caption": heldout[-1]["image_loss_wrong_caption"] - heldout[-1]["image_loss"],
        "judge": drawn["judge_pooled"],
        "frechet": drawn["fd_efficientnet_lite0"],
    }


def use_two_cores() -> None:
    """Keep this process, and those that it starts, to two of the machine's cores."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        sys.exit(f"This machine has {len(cores)} core; a speedrun is on {CORES}.")
    os.sched_setaffinity(0, cores)


def multiplies_bf16() -> bool:
    """Tell whether this processor has instructions for bf16, without which it is many times slower."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))


def call(command: list[str]) -> None:
    """Run a command in the repository's root; a failure ends all, and so does a signal, once the command has saved."""
    print(shlex.join(command), flush=True)
    # Not subprocess.run, which kills the command a quarter of a second after Ctrl-C.
    process = subprocess.Popen(command, cwd=ROOT)
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        process.terminate()  # also for Ctrl-C, as a run saves on SIGTERM before it ends

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, former in before.items():
            signal.signal(number, former)
    if code < 0:  # as a shell says that a signal ended it
        code = 128 - code
    if code or signals:  # a signal may come when the command is about done
        sys.exit(code or Stopped.exit_code)


def record_of(tries: list[dict]) -> dict | None:
    """Return the fastest of the tries that reach both targets with enough seeds."""
    valid = [one for one in tries if is_met(one) and len(one["runs"]) >= ENOUGH_SEEDS]
    return fastest(valid)


def fastest(tries: Iterable[dict]) -> dict | None:
    """Return the one of least seconds; None of none."""
    return min(tries, key=lambda one: mean(one, "seconds"), default=None)


def is_met(one: dict) -> bool:
    """Tell whether a try reaches both targets."""
    return mean(one, "loss") <= LOSS_TARGET and mean(one, "judge") >= JUDGE_TARGET


def verdict_of(one: dict) -> str:
    """Say in words what a try has reached."""
    found = f"{mean(one, 'seconds'):.0f} s, loss {mean(one, 'loss'):.3f}, judge {mean(one, 'judge'):.1%}"
    if not is_met(one):
        return f"missed: {found}"
    return f"met: {found}" if len(one["runs"]) >= ENOUGH_SEEDS else f"met, a pilot: {found}"


def mean(one: dict, key: str) -> float:
    """Average over a try's seeds."""
    return statistics.fmean(run[key] for run in one["runs"])


def interval(one: dict, key: str) -> float:
    """Return half of the 95% t interval of the mean; nan for one seed."""
    values = [run[key] for run in one["runs"]]
    test = paired_test(values, [0.0] * len(values))
    return test.high - test.mean


def slug(name: str) -> str:
    """Turn a name into a folder's."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def page_of(tries: list[dict]) -> str:
    """Write docs/speedrun.md."""
    met = sorted(filter(is_met, tries), key=lambda one: mean(one, "seconds"))
    missed = [one for one in tries if not is_met(one)]
    is_pilot = bool(met) and record_of(tries) is None
    state = [f"No record is set yet: these have fewer than {ENOUGH_SEEDS} seeds.\n"] if is_pilot else []
    return "\n".join([INTRODUCTION, *state, *table(met), MISSED, *table(missed)]) + "\n"


def table(tries: list[dict]) -> list[str]:
    """Write tries as a table."""
    if not tries:
        return ["None yet."]
    heads = [
        "what",
        "seconds",
        "loss",
        "shuffled - matched",
        "judge",
        "Frechet distance",
        "seeds",
        "commit, machine",
    ]
    return [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *map(line_of, tries)]


def line_of(one: dict) -> str:
    """Write one row: means and half of their 95% intervals."""
    flags = f"<br>`{shlex.join(one['flags'])}`" if one["flags"] else ""
    is_pilot = len(one["runs"]) < ENOUGH_SEEDS
    cells = [
        f"{one['name']}{flags}",
        with_interval(one, "seconds", "{:.0f}"),
        with_interval(one, "loss", "{:.3f}"),
        with_interval(one, "caption", "{:.3f}"),
        with_interval(one, "judge", "{:.1%}"),
        with_interval(one, "frechet", "{:.1f}"),
        f"{len(one['runs'])}{' (pilot)' if is_pilot else ''}",
        f"{one['commit'][:7]}, {one['date']}, {one['machine']}",
    ]
    return f"| {' | '.join(cells)} |"


def with_interval(one: dict, key: str, form: str) -> str:
    """Write a mean and half of its interval."""
    half = interval(one, key)
    return form.format(mean(one, key)) + ("" if math.isnan(half) else f" ± {form.format(half)}")


def said(run: dict[str, float]) -> str:
    """Say one run."""
    return f"{run['seconds']:.0f} s, loss {run['loss']:.3f}, judge {run['judge']:.1%}, {run['steps']} steps"


INTRODUCTION = f"""# Speedrun

Written by `make speedrun`. How fast can a model learn to draw the embedded emoji? The images, two cores and the
targets are fixed; everything else that `t2i train` has a flag for is free. Seconds are in training steps: starting and
measuring are left out. The targets are means over five seeds: a held-out image loss of at most {LOSS_TARGET:.2f} nats
per code (394 images, of which no variant was trained on), and at least {JUDGE_TARGET:.0%} of all that held-out captions
state found in their drawn images by the [exact judge](evaluation.md#the-exact-judge). That is what the demo reached
before any of these tries, with the defaults of `t2i train` then: codes drawn around zero.

To try something: `python benchmarks/speedrun.py --name "what it is" -- FLAGS`. Behind ± is half of a 95% t interval of
the mean over seeds. Seconds compare within one machine only.

## What reached the targets, fastest first
"""
MISSED = """
## What did not
"""


if __name__ == "__main__":
    main()
