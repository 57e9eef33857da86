"""Captions to image codes with transformers' own classes: t2i's sampler, the class's own cache, and generate.

Llama's, Qwen2's and Qwen3's class in the sizes of benchmarks/sampling.py. They have as many key heads as query heads,
so that one matmul lower bound serves all.

Examples:
    python benchmarks/sampling_classes.py
    python benchmarks/sampling_classes.py --batch 1 --rounds 3
"""

import functools
from collections.abc import Callable

import sampling
import side_by_side
import torch
from sampling import HEADS, INNER, LAYERS, LENGTHS, VOCABULARY, WIDTH
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.model.open_lm import reading_open_lm

CLASSES = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--num-codes", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = side_by_side.parse(parser, num_codes=16, batch=[1])
    torch.set_num_threads(1)  # as in sampling.py
    rows, figures, profiles = [], {}, {}
    for batch in options.batch:
        limit = sampling.products_alone(batch, num_codes=options.num_codes)
        for name, kind in CLASSES.items():
            case = f"{name}, {options.num_codes} codes, batch {batch}"
            candidates = candidates_of(kind, batch=batch, num_codes=options.num_codes)
            equal = {
                other: (candidates["t2i"]() == candidates[other]()).float().mean().item()
                for other in ("own cache", "t2i compiled")
            }
            seconds = side_by_side.alternate({"limit": limit, **candidates}, rounds=options.rounds)
            for other, share in equal.items():
                what = f"sampling {case}: share of codes equal to those of {other}"
                rows.append(side_by_side.stated(what, [share], target=">= 0.99"))
            for other, target in (("generate", ">= 3"), ("own cache", "")):
                what = f"sampling {case}: {other} / t2i"
                rows.append(side_by_side.compared(what, seconds[other], seconds["t2i"], target=target))
            for ours in ("t2i", "t2i compiled"):
                what = f"sampling {case}: {ours} / matmul lower bound"
                rows.append(side_by_side.compared(what, seconds[ours], seconds["limit"]))
            figures[case] = {other: min(times) * 1000 / options.num_codes for other, times in seconds.items()}
            profiles[case] = side_by_side.time_by_operator(candidates["t2i"])
    what = "share of the eager sampler's time by operator, profiled once"
    side_by_side.write(
        "sampling_classes",
        rows,
        figures={"least ms per step": figures, what: profiles},
        is_kept=not options.quick,
    )


def candidates_of(kind: str, *, batch: int, num_codes: int) -> dict[str, Callable[[], Tensor]]:
    """Make all samplers of one class and one batch of prompts."""
    torch.manual_seed(0)
    prompts = [torch.randint(50_277, (length,)).tolist() for length in LENGTHS[:batch]]
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    t2i = sampling.ours_of(model, prompts, num_codes=num_codes)
    return {
        "t2i": t2i,
        "t2i compiled": functools.partial(t2i, is_compiled=True),
        "own cache": functools.partial(by_own_cache, t2i),
        "generate": sampling.generate(model, prompts, num_codes=num_codes),
    }


def by_own_cache(run: Callable[[], Tensor]) -> Tensor:
    """Run a sampler as classes are served that the fast decoder does not serve."""
    before = reading_open_lm.is_served
    reading_open_lm.is_served = lambda *_, **__: False
    try:
        return run()
    finally:
        reading_open_lm.is_served = before


if __name__ == "__main__":
    main()
