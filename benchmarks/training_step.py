"""One optimizer step through DeepSpeed: t2i, Hugging Face's classes in a plain loop, and the matmul lower bound.

4 sequences of 64 text and 256 image tokens, width 256, 8 layers, a vocabulary of 66,824, fp32.

Examples:
    python benchmarks/training_step.py
    python benchmarks/training_step.py --memory t2i     peak bytes of one candidate, in its own process
"""

import json
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from t2i.config import OptimizerName, TrainConfig
from t2i.env import keep_memory
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.vocab import VocabLayout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LAYOUT = VocabLayout(50_432, num_text_tokens=50_277, codebook_size=16_384)
SEQUENCES, TEXT, IMAGE = 4, 64, 256
WIDTH, INNER, LAYERS, HEADS = 256, 768, 8, 4
SIZES = {
    "vocab_size": LAYOUT.vocab_size,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
UNGATED = {**SIZES, "intermediate_size": INNER * 3 // 2}
"""GPT-NeoX's feed-forward part has two matrices, not three: this width gives as many products."""
DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2_fp32.json"
MOST_BYTES = 0.85e9
MEMORY_ROUNDS = 5
"""Processes that measure t2i's memory, as the heap's layout differs from process to process."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--memory", choices=list(CANDIDATES))
    options = side_by_side.parse(parser)
    keep_memory()  # as training does, for every candidate
    torch.set_num_threads(1)
    if options.memory:
        print(peak_bytes(CANDIDATES[options.memory]()))
        return
    # Before any candidate is built here: each is measured in a fresh process, whose peak is its own.
    names = ["t2i"] if options.quick else [name for name in CANDIDATES if name != "limit"]
    memory = {name: [side_by_side.memory_of(__file__, name)] for name in names}
    memory["t2i"] += [
        side_by_side.memory_of(__file__, "t2i") for _ in range(min(options.rounds, MEMORY_ROUNDS) - 1)
    ]
    # A compilation takes a minute, so that a quick run leaves it out.
    named = {name: make for name, make in CANDIDATES.items() if not (options.quick and "compiled" in name)}
    steps = {name: make() for name, make in named.items()}
    seconds = side_by_side.alternate(steps, rounds=options.rounds)
    ours = seconds["t2i"]
    rows = [
        side_by_side.compared(
            "training step: t2i / matmul lower bound", ours, seconds["limit"], target="<= 1.1"
        )
    ]
    for name in ("Llama, plain loop", "GPT-NeoX, plain loop"):
        rows.append(side_by_side.compared(f"training step: {name} / t2i", seconds[name], ours, target=">= 1"))
    rows.append(
        side_by_side.compared(
            "training step: t2i with image vocabulary only / t2i",
            seconds["t2i, image vocabulary only"],
            ours,
            note="another loss: train.image_vocab_only",
        )
    )
    rows.append(
        side_by_side.compared(
            "training step: t2i with Muon / t2i",
            seconds["t2i, Muon"],
            ours,
            note=f"its products are the same for any batch; here {SEQUENCES * (TEXT + IMAGE):,} tokens",
        )
    )
    if "t2i, layers compiled" in seconds:
        rows.append(
            side_by_side.compared(
                "training step: t2i with train.compile / t2i",
                seconds["t2i, layers compiled"],
                ours,
                note="on a CPU; what a GPU gains is not measured",
            )
        )
        what = "training step: relative difference of the first loss with train.compile"
        rows.append(side_by_side.stated(what, [compiled_difference()], target="<= 1e-06"))
    zero = json.loads(DS_CONFIG.read_text())["zero_optimization"]
    # DeepSpeed's bucket is a setting's choice, the same for any model; the target is for what t2i itself needs.
    bucket = 4 * zero["reduce_bucket_size"] if zero.get("contiguous_gradients", True) else 0
    shares = [(value - bucket) / MOST_BYTES for value in memory["t2i"]]
    what = "training step: t2i's bytes above the model and DeepSpeed's bucket / 0.85 GB"
    rows.append(side_by_side.stated(what, shares, best=statistics.median, target="<= 1"))
    tokens = SEQUENCES * (TEXT + IMAGE)
    figures = {
        "tokens per CPU second": {name: tokens / min(times) for name, times in seconds.items()},
        "bytes above the model": {name: statistics.median(values) for name, values in memory.items()},
        "share of a step's time by operator, profiled once": side_by_side.time_by_operator(steps["t2i"]),
    }
    side_by_side.write("training_step", rows, figures=figures, is_kept=not options.quick)


def batch() -> tuple[Tensor, Tensor]:
    """Make ids and next-token labels (B, S): text, then image."""
    torch.manual_seed(0)
    text = torch.randint(LAYOUT.num_text_tokens, (SEQUENCES, TEXT))
    image = LAYOUT.image_ids(torch.randint(LAYOUT.codebook_size, (SEQUENCES, IMAGE)))
    ids = torch.cat([text, image], 1)
    return ids, F.pad(ids[:, 1:], (0, 1), value=-100)


def engine_of(
    path: Path = DS_CONFIG, *, is_compiled: bool = False, optimizer: OptimizerName = "adamw", **settings: bool
) -> "DeepSpeedEngine":
    """Build t2i's own engine and loss; settings are of the model's configuration."""
    # Here, as the process of --memory for another candidate must not hold DeepSpeed.
    from t2i.distributed.launch import start_processes
    from t2i.train.ds_config import read_ds_config
    from t2i.train.engine import Learner, make_engine

    start_processes()
    model = OpenLMForCausalLM(OpenLMConfig(**SIZES, **settings)).train()
    if is_compiled:
        from t2i.train.compiled import compile_layers

        compile_layers(model, seq_len=TEXT + IMAGE)
    learner = Learner(model, layout=LAYOUT)
    config = TrainConfig(optimizer=optimizer)
    return make_engine(learner, config=config, ds_config=read_ds_config(path), per_rank=SEQUENCES)


def through_deepspeed(path: Path = DS_CONFIG, **settings: Any) -> Callable[[], None]:
    """Build t2i's own step."""
    engine = engine_of(path, **settings)
    ids, labels = batch()
    count = (labels >= 0).sum()

    def step() -> None:
        loss, _ = engine(ids, labels)
        engine.backward(loss / count)
        engine.step()

    return step


def compiled_difference() -> float:
    """Compare the loss of equal weights, by plain and by compiled layers."""
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        loss, _ = engine_of(is_compiled=is_compiled)(*batch())
        found.append(loss.item())
    return abs(found[1] / found[0] - 1)


def plain_loop(model: nn.Module) -> Callable[[], None]:
    """Build what a user of transformers would write."""
    model.train()
    # The same optimizer and clipping as in t2i's step, so that a difference is one of model, loss or engine.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    ids, _ = batch()

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def products_alone() -> Callable[[], None]:
    """Prepare a step's matrix products: three per weight, attention's two and their four, the head in chunks."""
    tokens = SEQUENCES * (TEXT + IMAGE)
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    weights = [[torch.randn(shape) for shape in shapes] for _ in range(LAYERS)]
    inputs = {width: torch.randn(tokens, width) for _, width in shapes}
    gradients = {width: torch.randn(tokens, width) for width, _ in shapes}
    heads = torch.randn(SEQUENCES * HEADS, TEXT + IMAGE, WIDTH // HEADS)
    # Without each sequence's last position, which predicts nothing.
    head, rows = torch.randn(LAYOUT.vocab_size, WIDTH), torch.randn(tokens - SEQUENCES, WIDTH)

    @torch.inference_mode()
    def run() -> None:
        for layer in weights:
            for weight in layer:
                given, gradient = inputs[weight.shape[1]], gradients[weight.shape[0]]
                given @ weight.T, gradient @ weight, gradient.T @ given
            squares = heads @ heads.mT
            for _ in range(3):  # the values' mix, then the gradients of queries and of keys
                squares @ heads
            heads @ heads.mT, squares.mT @ heads  # the gradients of the weights and of the values
        # In chunks, as logits of all positions would measure memory: 66,824 by 1,276 floats are 341 MB.
        head_gradient = torch.zeros_like(head)
        for chunk in rows.split(256):
            logits = chunk @ head.T
            logits @ head
            head_gradient.addmm_(logits.T, chunk)

    return run


CANDIDATES: dict[str, Callable[[], Callable[[], None]]] = {
    "limit": products_alone,
    "t2i": through_deepspeed,
    "t2i, layers compiled": lambda: through_deepspeed(is_compiled=True),
    "t2i, Muon": lambda: through_deepspeed(optimizer="muon"),
    "t2i, image vocabulary only": lambda: through_deepspeed(image_vocab_only=True),
    "Llama, plain loop": lambda: plain_loop(LlamaForCausalLM(LlamaConfig(**SIZES))),
    "GPT-NeoX, plain loop": lambda: plain_loop(GPTNeoXForCausalLM(GPTNeoXConfig(**UNGATED))),
}


def peak_bytes(step: Callable[[], None]) -> int:
    """Run two steps; return how far resident memory rose above what was held before them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    step()
    step()  # the second meets the optimizer's state, which the first creates
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    main()
