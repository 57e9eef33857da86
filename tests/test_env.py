"""What t2i asks of the machine that it runs on."""

import platform
import re
import sys
from pathlib import Path

import processes
import pytest
import torch

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


def test_several_gpus_need_room_for_what_they_say_to_each_other(monkeypatch):
    monkeypatch.setattr(env, "_free_bytes", lambda folder: 64_000_000)
    assert "277 MB for 8 ranks on GPUs" in env.shared_memory_problem(num_ranks=8, on_gpus=True)
    assert env.shared_memory_problem(num_ranks=1, on_gpus=True) == ""


def test_facts_are_told_where_torch_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert env.unusable_gpu() == "" and "cannot be imported" in env.machine_facts()["accelerators"]


def test_a_gpu_that_torch_cannot_use_is_named_with_its_driver(monkeypatch, tmp_path):
    assert env.unusable_gpu() == "", "there is no GPU here, or torch can use it"
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    )
    monkeypatch.setattr(env, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert re.search(r"driver 535\.183\.01, which torch .* built for CUDA 13\.0", env.unusable_gpu())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in env.unusable_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the CPU is meant
    assert env.unusable_gpu() == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert env.unusable_gpu() == ""
