"""The 1B model on one GPU, in at most ten minutes: training MFU, memory, sampling, encoding images.

Training is in bf16 with 1,152 tokens per sequence, by DeepSpeed's ZeRO-2 with torch's fused Adam. A step is the
paper's: 896 sequences in as many micro-batches as it takes. Sampling draws 1,024 codes with guidance: by the eager
step, by one compiled into a CUDA graph, and at batch 1 by windows of several codes; the best is held against the
target. Each row is printed and kept in results/gpu.json as soon as it is known. When the time is up, the rest is left.

Examples:
    python benchmarks/gpu.py --bandwidth-tb 3.35                an H100
    python benchmarks/gpu.py --bandwidth-tb 2.04 --compile      an A100, the layers compiled
    python benchmarks/gpu.py --bandwidth-tb 1.01 --quick        any card that t2i knows, in two minutes
"""

import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import preparing
import side_by_side
import torch
from deepspeed import DeepSpeedEngine
from guesses import counting

from t2i.config import OptimizerName, TrainConfig
from t2i.cost.devices import peak_flops_of
from t2i.cost.estimates import count_parameters, estimate_memory, flops_a_token
from t2i.distributed.launch import start_processes
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.compiled import compile_layers
from t2i.train.deepspeed_internals import free_engine
from t2i.train.ds_config import read_ds_config
from t2i.train.engine import Learner, make_engine

DEVICE = "cuda"
LAYOUT = VocabLayout(50_432, num_text_tokens=50_277, codebook_size=16_384)
CONFIG = OpenLMConfig(LAYOUT.vocab_size, 2_048, 24, 16)
SEQ_LEN, CODES, PROMPT = 1_152, 1_024, 34
SEQUENCES = 896
"""Sequences of the paper's step."""
DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"
# Under ten minutes, so that a short slot of a queue is enough: what is done by then is kept.
MOST_SECONDS, QUICK_SECONDS = 540, 100
LEAST_MFU = {"A100": 0.6, "H100": 0.5, "H200": 0.5}
"""MFU to reach, by the device's name."""
MOST_OVER_BANDWIDTH = {1: 1.55, 8: 2.0, 64: 2.5}
"""Time that sampling may take, as a multiple of the bandwidth limit, by batch; 1.55 is 1.3 s per image on an H100."""
ROUNDS, WINDOW = 2, 8
"""Drawings that are timed; and codes per pass at batch 1, where a pass waits for memory (in bf16 `auto` takes 1)."""
FEWER_PASSES = 255 / 136.1
"""Than codes, as the trained model of docs/window.md took with this window."""
IMAGE_SIZE, IMAGE_BATCH, CHANNELS = 256, 32, [128, 256, 256, 512]


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak; by default the data sheet's")
    parser.add_argument(
        "--bandwidth-tb", type=float, required=True, help="terabytes per second from the data sheet"
    )
    parser.add_argument("--compile", action="store_true", help="train with train.compile")
    parser.add_argument(
        "--seconds", type=float, default=MOST_SECONDS, help="time after which parts are skipped"
    )
    options = side_by_side.parse(parser, seconds=QUICK_SECONDS)
    if not is_visible():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; none is visible.")
    end = time.monotonic() + options.seconds
    device = torch.cuda.get_device_name()
    peak = options.peak_tflops * 1e12 if options.peak_tflops else peak_flops_of(device)
    if not peak:
        raise SystemExit(f"the bf16 peak of {device} is not known here; give --peak-tflops.")
    figures = {f"device {device}": {"bytes": torch.cuda.mem_get_info()[1]}}
    parts = itertools.chain(
        training(peak=peak, device=device, end=end, is_compiled=options.compile),
        sampling(bandwidth=options.bandwidth_tb * 1e12, end=end),
        encoding(end=end),
    )
    rows: list[side_by_side.Row] = []
    for row in parts:
        rows.append(row)
        # With every row: whatever ends this process then, a crash or the end of a lease, leaves what was measured.
        side_by_side.write("gpu", rows, figures=figures, is_kept=not options.quick)


def is_visible() -> bool:
    """Tell whether there is a GPU; a rehearsal without one says so."""
    return torch.cuda.is_available()


