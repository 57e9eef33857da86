"""What a model needs on a device: exact parameter counts, and bytes estimated for open_lm's architecture."""

import math
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from t2i.config import DsConfig, ImageWeights, OptimizerName, Trainable, TrainConfig, bucket_elements
from t2i.model import loss
from t2i.model.backbone import made_of
from t2i.model.resize import split_rows
from t2i.model.routing import num_idle, route
from t2i.model.trainable import add_lora, layer_matrices, set_trainable

# Kernels of open_lm's forward and backward pass, counted on a model of 24 layers: 2,013.
LAUNCHES_PER_LAYER, LAUNCHES_OUTSIDE = 80, 100
LAUNCH_SECONDS = 1e-5
"""Time that PyTorch takes to start a kernel, autograd included; a guess."""
MUON_ROUNDS = 5
"""Rounds of products by which Muon makes a matrix orthogonal."""
SAMPLE_SECONDS = 5e-4
"""Time to read a sample from its shard and build its sequence, in the training process; a guess."""

LOGIT_BYTES = {4: 4, 2: 6}
"""Bytes per logit of a chunk, by the bytes per weight: fp32, plus a copy in lower precision if there is one."""


@dataclass(frozen=True)
class Counts:
    """Parameter counts of a model."""

    total: int
    learned: int
    in_products: int
    """Parameters of the matrices that every token is multiplied by: all but norms and an untied embedding."""
    learned_in_products: int
    learned_in_head: int
    inner_width: int
    """Width inside a layer's feed-forward part: the widest input that a matrix has."""
    largest_learned: int
    """Elements of the largest trainable tensor."""
    muon_shapes: tuple[tuple[int, int], ...]
    """Rows and columns of the matrices that Muon updates if train.optimizer says so."""

    @property
    def of_muon(self) -> int:
        """Parameters that Muon updates if train.optimizer says so."""
        return sum(rows * columns for rows, columns in self.muon_shapes)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device at the peak, which is when the backward pass leaves the LM head."""

    weights: float
    gradients: float
    """This rank's shard of the gradients, in the precision of their sum."""
    optimizer: float
    """This rank's shard of the fp32 weights and the optimizer's moments."""
    buckets: float
    logits: float
    """One chunk's logits, the LM head's gradient in fp32, and four copies of the chunk's hidden states."""
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(vars(self).values())


def weight_bytes(ds_config: DsConfig) -> int:
    """Return the bytes per weight."""
    return 2 if ds_config.get("bf16", {}).get("enabled", False) else 4


def count_parameters(
    config: PretrainedConfig,
    *,
    recipe: Trainable = "all",
    lora_rank: int = 0,
    image_weights: ImageWeights = "none",
    num_kept: int = 0,
) -> Counts:
    """Count a model's parameters without allocating them.

    Args:
        recipe: the trainable parameters, as in model.trainable.
        lora_rank: rank of LoRA adapters; 0 for none.
        image_weights: weights of their own for image positions, of rank lora_rank if they are LoRA.
        num_kept: with adapters or image weights, the number of embeddings that stay frozen.
    """
    # The run's own code on torch's meta device, so that no formula here can differ from the model.
    with torch.device("meta"):
        model = made_of(config)
        if image_weights != "none":
            model = route(model, kind=image_weights, rank=lora_rank, num_text_rows=num_kept)
        elif lora_rank:
            split_rows(model, num_old=num_kept)
            add_lora(model, rank=lora_rank)
        else:
            set_trainable(model, recipe=recipe)
    return counts_of(model)


def counts_of(model: PreTrainedModel) -> Counts:
    """Count the parameters of a model."""
    values = list(model.parameters())
    # Embeddings are looked up. Tied ones are the LM head's matrix too.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = set(embedding.parameters()) - set(head.parameters())
    products = [value for value in values if value.dim() == 2 and value not in looked_up]
    return Counts(
        total=sum(value.numel() for value in values),
        learned=sum(value.numel() for value in values if value.requires_grad),
        # A position passes the language model's copy of a matrix, or that of images, and not both.
        in_products=sum(value.numel() for value in products) - num_idle(model),
        learned_in_products=sum(value.numel() for value in products if value.requires_grad),
        learned_in_head=sum(value.numel() for value in head.parameters() if value.requires_grad),
        # Matrices say it alike in every class, whose configurations call it by many names or not at all.
        inner_width=max(value.shape[1] for value in products),
        largest_learned=max((value.numel() for value in values if value.requires_grad), default=0),
        muon_shapes=tuple((value.shape[0], value.shape[1]) for value in layer_matrices(model)),
    )


