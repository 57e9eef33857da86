"""One optimizer step through DeepSpeed on a CPU: bf16 beside fp32, the same model and batch as in training_step.py.

The model and the batch are drawn with seed 0.

Examples:
    python benchmarks/precision.py
"""

import side_by_side
import torch
from training_step import DS_CONFIG, IMAGE, SEQUENCES, TEXT, through_deepspeed

from t2i.env import keep_memory

BF16 = DS_CONFIG.with_name("zero2_bf16_cpu.json")


def main() -> None:
    keep_memory()
    torch.set_num_threads(1)
    steps = {}
    for name, path in (("fp32", DS_CONFIG), ("bf16", BF16)):
        torch.manual_seed(0)
        steps[name] = through_deepspeed(path)
    seconds = side_by_side.alternate(steps, rounds=side_by_side.ROUNDS)
    note = "above 1, bf16 is faster; on a CPU without AVX512-BF16 or AMX it is far below"
    row = side_by_side.compared("training step: fp32 / bf16", seconds["fp32"], seconds["bf16"], note=note)
    tokens = SEQUENCES * (TEXT + IMAGE)
    speeds = {name: tokens / min(times) for name, times in seconds.items()}
    side_by_side.write("precision", [row], figures={"tokens per CPU second": speeds})


if __name__ == "__main__":
    main()
