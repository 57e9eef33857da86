"""A plan as text, which says what is counted and what is estimated."""

from t2i.cost.assumptions import is_there
from t2i.cost.plan import SHARE_LEFT_FREE, START_SECONDS, Plan


def describe(plan: Plan) -> list[str]:
    """Return the lines of a plan; estimates are marked as such."""
    return [*_counted(plan), "", *_memory_lines(plan), "", *_time_lines(plan), "", *_disk_lines(plan)]


def _counted(plan: Plan) -> list[str]:
    counts, data, steps = plan.counts, plan.data, plan.max_steps
    # Said, because the size of a model that is not here is not read but set.
    is_sized = plan.init != "random" and not is_there(plan.init)
    sized = f" (size by model.hidden_size and so on: {plan.init} is not here)" if is_sized else ""
    assumed = "" if data.are_made else f" (assumed: {plan.shards} is not made yet)"
    per_rank = plan.global_batch // plan.asked.num_gpus
    return [
        f"model    {counts.total:,} parameters, {counts.learned:,} trainable; vocabulary"
        f" {plan.model.get_text_config(decoder=True).vocab_size:,}{sized}",
        f"step     {plan.global_batch} sequences of {plan.seq_len} = {plan.tokens_a_step:,} tokens;"
        f" {per_rank} per {plan.device.unit}, as {plan.accumulation} x {plan.micro_batch}",
        f"run      {steps:,} steps = {steps * plan.tokens_a_step:,} tokens,"
        f" {steps * plan.pairs_a_step / plan.num_trained_on:.2f} times {plan.num_trained_on:,} pairs{assumed}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    plain, checkpointed = plan.memory[False], plan.memory[True]
    room = plan.device.memory_bytes * (1 - SHARE_LEFT_FREE)
    chosen = plan.memory[plan.is_checkpointed]
    verdict = f"{SHARE_LEFT_FREE:.0%} kept free: {'fits' if chosen.total <= room else 'does not fit'}"
    names = {
        "weights": "weights",
        "gradients": f"gradients, 1/{plan.asked.num_gpus}",
        "optimizer": f"fp32 weights, moments, 1/{plan.asked.num_gpus}",
        "buckets": "buckets for reduction",
        "logits": "logits of a chunk, head's gradient",
        "activations": f"activations of {plan.micro_batch} sequences",
    }
    rows = [(label, getattr(plain, name), getattr(checkpointed, name)) for name, label in names.items()]
    return [
        f"{f'memory per {plan.device.unit}, estimated (GiB)':36}{'plain':>10}{'gradient checkpointing':>24}",
        *(f"  {label:34}{_gib(one):>10}{_gib(two):>24}" for label, one, two in rows),
        f"  {'total':34}{_gib(plain.total):>10}{_gib(checkpointed.total):>24}",
        f"  {'largest micro-batch':34}{plan.largest_micro_batch[False]:>10}{plan.largest_micro_batch[True]:>24}",
        f"  {_gib(chosen.total)} of {_gib(plan.device.memory_bytes)} GiB with {verdict}",
    ]


def _time_lines(plan: Plan) -> list[str]:
    device, asked, hours = plan.device, plan.asked, plan.hours
    each, in_all = plan.tokens_per_second / asked.num_gpus, plan.tokens_per_second
    cost = (
        f"; {_amount(hours * asked.num_gpus * asked.price)} dollars at {asked.price:g} per {device.unit}-hour"
        if asked.price
        else ""
    )
    bound = (
        [
            f"  bound by starting kernels and reading samples, {plan.least_seconds:.2g} s per step, a guess; the"
            f" products take {plan.product_seconds:.2g} s"
        ]
        if plan.least_seconds > plan.product_seconds
        else []
    )
    time = f"{hours:,.1f} hours = {hours / 24:,.2f} days" if hours >= 1 else f"{hours * 60:.0f} minutes"
    return [
        f"time, estimated for {asked.mfu:.0%} of {device.peak_flops / 1e12:.4g} TFLOP/s per {device.unit}"
        f" ({device.source})",
        f"  {plan.flops_a_token / 1e9:.3g} GFLOP per token; {each:,.0f} tokens/s per {device.unit},"
        f" {in_all:,.0f} in total, padding included; {plan.step_seconds:.3g} s per step",
        *bound,
        f"  {time}, with {START_SECONDS} s to start; {_amount(hours * asked.num_gpus)} {device.unit}-hours{cost}",
        "  not counted: waiting for data, held-out losses, sample grids, checkpoints, repeated steps",
    ]


def _disk_lines(plan: Plan) -> list[str]:
    kept = plan.num_checkpoints
    origin = "measured" if plan.data.are_made else "estimated"
    size = plan.checkpoint_bytes / 1e9
    return [
        f"disk     shards {plan.data.shard_bytes / 1e9:.3g} GB, {origin};"
        f" a checkpoint {size:.3g} GB, {kept} at a time {kept * size:.3g} GB, estimated"
    ]


def _amount(value: float) -> str:
    """Write hours or dollars, of which a small run takes hundredths."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