def muon_flops(counts: Counts, *, num_gpus: int) -> int:
    """Count the floating-point operations of Muon's products in one step, on the GPU that has most of them.

    Each GPU multiplies all matrices that its part of the parameters reaches into.
    """
    share = -(-counts.of_muon // num_gpus)
    of_gpus = [0] * num_gpus
    begin = 0
    for shape in counts.muon_shapes:
        end = begin + math.prod(shape)
        rows, columns = sorted(shape)
        for place in range(begin // share, (end - 1) // share + 1):
            of_gpus[place] += MUON_ROUNDS * (4 * rows**2 * columns + 2 * rows**3)
        begin = end
    return max(of_gpus)


def estimate_memory(
    model: PretrainedConfig,
    *,
    counts: Counts,
    ds_config: DsConfig,
    num_gpus: int,
    num_tokens: int,
    is_checkpointed: bool,
    on_cpu: bool = False,
    optimizer: OptimizerName = "adamw",
) -> Memory:
    """Estimate one device's memory under ZeRO-2 with a micro-batch of num_tokens tokens."""
    element = weight_bytes(ds_config)
    summed_in = ds_config.get("data_types", {}).get("grad_accum_dtype", "fp32" if element == 4 else "bf16")
    zero = ds_config["zero_optimization"]
    # While one bucket is reduced, the next one is filled.
    num_buckets = 2 if zero.get("overlap_comm") and num_gpus > 1 else 1
    sizes = model.get_text_config(decoder=True)  # a model of text and images describes its parts apart
    rows = sizes.vocab_size
    positions = loss.CHUNK_LOGITS // rows
    return Memory(
        weights=element * counts.total,
        gradients=(4 if summed_in == "fp32" else 2) * counts.learned / num_gpus,
        optimizer=optimizer_bytes(counts, optimizer=optimizer) / num_gpus,
        buckets=element
        * num_buckets
        * bucket_elements(zero, largest=counts.largest_learned, num_ranks=num_gpus),
        logits=rows * (positions + sizes.hidden_size) * LOGIT_BYTES[element]
        + 16 * positions * sizes.hidden_size,
        activations=activation_bytes(
            sizes,
            inner_width=counts.inner_width,
            num_tokens=num_tokens,
            element_bytes=element,
            is_checkpointed=is_checkpointed,
            on_cpu=on_cpu,
        ),
    )


def activation_bytes(
    model: PretrainedConfig,
    *,
    inner_width: int,
    num_tokens: int,
    element_bytes: int,
    is_checkpointed: bool,
    on_cpu: bool = False,
) -> float:
    """Estimate the bytes that the forward pass keeps for the backward pass; attention scores are never stored.

    Per token a layer keeps, in units of the width D: inputs and outputs of both norms (4), queries, keys and values
    (3, plus 2 if queries and keys are rotated or normalised), and the attention's output (1). In units of the
    feed-forward's width it keeps gate, value, activation and product (4). Gradient checkpointing keeps each layer's
    input (1) and one whole layer. On a CPU attention in bf16 keeps its own queries, keys, values and output in fp32;
    those before it only if they are normalised.
    """
    width = model.hidden_size
    # Rotary is what most other model classes have, which do not say so.
    positions = getattr(model, "positional_embedding_type", "rotary")
    is_normalised = getattr(model, "qk_norm", False)
    if on_cpu and element_bytes == 2:
        mixing = 4 * 4 + 2 + 2 * 3 * is_normalised
    else:
        mixing = element_bytes * (6 if positions == "rotary" or is_normalised else 4)
    # In fp32: mean and deviation of two norms, and attention's normaliser of each head.
    heads = [getattr(layer, "num_attention_heads", None) or 0 for layer in _layers(model)]
    statistics = 4 * (4 + sum(heads) / len(heads))
    layer = (4 * element_bytes + mixing) * width + 4 * element_bytes * inner_width + statistics
    # Outside the layers: the last norm, and the hidden states, places and labels that the loss counts.
    outside = element_bytes * 2 * width + 24
    kept = layer if not is_checkpointed else element_bytes * width
    whole = layer if is_checkpointed else 0
    return num_tokens * (model.num_hidden_layers * kept + whole + outside)


def flops_a_token(
    model: PretrainedConfig, *, counts: Counts, seq_len: int, replay_ratio: float = 0.0
) -> float:
    """Count the floating-point operations of a token's forward and backward pass.

    Per parameter: two in the forward pass, two for the gradient of the input, and two for its own gradient if it is
    trainable. Attention adds 12 L D S, without regard to causality, as is usual for MFU. With image_rows_only, an image
    token is multiplied only by the image part of the LM head.

    Args:
        replay_ratio: share of text-only sequences.

    Source: PaLM, appendix B.
    """
    sizes = model.get_text_config(decoder=True)
    attention = 12 * sum(_width_of_heads(layer) for layer in _layers(sizes)) * seq_len
    left_out = 0.0
    if getattr(model, "image_rows_only", False):
        other_rows = sizes.vocab_size - model.vocab_layout["codebook_size"]
        left_out = (1 - replay_ratio) * model.codes_per_image / seq_len * other_rows * sizes.hidden_size
    # With adapters the LM head is frozen, and has no gradient of its own to leave out.
    learns_head = counts.learned_in_head >= sizes.vocab_size * sizes.hidden_size  # more with a bias
    products = 4 * (counts.in_products - left_out)
    return products + 2 * (counts.learned_in_products - learns_head * left_out) + attention


def _layers(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Describe each layer: transformers 5 does so where they differ, as Gemma 4's do."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def _width_of_heads(config: PretrainedConfig) -> int:
    """Return the width of all heads of a layer together, which some classes set apart from the model's."""
    heads: int = getattr(config, "num_attention_heads", None) or 1
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def least_step_seconds(
    model: PretrainedConfig, *, sequences: int, accumulation: int, num_workers: int
) -> float:
    """Estimate the least time of a step on a GPU, whatever its products take: starting kernels, reading samples.

    Args:
        sequences: of one rank.
        accumulation: micro-batches per step.
        num_workers: loader processes per rank; with none, samples are read between steps.
    """
    kernels = accumulation * (LAUNCHES_PER_LAYER * model.num_hidden_layers + LAUNCHES_OUTSIDE)
    return LAUNCH_SECONDS * kernels + (0.0 if num_workers else SAMPLE_SECONDS * sequences)


def num_checkpoints(train: TrainConfig) -> tuple[int, int]:
    """Count the checkpoints that a run keeps in the end, and the most that there are while it trains."""
    if not train.save_every:  # the last step alone
        return 1, 1
    saves = -(-train.max_steps // train.save_every)
    kept_for_good = train.max_steps // math.lcm(train.save_every, train.keep_every) if train.keep_every else 0
    # Beside the last ones the best by held-out loss is kept; a new one is complete before an old one is removed.
    kept = train.keep_last + 1 + kept_for_good
    return min(saves, kept), min(saves, kept + 1)


def optimizer_bytes(counts: Counts, *, optimizer: OptimizerName) -> int:
    """Count the bytes of the fp32 weights and the moments, over all ranks: Adam has two, Muon one."""
    return 12 * counts.learned - (4 * counts.of_muon if optimizer == "muon" else 0)


def checkpoint_bytes(counts: Counts, *, element_bytes: int, optimizer: OptimizerName = "adamw") -> float:
    """Estimate the bytes of a checkpoint: weights twice (export and DeepSpeed's), fp32 weights and moments."""
    return 2 * element_bytes * counts.total + optimizer_bytes(counts, optimizer=optimizer)
