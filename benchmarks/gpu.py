"""The 1B model on one GPU, in at most ten minutes: training MFU, memory, sampling.

Training is in bf16 with 1,152 tokens per sequence, by DeepSpeed's ZeRO-2 with fused Adam. Sampling draws 1,024 codes
with guidance, by the eager step and by a step compiled into a CUDA graph. When the time is up, the remaining parts are
skipped. Results are in results/gpu.json.

Examples:
    python benchmarks/gpu.py --peak-tflops 989 --bandwidth-tb 3.35      an H100
    python benchmarks/gpu.py --peak-tflops 312 --bandwidth-tb 2.04      an A100
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import side_by_side
import torch

from t2i.config import TrainConfig
from t2i.cost.estimates import count_parameters, estimate_memory, flops_a_token
from t2i.distributed.launch import start_processes
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.open_lm.sampling_open_lm import sample_codes
from t2i.tokens.vocab import VocabLayout
from t2i.train.ds_config import read_ds_config
from t2i.train.engine import Learner, make_engine

LAYOUT = VocabLayout(50_432, num_text_tokens=50_277, codebook_size=16_384)
CONFIG = OpenLMConfig(LAYOUT.vocab_size, 2_048, 24, 16)
SEQ_LEN, CODES, PROMPT = 1_152, 1_024, 34
DS_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"
# Under ten minutes, so that a short slot of a queue is enough: what is done by then is kept.
MOST_SECONDS = 540
LEAST_MFU = {"A100": 0.6, "H100": 0.5}
"""MFU to reach, by the device's name."""
MOST_OVER_BANDWIDTH = {8: 2.0, 64: 2.5}
"""Time that sampling may take, as a multiple of the bandwidth limit, by batch."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peak-tflops", type=float, required=True, help="dense bf16 peak from the data sheet"
    )
    parser.add_argument(
        "--bandwidth-tb", type=float, required=True, help="terabytes per second from the data sheet"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; none is visible.")
    end = time.monotonic() + MOST_SECONDS
    device = torch.cuda.get_device_name()
    rows = list(training(peak=options.peak_tflops * 1e12, device=device, end=end))
    torch.cuda.empty_cache()
    rows += sampling(bandwidth=options.bandwidth_tb * 1e12, end=end)
    side_by_side.write("gpu", rows, figures={f"device {device}": {"bytes": torch.cuda.mem_get_info()[1]}})


def training(*, peak: float, device: str, end: float) -> Iterator[side_by_side.Row]:
    """Double the micro-batch until memory or time runs out; yield each size's MFU, and its memory against the plan."""
    start_processes()
    counts, ds_config = count_parameters(CONFIG), read_ds_config(DS_CONFIG)
    a_token = flops_a_token(CONFIG, counts=counts, seq_len=SEQ_LEN)
    target = next((f">= {share}" for name, share in LEAST_MFU.items() if name in device), "")
    for sequences in itertools.takewhile(lambda _: time.monotonic() < end, (2**power for power in range(10))):
        torch.cuda.reset_peak_memory_stats()  # else the peak of the size before would be read
        try:
            seconds = timed(
                optimizer_step({**ds_config, "train_micro_batch_size_per_gpu": sequences}, sequences)
            )
        except torch.cuda.OutOfMemoryError:
            return  # the expected end: the largest size that fits is what is looked for
        # MFU counts a step's model FLOPs alone, so time that goes elsewhere lowers it, whatever it is spent on.
        shares = [a_token * sequences * SEQ_LEN / value / peak for value in seconds]
        yield side_by_side.stated(f"training, micro-batch {sequences}: MFU", shares, best=max, target=target)
        planned = estimate_memory(
            CONFIG,
            counts=counts,
            ds_config=ds_config,
            num_gpus=1,
            num_tokens=sequences * SEQ_LEN,
            is_checkpointed=False,
        )
        share = torch.cuda.max_memory_allocated() / planned.total
        yield side_by_side.stated(
            f"training, micro-batch {sequences}: memory / plan", [share], target="<= 1.1"
        )


def optimizer_step(ds_config: dict, sequences: int) -> Callable[[], None]:
    """Build one optimizer step of `sequences` through DeepSpeed."""
    with torch.device("cuda"):
        learner = Learner(OpenLMForCausalLM(CONFIG).train(), layout=LAYOUT)
    engine = make_engine(learner, config=TrainConfig(), ds_config=ds_config, per_rank=sequences)
    ids = LAYOUT.image_ids(torch.randint(LAYOUT.codebook_size, (sequences, SEQ_LEN), device="cuda"))

    def step() -> None:
        loss, _ = engine(ids, ids.roll(-1, 1))
        engine.backward(loss / ids.numel())
        engine.step()

    return step


def sampling(*, bandwidth: float, end: float) -> Iterator[side_by_side.Row]:
    """Draw codes at batch 8 and 64; compare with reading the weights each step and the cache as it grows."""
    with torch.device("cuda"):
        model = OpenLMForCausalLM(CONFIG).to(torch.bfloat16).eval()
    images = range(LAYOUT.first_image_id, LAYOUT.first_image_id + LAYOUT.codebook_size)
    body = sum(value.numel() for value in model.model.layers.parameters())
    # Only the image part of the head is read, as the sampler draws among codes only. bf16: two bytes each.
    weights = 2 * (body + LAYOUT.codebook_size * CONFIG.hidden_size)
    a_position = 2 * 2 * CONFIG.num_hidden_layers * CONFIG.hidden_size
    for batch, most in MOST_OVER_BANDWIDTH.items():
        if time.monotonic() > end:
            return
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
        for name, is_compiled in (("eager", False), ("compiled", True)):
            seconds = timed(functools.partial(draw, is_compiled=is_compiled))
            case, ratios = f"sampling, batch {batch}, {name}", [value / limit for value in seconds]
            target = f"<= {most}" if is_compiled else ""
            yield side_by_side.stated(f"{case}: seconds / bandwidth's", ratios, target=target)
            rates = [batch / value for value in seconds]
            yield side_by_side.stated(f"{case}: images per second", rates, best=max)


def timed(run: Callable[[], object], *, rounds: int = side_by_side.ROUNDS) -> list[float]:
    """Run once to warm up, then `rounds` times; return wall-clock seconds until the device is done."""
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()  # calls only queue work: without this, the work of the round before would be timed
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    main()
