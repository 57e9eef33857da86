"""The forward and backward pass of the 1B model on one GPU: part by part, as it is and in variants, and a profile.

Beside it stand the card's own ceilings: a copy, and each matrix product of the step. A variant that fails says why, and
the next one follows. Without a GPU the same runs with a small model, as a rehearsal, and nothing is kept.

Examples:
    python benchmarks/gpu_step.py                       a card that t2i knows
    python benchmarks/gpu_step.py --peak-tflops 312     any other
    python benchmarks/gpu_step.py --quick               the model as it is, and compiled
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i.cost.devices import peak_flops_of
from t2i.cost.estimates import count_parameters, flops_a_token
from t2i.model import loss
from t2i.model.backbone import head_of, hidden_states
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.vocab import VocabLayout
from t2i.train.compiled import compile_layers

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
if IS_GPU:
    LAYOUT = VocabLayout(50_432, num_text_tokens=50_277, codebook_size=16_384)
    CONFIG, SEQ_LEN, SIDE, SEQUENCES, DTYPE = (
        OpenLMConfig(LAYOUT.vocab_size, 2_048, 24, 16),
        1_152,
        8_192,
        8,
        torch.bfloat16,
    )
else:
    LAYOUT = VocabLayout(512, num_text_tokens=500, codebook_size=256)
    CONFIG, SEQ_LEN, SIDE, SEQUENCES, DTYPE = (
        OpenLMConfig(LAYOUT.vocab_size, 64, 2, 2),
        64,
        128,
        2,
        torch.float32,
    )
PARTS = ("body", "loss", "backward")
PLAIN, COMPILED = "as it is", "layers compiled"
Change = Callable[[ExitStack, OpenLMForCausalLM], object]
"""Changes a model or the functions that it calls; the stack undoes it."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak; by default the data sheet's")
    parser.add_argument("--seconds", type=float, default=540, help="time after which variants are skipped")
    options = side_by_side.parse(parser, seconds=100)
    end = time.monotonic() + options.seconds
    name = torch.cuda.get_device_name() if IS_GPU else "no GPU"
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops_of(name)
    if IS_GPU and not peak:
        raise SystemExit(f"the bf16 peak of {name} is not known here; give --peak-tflops.")
    ids = LAYOUT.image_ids(torch.randint(LAYOUT.codebook_size, (options.sequences, SEQ_LEN))).to(DEVICE)
    flops = flops_a_token(CONFIG, counts=count_parameters(CONFIG), seq_len=SEQ_LEN) * ids.numel()
    figures: dict[str, object] = {
        f"ceilings of {name}": ceilings(ids.numel(), rounds=options.rounds),
        "ms": {},
    }
    print(figures, flush=True)
    rows = []
    for what, change in variants().items():
        if time.monotonic() > end or (options.quick and what not in (PLAIN, COMPILED)):
            continue
        try:
            parts = measured(change, ids, rounds=options.rounds)
        except RuntimeError as error:  # torch's, of memory and of its compiler too
            print(f"{what}: {str(error).strip().splitlines()[0]}", flush=True)
            continue
        seconds = [sum(times) for times in zip(*parts.values(), strict=True)]
        figures["ms"][what] = {part: 1e3 * statistics.median(times) for part, times in parts.items()}
        shares = [flops / value / peak if peak else 0.0 for value in seconds]
        note = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if IS_GPU else "a rehearsal"
        rows.append(side_by_side.stated(f"forward and backward, {what}: MFU", shares, best=max, note=note))
        if IS_GPU:
            side_by_side.write("gpu_step", rows, figures=figures, is_kept=not options.quick)
    if not options.quick:
        print(profile(made(), ids), flush=True)


def now() -> float:
    if IS_GPU:
        torch.cuda.synchronize()  # calls only queue work
    return time.perf_counter()


def seconds_of(run: Callable[[], object], *, rounds: int) -> float:
    """Time a call after two that warm up: the median."""
    times = []
    for _ in range(rounds + 2):
        started = now()
        run()
        times.append(now() - started)
    return statistics.median(times[2:])


