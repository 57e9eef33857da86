"""Time candidates in turn in one process, and write the results as rows of docs/performance.md.

Candidates alternate, so that other load on the machine meets all of them. Times are CPU seconds of this process, so
that waiting for a core does not count. Ratios are of the least times, which load disturbs least. Medians and the range
of ratios per round stand beside them.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from t2i.runs.run_folder import git_commit

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
MOST_OPERATORS = 8


def memory_of(script: str, name: str) -> int:
    """Measure a candidate of a benchmark in a process of its own, in bytes; the script prints them for --memory."""
    done = subprocess.run(
        [sys.executable, script, "--memory", name], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark, with what all of them take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--quick", action="store_true", help="one round of less work, in two minutes; nothing is published"
    )
    return parser


def parse(parser: argparse.ArgumentParser, **quick: object) -> argparse.Namespace:
    """Read the command line; `quick` are the options of --quick, beside a single round."""
    options = parser.parse_args()
    if options.quick:
        vars(options).update({"rounds": 1, **quick})
    return options


@dataclass(frozen=True)
class Row:
    """One claim: a ratio against its target."""

    what: str
    ratio: float
    by_medians: float
    spread: tuple[float, float]
    """Least and largest ratio per round."""
    rounds: int
    target: str
    """Such as "<= 1.7"; empty for a figure without one."""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Compare with the target; None without one."""
        if not self.target:
            return None
        sign, limit = self.target.split()
        return self.ratio <= float(limit) if sign == "<=" else self.ratio >= float(limit)

    def say(self) -> "Row":
        """Print this row now: others may take minutes."""
        met = {True: "met", False: "NOT met", None: ""}[self.is_met]
        low, high = self.spread
        text = f"{self.what}: {self.ratio:.3g} ({low:.3g} to {high:.3g}) {self.target} {met} {self.note}"
        print(text.rstrip(), flush=True)
        return self


def alternate(
    candidates: dict[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Run every candidate once unmeasured, then in turn for so many rounds: seconds of each.

    Args:
        before: run, unmeasured, before each candidate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    # Unmeasured first: compilers, allocators and the disk's cache make a first call several times as long.
    for run in candidates.values():
        before()
        run()
    for number in range(rounds):
        # Candidates inside rounds, not rounds inside candidates: load that comes and goes then meets all of them.
        for name, run in candidates.items():
            before()
            started = clock()
            run()
            seconds[name].append(clock() - started)
        last = ", ".join(f"{name} {values[-1]:.3g} s" for name, values in seconds.items())
        print(f"round {number + 1} of {rounds}: {last}", file=sys.stderr, flush=True)
    return seconds


def compared(what: str, seconds: list[float], other: list[float], *, target: str = "", note: str = "") -> Row:
    """Divide seconds by other seconds of the same rounds: below 1 is faster."""
    # Of one round: the two times are seconds apart, so their ratio has the least of the machine's drift.
    ratios = [a / b for a, b in zip(seconds, other, strict=True)]
    return Row(
        what,
        # Least times: load only ever adds, so the least is nearest to what the work itself takes.
        ratio=min(seconds) / min(other),
        by_medians=statistics.median(seconds) / statistics.median(other),
        spread=(min(ratios), max(ratios)),
        rounds=len(seconds),
        target=target,
        note=note,
    ).say()


def stated(
    what: str,
    values: Sequence[float],
    *,
    best: Callable[[Sequence[float]], float] = min,
    target: str = "",
    note: str = "",
) -> Row:
    """State a figure of some rounds: the best of them, their median and their range."""
    middle = statistics.median(values)
    return Row(what, best(values), middle, (min(values), max(values)), len(values), target, note).say()


def time_by_operator(run: Callable[[], object]) -> dict[str, float]:
    """Profile one run: the share of its time in each of torch's largest operators, and in all others together."""
    import torch  # here, as page.py needs this module and no torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in found.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:MOST_OPERATORS]
    total = sum(times.values())
    shares = {name: times[name] / total for name in largest}
    return {**shares, "all others": 1 - sum(shares.values())}


def write(
    name: str, rows: list[Row], *, figures: dict[str, object] | None = None, is_kept: bool = True
) -> None:
    """Keep rows, with what they were measured on, in results/NAME.json; of a quick run nothing is kept."""
    if not is_kept:
        return
    RESULTS.mkdir(exist_ok=True)
    # A number without its machine, load and commit cannot be compared with the next one.
    made = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "load": [round(value, 1) for value in os.getloadavg()],
        **facts(),
    }
    rows_as_dicts = [{**asdict(row), "met": row.is_met} for row in rows]
    # Written even where a target is missed: the page shows what was measured, not what was hoped for.
    whole = {**made, "rows": rows_as_dicts, "figures": figures or {}}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


def facts() -> dict[str, str]:
    """Say of which code, on what and when something was measured."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"commit": commit(), "machine": machine(), "date": date}


def commit() -> str:
    """Name the commit, with `+` if files differ from it, but for what benchmarks themselves have written."""
    others = [
        "git",
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!docs/performance.md",
        ":!docs/speedrun.md",
    ]
    done = subprocess.run(others, cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    return git_commit().removesuffix("+") + ("+" if done.stdout else "")


def machine() -> str:
    """Name processor, cores and what is installed."""
    import torch  # as above

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{model}, {os.cpu_count()} cores, {capability}, torch {torch.__version__}, {counted}"
