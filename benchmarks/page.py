"""Write docs/performance.md from what the benchmarks left in results/.

Examples:
    python benchmarks/page.py
"""

import json
import textwrap
from pathlib import Path

import side_by_side

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NAMES = (
    "sampling",
    "sampling_classes",
    "window",
    "training_step",
    "loss",
    "precision",
    "padding",
    "loading",
    "preparing",
    "scoring",
    "waiting",
    "growth",
    "gpu",
    "gpu_step",
)
INTRODUCTION = """# Performance

Written by `make bench`. Every number was measured by the command above its table. Each command prints its rows as they
are known. With `--quick` it ends in about two minutes, and nothing is published.

A ratio compares candidates that alternate in one process on one thread. It is of CPU seconds, unless the row says
seconds, and of the least times. Beside it stand the ratio of the medians, and the least and largest ratio of one round.

The machine's limit is the matmul lower bound: the time of the matrix products that the work cannot do without, measured
in the same run. Tables of figures call it "limit".
"""
EXPLANATIONS = {
    "sampling_classes": (
        "In Llama's and Qwen2's class at batch 1, t2i takes less than the limit: the limit is these products as the "
        "benchmark packs and lays them out, and no true lower bound there. Why was not measured."
    ),
    "sampling": (
        "Where the rest of the time goes: attention, and the choice of the 50 likeliest of 16,384 codes, are "
        "no products of the limit; the profile below has their shares. The compiled step saves many small "
        "calls per layer, but attends to a whole window of the cache, where the eager one reads the true "
        "length. Where products are as fast as on this processor, that costs what it saves, and the compiled "
        "step misses its target."
    ),
    "window": (
        "The image is the same by every window: docs/window.md says why. Fewer passes do not save as much time. "
        "On a CPU the products of a pass are bound by memory up to some eight rows only, and a window of 8 with "
        "guidance has sixteen. More training does not make codes easier to guess."
    ),
    "training_step": (
        "Where the rest of the time goes: DeepSpeed averages, measures, clips and copies 41 million gradients "
        "and weights, and Adam updates them. Each is a walk through memory. Then there are the powers and sums of "
        "66,824 logits per position, and the body's elementwise work, forward and backward. The plain loops keep "
        "their memory here as t2i's own step does. What page faults would cost them is not in their figures. "
        "Bytes vary, because a heap is not laid out alike in each process."
    ),
    "loss": (
        "Where sums are enough, torch's function takes about as long as t2i's, called once for one sum or "
        "twice for a sum over text and one over images, and several times the bytes. It is slower where it "
        "gives a loss per position, whose logits it computes again in the backward pass. So speed alone would "
        "not decide for t2i's own. What decides: it takes the least memory; and one walk over the logits "
        "gives what training records, the loss of each position and its log-partition, text and image apart. "
        "torch's gives no log-partition, which the z-loss needs. The target is for the candidate that gives a "
        "loss per position: it would be used if it were not slower by a tenth."
    ),
    "precision": (
        "Only products of matrices gain. The ratio is one of this processor: bf16 is tens of times slower than fp32 "
        "where the processor has no instructions for it, and training says so. Attention gains nothing: torch's kernel "
        "takes longer for a gradient in bf16 than in fp32, so t2i goes through fp32 where a model learns."
    ),
    "loading": (
        "To read a sample, Streaming's reader opens a file, reads, unpacks and checks it. Formats that map a "
        "file into memory, or hold it whole, take a few hundredths of that or less; webdataset, which unpacks too, a "
        "fifth to a third. The work is done beside the device, so "
        "what counts is the waiting."
    ),
    "preparing": (
        "Two processes take both cores of this machine, so whatever else runs on it costs them first."
    ),
    "waiting": (
        "A checkpoint's files are on the disk before it counts, which cp leaves for later. Its times vary "
        "most: the host of a virtual machine such as this one may lend memory for the disk's cache page by "
        "page, which takes ten times as long. In a profile, two thirds of its time were torch's writer, a "
        "seventh the weights' file, and a ninth the search for values that are not finite. An export copies "
        "the weights as they are stored, and is loaded back: hidden states before and after must be equal. In "
        "a profile, copying took a third of its time and the check under half. At this size the two take 0.6 "
        "and 0.1 seconds."
    ),
    "growth": (
        "![seconds against sizes](growth.svg) Where an exponent misses its target by little: weights of few layers may "
        "stay in the processor's cache from one code to the next, and those of many do not. That is a guess."
    ),
}
"""What a section's tables do not explain."""


def main() -> None:
    parts = [INTRODUCTION]
    for name in NAMES:
        path = side_by_side.RESULTS / f"{name}.json"
        # What was never measured is named too: a page without it would look complete.
        parts.append(section(name, json.loads(path.read_text())) if path.exists() else missing(name))
    PAGE.write_text("\n".join(parts))
    print(PAGE)


def section(name: str, found: dict) -> str:
    """Write one benchmark's table."""
    # The load average tells whether a surprising number is the machine's or ours.
    load = ", ".join(map(str, found["load"]))
    lines = [
        f"## {title(name)}\n",
        f"`{found['command']}`, commit {found['commit']}, {found['date']}; {found['machine']}; load average {load}.\n",
        "| What | Ratio | By medians | One round | Rounds | Target | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        verdict = {True: "met", False: "**not met**", None: ""}[row["met"]]
        low, high = map(number, row["spread"])
        lines.append(
            f"| {row['what']} | {number(row['ratio'])} | {number(row['by_medians'])} | {low} to {high} |"
            f" {row['rounds']} | {row['target']} | {' '.join([verdict, row['note']]).strip()} |"
        )
    if name in EXPLANATIONS:
        lines += ["", textwrap.fill(EXPLANATIONS[name], 120)]
    for what, values in found["figures"].items():
        lines += [f"\n{what.capitalize()}:\n", *table(values)]
    return "\n".join(lines) + "\n"


def table(values: dict) -> list[str]:
    """Write figures by name, or by name and case."""
    if not all(isinstance(value, dict) for value in values.values()):
        values = {"": values}
    # Columns of all rows together: cases may lack some, such as an operator that one profile did not meet.
    heads = list(dict.fromkeys(key for row in values.values() for key in row))
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for case, row in values.items():
        lines.append(f"| {case} | {' | '.join(number(row[head]) if head in row else '' for head in heads)} |")
    return lines


def number(value: float) -> str:
    """Write three digits, and no more than are whole from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def missing(name: str) -> str:
    """Say that nothing was measured."""
    return f"## {title(name)}\n\nNot measured: `python benchmarks/{name}.py`.\n"


def title(name: str) -> str:
    """Turn a file's name into a heading."""
    if name.startswith("gpu"):
        return name.replace("_", " ").replace("gpu", "GPU")
    return name.replace("_", " ").capitalize()


if __name__ == "__main__":
    main()