def ceilings(num_rows: int, *, rounds: int) -> dict[str, float]:
    """Measure a copy (TB/s, read and written) and products (TFLOP/s): a large square one, and each of the step's."""
    source = torch.empty(2**30 if IS_GPU else 2**22, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = {
        "copy, TB/s": 2 * source.numel() / seconds_of(lambda: target.copy_(source), rounds=rounds) / 1e12
    }
    width, inner, vocabulary = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
    shapes = {
        "square": (SIDE, SIDE, SIDE),
        "in_proj": (num_rows, 3 * width, width),
        "out_proj": (num_rows, width, width),
        "w12": (num_rows, 2 * inner, width),
        "w3": (num_rows, width, inner),
        "LM head, a chunk": (min(num_rows, loss.CHUNK_LOGITS // vocabulary), vocabulary, width),
    }
    for name, (m, n, k) in shapes.items():
        x, weight = (torch.randn(size, k, device=DEVICE, dtype=DTYPE) for size in (m, n))
        seconds = seconds_of(lambda x=x, weight=weight: F.linear(x, weight), rounds=rounds)
        found[f"{name}, TFLOP/s"] = 2 * m * n * k / seconds / 1e12
    return found


def variants() -> dict[str, Change]:
    """Name what is changed."""

    def attention(kind: SDPBackend) -> Change:
        return lambda stack, _: stack.enter_context(sdpa_kernel([kind]))

    def layers(_: ExitStack, model: OpenLMForCausalLM) -> None:
        compile_layers(model, seq_len=SEQ_LEN)

    def layers_and_softmax(stack: ExitStack, model: OpenLMForCausalLM) -> None:
        layers(stack, model)
        stack.enter_context(patched(loss, "softmax_of", torch.compile(loss.softmax_of, dynamic=False)))

    def small_chunks(stack: ExitStack, _: OpenLMForCausalLM) -> None:
        stack.enter_context(patched(loss, "CHUNK_LOGITS", 1_024 * CONFIG.vocab_size))

    return {
        PLAIN: lambda *_: None,
        COMPILED: layers,
        "flash attention": attention(SDPBackend.FLASH_ATTENTION),
        "cuDNN's attention": attention(SDPBackend.CUDNN_ATTENTION),
        "chunks of 1,024 positions": small_chunks,
        "layers and softmax compiled": layers_and_softmax,
    }


@contextmanager
def patched(owner: object, name: str, value: object):
    """Replace a name of a module within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def made() -> OpenLMForCausalLM:
    """Make the model, after giving back what the one before it held."""
    gc.collect()
    if IS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with DEVICE:
        return OpenLMForCausalLM(CONFIG).to(DTYPE).train()


def measured(change: Change, ids: Tensor, *, rounds: int) -> dict[str, list[float]]:
    """Time each part of a changed model's pass: seconds of each round."""
    model = made()
    torch._dynamo.reset()
    with ExitStack() as stack:
        change(stack, model)
        head, labels = head_of(model), ids.roll(-1, 1)
        parts: dict[str, list[float]] = {part: [] for part in PARTS}
        for _ in range(rounds + 3):
            times = [now()]
            hidden = hidden_states(model, ids)
            times.append(now())
            total, _, _ = loss.summed_loss(hidden, labels, head=head)
            times.append(now())
            (total / ids.numel()).backward()
            times.append(now())
            model.zero_grad(set_to_none=True)
            for part, (first, last) in zip(PARTS, itertools.pairwise(times), strict=True):
                parts[part].append(last - first)
    return {part: times[3:] for part, times in parts.items()}


def profile(model: OpenLMForCausalLM, ids: Tensor) -> str:
    """Profile one pass: the thirty largest operators."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * IS_GPU
    with torch.profiler.profile(activities=kinds) as found:
        total, _, _ = loss.summed_loss(hidden_states(model, ids), ids.roll(-1, 1), head=head_of(model))
        total.backward()
        now()
    order = "self_device_time_total" if IS_GPU else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70)


if __name__ == "__main__":
    main()
