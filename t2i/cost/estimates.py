"""What a model needs on a device: exact counts, bytes estimated for open_lm's shape."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from t2i.config import DsConfig, Trainable
from t2i.model.backbone import made_of
from t2i.model.loss import CHUNK_ROWS
from t2i.model.resize import split_rows
from t2i.model.trainable import add_lora, set_trainable

DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size where the JSON has none."""

LOGIT_BYTES = {4: 4, 2: 6}
"""What one logit of a chunk costs, by the bytes of a weight: fp32, and a copy in the weights' precision."""


@dataclass(frozen=True)
class Counts:
    """Numbers in a model."""

    total: int
    learned: int
    in_products: int
    """In the matrices that every token is multiplied by: all but the norms and an untied embedding."""
    learned_in_products: int
    learned_in_head: int


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device at the busiest moment, when the backward pass leaves the head."""

    weights: float
    gradients: float
    """This rank's shard, in the precision that they are summed in."""
    optimizer: float
    """This rank's shard of fp32 weights and Adam's two averages."""
    buckets: float
    logits: float
    """One chunk's logits, the head's gradient, which is summed in fp32, and four times the chunk's rows."""
    activations: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(vars(self).values())


def weight_bytes(ds_config: DsConfig) -> int:
    """Tell the bytes of one weight."""
    return 2 if ds_config.get("bf16", {}).get("enabled", False) else 4


def count_parameters(
    config: PretrainedConfig, *, recipe: Trainable = "all", lora_rank: int = 0, num_kept: int = 0
) -> Counts:
    """Count a model's numbers without making any of them.

    Args:
        recipe: the trainable parameters, as in model.trainable.
        lora_rank: rank of adapters, of which num_kept tells the rows that stay as they are; 0 for none.
    """
    with torch.device("meta"):
        model = made_of(config)
        if lora_rank:
            split_rows(model, num_old=num_kept)
            add_lora(model, rank=lora_rank)
        else:
            set_trainable(model, recipe=recipe)
    return counts_of(model)


def counts_of(model: PreTrainedModel) -> Counts:
    """Count a model's numbers as they are."""
    config = model.config
    embedding = set() if config.tie_word_embeddings else set(model.get_input_embeddings().parameters())
    values = list(model.parameters())
    products = [value for value in values if value.dim() == 2 and value not in embedding]
    return Counts(
        total=sum(value.numel() for value in values),
        learned=sum(value.numel() for value in values if value.requires_grad),
        in_products=sum(value.numel() for value in products),
        learned_in_products=sum(value.numel() for value in products if value.requires_grad),
        learned_in_head=sum(
            value.numel() for value in model.get_output_embeddings().parameters() if value.requires_grad
        ),
    )


def estimate_memory(
    model: PretrainedConfig,
    *,
    counts: Counts,
    ds_config: DsConfig,
    num_gpus: int,
    num_tokens: int,
    is_checkpointed: bool,
) -> Memory:
    """Estimate one device's memory under ZeRO-2 with a micro-batch of num_tokens."""
    element = weight_bytes(ds_config)
    summed_in = ds_config.get("data_types", {}).get("grad_accum_dtype", "fp32" if element == 4 else "bf16")
    zero = ds_config["zero_optimization"]
    num_buckets = 2 if zero.get("overlap_comm") else 1
    rows = model.vocab_size
    return Memory(
        weights=element * counts.total,
        gradients=(4 if summed_in == "fp32" else 2) * counts.learned / num_gpus,
        optimizer=12 * counts.learned / num_gpus,
        buckets=element * num_buckets * zero.get("reduce_bucket_size", DEFAULT_BUCKET),
        logits=rows * (CHUNK_ROWS + model.hidden_size) * LOGIT_BYTES[element]
        + 16 * CHUNK_ROWS * model.hidden_size,
        activations=activation_bytes(
            model, num_tokens=num_tokens, element_bytes=element, is_checkpointed=is_checkpointed
        ),
    )


def activation_bytes(
    model: PretrainedConfig, *, num_tokens: int, element_bytes: int, is_checkpointed: bool
) -> float:
    """Estimate what the backward pass needs of the forward pass, attention's squares never being stored.

    A layer keeps, a token, in widths D: what both norms take and give (4), queries, keys and values (3, and 2 more
    where queries and keys are rotated or normalised) and attention's result (1); and in widths of the feed-forward
    its gate, value, gate's activation and product (4). Checkpointing keeps what a layer takes (1) and one layer whole.
    """
    width, inner = model.hidden_size, model.intermediate_size
    positions = getattr(model, "positional_embedding_type", "rotary")  # that of most other classes
    is_turned = positions == "rotary" or getattr(model, "qk_norm", False)
    statistics = 4 * (
        4 + model.num_attention_heads
    )  # fp32: two norms' mean and deviation, attention's normaliser
    layer = element_bytes * ((10 if is_turned else 8) * width + 4 * inner) + statistics
    outside = (
        element_bytes * 2 * width + 24
    )  # the last norm, the rows that the loss counts, their places and labels
    kept = layer if not is_checkpointed else element_bytes * width
    whole = layer if is_checkpointed else 0
    return num_tokens * (model.num_hidden_layers * kept + whole + outside)


def flops_a_token(
    model: PretrainedConfig, *, counts: Counts, seq_len: int, replay_ratio: float = 0.0
) -> float:
    """Count products and sums of a token's forward and backward pass.

    Two a number in the forward pass, two more for the gradient of what came in and two for its own if it learns; and
    12 L D S for attention, its square counted whole, as is usual for MFU (Source: PaLM, appendix B). With
    image_rows_only, an image token is multiplied by the image rows of the head alone.

    Args:
        replay_ratio: share of sequences without a picture.
    """
    attention = 12 * model.num_hidden_layers * model.hidden_size * seq_len
    left_out = 0.0
    if getattr(model, "image_rows_only", False):
        other_rows = model.vocab_size - model.vocab_layout["codebook_size"]
        left_out = (1 - replay_ratio) * model.codes_per_image / seq_len * other_rows * model.hidden_size
    learns_head = counts.learned_in_head == model.vocab_size * model.hidden_size  # not with adapters
    products = 4 * (counts.in_products - left_out)
    return products + 2 * (counts.learned_in_products - learns_head * left_out) + attention


def checkpoint_bytes(counts: Counts, *, element_bytes: int) -> float:
    """Estimate a checkpoint: the weights for others and for DeepSpeed, fp32 weights and Adam's averages."""
    return 2 * element_bytes * counts.total + 12 * counts.learned