def training(
    *, peak: float, device: str, end: float, is_compiled: bool = False
) -> Iterator[side_by_side.Row]:
    """Double the micro-batch until memory or time runs out; yield each size's MFU, and its memory against the plan."""
    start_processes()
    counts, ds_config = count_parameters(CONFIG), read_ds_config(DS_CONFIG)
    a_token = flops_a_token(CONFIG, counts=counts, seq_len=SEQ_LEN)
    target = next((f">= {share}" for name, share in LEAST_MFU.items() if name in device), "")
    what = "training, layers compiled" if is_compiled else "training"
    best, most = 0, 0.0

    def mfu(seconds: float) -> float:
        # MFU counts a step's model FLOPs alone, so time that goes elsewhere lowers it, whatever it is spent on.
        return a_token * SEQUENCES * SEQ_LEN / seconds / peak

    def planned_bytes(sequences: int, *, optimizer: OptimizerName) -> float:
        return estimate_memory(
            CONFIG,
            counts=counts,
            ds_config=ds_config,
            num_gpus=1,
            num_tokens=sequences * SEQ_LEN,
            is_checkpointed=False,
            optimizer=optimizer,
        ).total

    def measured(sequences: int, *, optimizer: OptimizerName) -> tuple[list[float], int]:
        # A whole step takes half a minute, so its two kinds of micro-batches are timed, and added up.
        with optimizer_step(
            ds_config, sequences, is_compiled=is_compiled, optimizer=optimizer
        ) as micro_batch:
            inner = timed(functools.partial(micro_batch, is_last=False))
            last = timed(functools.partial(micro_batch, is_last=True))
            peak_bytes = torch.cuda.max_memory_allocated()
        num_inner = math.ceil(SEQUENCES / sequences) - 1
        return [mfu(num_inner * a + b) for a, b in zip(inner, last, strict=True)], peak_bytes

    for sequences in itertools.takewhile(lambda _: time.monotonic() < end, (2**power for power in range(10))):
        try:
            shares, peak_bytes = measured(sequences, optimizer="adamw")
        except torch.cuda.OutOfMemoryError:
            break  # the expected end: the largest size that fits is what is looked for
        yield side_by_side.stated(
            f"{what}, micro-batch {sequences}: MFU of the paper's step", shares, best=max, target=target
        )
        if max(shares) > most:
            best, most = sequences, max(shares)
        share = peak_bytes / planned_bytes(sequences, optimizer="adamw")
        yield side_by_side.stated(f"{what}, micro-batch {sequences}: memory / plan", [share], target="<= 1.1")
    if best and time.monotonic() < end:
        with optimizer_step(ds_config, best, is_compiled=is_compiled) as micro_batch:
            steps = math.ceil(SEQUENCES / best)

            def step() -> None:
                for place in range(steps):
                    micro_batch(is_last=place == steps - 1)

            micro_batch(is_last=True)  # what a first call allocates and plans is not the step's
            seconds = timed(step, rounds=1, has_warm_up=False)
        note = "the whole step, timed"
        yield side_by_side.stated(
            f"{what}, micro-batch {best}: MFU", [mfu(seconds[0])], target=target, note=note
        )
    if best and time.monotonic() < end:
        try:
            shares, peak_bytes = measured(best, optimizer="muon")
        except torch.cuda.OutOfMemoryError:
            print(f"{what} with Muon, micro-batch {best}: out of memory")
            return
        yield side_by_side.stated(
            f"{what} with Muon, micro-batch {best}: MFU of the paper's step", shares, best=max
        )
        share = peak_bytes / planned_bytes(best, optimizer="muon")
        yield side_by_side.stated(
            f"{what} with Muon, micro-batch {best}: memory / plan", [share], target="<= 1.1"
        )


@contextmanager
def optimizer_step(
    ds_config: dict, sequences: int, *, is_compiled: bool = False, optimizer: OptimizerName = "adamw"
) -> Iterator[Callable[..., None]]:
    """Make an engine, and yield a function that takes one micro-batch of `sequences` through it; then free it."""
    fresh()
    # In a list, which is emptied at the end: the caller's name for `micro_batch` would keep the engine alive.
    engines = [engine_of(ds_config, sequences, is_compiled=is_compiled, optimizer=optimizer)]
    ids = LAYOUT.image_ids(torch.randint(LAYOUT.codebook_size, (sequences, SEQ_LEN), device=DEVICE))

    def micro_batch(*, is_last: bool) -> None:
        engine = engines[0]
        engine.set_gradient_accumulation_boundary(is_last)
        loss, _ = engine(ids, ids.roll(-1, 1))
        engine.backward(loss / ids.numel())
        engine.step()

    try:
        yield micro_batch
    finally:
        # Else every size would be measured beside the engines of the sizes before.
        free_engine(engines.pop())
        fresh()


def engine_of(
    ds_config: dict, sequences: int, *, is_compiled: bool, optimizer: OptimizerName
) -> DeepSpeedEngine:
    """Build t2i's own engine and loss."""
    with torch.device(DEVICE):
        model = OpenLMForCausalLM(CONFIG).train()
    if is_compiled:
        compile_layers(model, seq_len=SEQ_LEN)
    return make_engine(
        Learner(model, layout=LAYOUT),
        config=TrainConfig(optimizer=optimizer),
        ds_config={**ds_config, "train_micro_batch_size_per_gpu": sequences},
        per_rank=2 * sequences,
    )


