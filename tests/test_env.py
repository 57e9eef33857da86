"""What t2i asks of the machine that it runs on."""

import platform
import re
import sys
from pathlib import Path

import processes
import pytest

from t2i import env

ROOT = Path(__file__).parents[1]
TAKE_AGAIN = """
import resource, sys
from t2i.env import keep_memory

if sys.argv[1] == "keep":
    keep_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

size = 2**26
b"x" * size
before = faults()
b"x" * size
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_comes_back_without_a_fault_a_page():
    def faults(word):
        command = [sys.executable, "-c", TAKE_AGAIN, word]
        return int(processes.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 10
    assert faults("leave") > 20  # 64 MB: 16,384 pages of 4 KB, or 32 of 2 MB


@pytest.mark.parametrize(
    ("num_ranks", "num_samples", "said"),
    [
        (2, 0, "expected 147 MB for 2 ranks on CPUs, or"),
        (0, 134_000_000, "expected 1080 MB for the order of 134,000,000 samples, or .* --shm-size 2g"),
        (0, 1_000_000, ""),
    ],
)
def test_shared_memory_holds_the_order_of_an_epoch(num_ranks, num_samples, said, monkeypatch):
    monkeypatch.setattr(env, "_free_bytes", lambda folder: 64_000_000)
    problem = env.shared_memory_problem(num_ranks=num_ranks, num_samples=num_samples)
    assert re.search(said, problem) if said else problem == ""
