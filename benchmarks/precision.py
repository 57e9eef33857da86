"""One optimizer step through DeepSpeed on a CPU: bf16 beside fp32, the same model and batch as in training_step.py.

The model and the batch are drawn with seed 0. And attention alone, of the demo's shape: bf16 beside t2i's way through
fp32.

Examples:
    python benchmarks/precision.py
"""

from collections.abc import Callable

import side_by_side
import torch
import torch.nn.functional as F
from training_step import DS_CONFIG, IMAGE, SEQUENCES, TEXT, through_deepspeed

from t2i.cost.devices import product_seconds
from t2i.env import keep_memory
from t2i.model.open_lm.attention_open_lm import mix

BF16 = DS_CONFIG.with_name("zero2_bf16_cpu.json")
HEADS = (16, 6, 80, 32)
"""Sequences, heads, positions, width: about what a step of the demo attends to."""


def main() -> None:
    options = side_by_side.parse(side_by_side.parser_of(__doc__))
    keep_memory()
    torch.set_num_threads(1)
    if options.quick:
        # A whole step in bf16 takes minutes on a processor without instructions for it.
        least = {dtype: [product_seconds(dtype)] for dtype in (torch.float32, torch.bfloat16)}
        side_by_side.compared("one product: fp32 / bf16", *least.values())
        return
    steps = {}
    for name, path in (("fp32", DS_CONFIG), ("bf16", BF16)):
        torch.manual_seed(0)
        steps[name] = through_deepspeed(path)
    seconds = side_by_side.alternate(steps, rounds=options.rounds)
    note = "above 1, bf16 is faster; on a CPU without AVX512-BF16 or AMX it is far below"
    row = side_by_side.compared("training step: fp32 / bf16", seconds["fp32"], seconds["bf16"], note=note)
    attentions = {
        "as it is": attention(lambda *parts: F.scaled_dot_product_attention(*parts, is_causal=True)),
        "through fp32": attention(lambda *parts: mix(*parts, None, is_causal=True)),
    }
    mixing = side_by_side.alternate(attentions, rounds=options.rounds)
    what = "attention in bf16, forward and gradient: as it is / through fp32"
    through = side_by_side.compared(what, mixing["as it is"], mixing["through fp32"], target=">= 1")
    tokens = SEQUENCES * (TEXT + IMAGE)
    speeds = {name: tokens / min(times) for name, times in seconds.items()}
    side_by_side.write("precision", [row, through], figures={"tokens per CPU second": speeds})


def attention(attend: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Make one step of attention alone, ten times over."""
    torch.manual_seed(0)
    parts = [torch.randn(HEADS).bfloat16().requires_grad_() for _ in range(3)]

    def step() -> None:
        for _ in range(10):
            attend(*parts).sum().backward()

    return step


if __name__ == "__main__":
    main()