def fresh() -> None:
    """Give back what is not used, and start to look for the peak of memory anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def sampling(*, bandwidth: float, end: float) -> Iterator[side_by_side.Row]:
    """Draw codes by batch; compare with reading the weights each step and the cache as it grows."""
    fresh()
    with torch.device(DEVICE):
        model = OpenLMForCausalLM(CONFIG).to(torch.bfloat16).eval()
    images = range(LAYOUT.first_image_id, LAYOUT.first_image_id + LAYOUT.codebook_size)
    body = sum(value.numel() for value in model.model.layers.parameters())
    # Only the image part of the head is read, as the sampler draws among codes only. bf16: two bytes each.
    weights = 2 * (body + LAYOUT.codebook_size * CONFIG.hidden_size)
    a_position = 2 * 2 * CONFIG.num_hidden_layers * CONFIG.hidden_size
    for batch, most in MOST_OVER_BANDWIDTH.items():
        # Both branches of guidance have a cache, which a step reads up to its own position: a sum over positions.
        cache = 2 * batch * a_position * (PROMPT * CODES + CODES * (CODES - 1) // 2)
        # Sampling multiplies by few columns at a time, so memory's bandwidth bounds it, not arithmetic.
        limit = (weights * CODES + cache) / bandwidth
        prompts = [[1] * PROMPT] * batch
        draw = functools.partial(
            sample_codes,
            model,
            prompts,
            empty_prompt=[1] * 4,
            image_ids=images,
            num_codes=CODES,
            seeds=range(batch),
            top_k=1_000,
        )
        rows = []
        for name, way in ways_of(batch).items():
            if time.monotonic() > end:
                return
            try:
                with counting() as reads:
                    seconds = timed(functools.partial(draw, **way), rounds=ROUNDS)
            except torch.cuda.OutOfMemoryError:
                print(f"sampling, batch {batch}, {name}: out of memory", flush=True)
                continue
            case, note = f"sampling, batch {batch}, {name}", ""
            if reads:
                # How many guesses are right is a trained model's matter: of this one, only a pass's time counts.
                passes, as_trained = len(reads) / (1 + ROUNDS), (CODES - 1) / FEWER_PASSES
                seconds = [value * as_trained / passes for value in seconds]
                note = f"{passes:.0f} passes taken as {as_trained:.0f}, {FEWER_PASSES:.2f} times fewer than codes"
            ratios = [value / limit for value in seconds]
            rows.append(side_by_side.stated(f"{case}: seconds / bandwidth's", ratios, note=note))
            yield rows[-1]
            yield side_by_side.stated(
                f"{case}: images per second", [batch / value for value in seconds], best=max
            )
        if rows:
            best = min(rows, key=lambda row: row.ratio)
            what = f"sampling, batch {batch}, the best of these: seconds / bandwidth's"
            yield replace(best, what=what, target=f"<= {most}").say()


def ways_of(batch: int) -> dict[str, dict[str, object]]:
    """Name the ways to draw a batch, as arguments of sample_codes."""
    ways: dict[str, dict[str, object]] = {"eager": {"window": 1}, "compiled": {"is_compiled": True}}
    return ways if batch > 1 else {**ways, f"window {WINDOW}": {"window": WINDOW}}


def encoding(*, end: float) -> Iterator[side_by_side.Row]:
    """Encode images by a tokenizer of MoVQGAN's shape in bf16; compare with its convolutions alone."""
    if time.monotonic() > end:
        return
    fresh()
    tokenizer = ImageTokenizer(
        preparing.model_of(CHANNELS), folder=Path(), device=DEVICE, dtype=torch.bfloat16
    )
    pixels = torch.rand(IMAGE_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE) * 2 - 1
    run = preparing.convolutions_alone(tokenizer, pixels)

    def alone() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            run()

    limit, ours = timed(alone), timed(lambda: tokenizer.encode(pixels))
    shares = [a / b for a, b in zip(limit, ours, strict=True)]
    yield side_by_side.stated("encoding: convolutions alone / t2i", shares, best=max, target=">= 0.6")
    rates = [IMAGE_BATCH / value for value in ours]
    yield side_by_side.stated("encoding: images per second", rates, best=max, note="256 x 256, 68M, bf16")


def timed(
    run: Callable[[], object], *, rounds: int = side_by_side.ROUNDS, has_warm_up: bool = True
) -> list[float]:
    """Run once to warm up, then `rounds` times; return wall-clock seconds until the device is done."""
    seconds = []
    for _ in range(rounds + has_warm_up):
        torch.cuda.synchronize()  # calls only queue work: without this, the work of the round before would be timed
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[has_warm_up:]


if __name__ == "__main__":
    main()
