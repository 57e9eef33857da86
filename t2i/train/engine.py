"""The DeepSpeed engine: its JSON decides about the machine, the run's settings about the result."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypedDict

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn
from transformers import PreTrainedModel

from t2i.config import DsConfig, TrainConfig, bucket_elements
from t2i.data.batching import accumulation
from t2i.distributed.collectives import rank_and_size
from t2i.errors import UserError
from t2i.model import learning_attention
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import LossSums, split_sums, summed_loss
from t2i.model.trainable import layer_matrices
from t2i.tokens.vocab import VocabLayout
from t2i.train.deepspeed_internals import adam_of, measure_in_parts
from t2i.train.muon import use_muon

OWN_GROUP = 0.1
"""A matrix of at least this share of the trainable parameters is its own group, which DeepSpeed does not copy."""


class ParameterGroup(TypedDict):
    """One group of parameters, as torch's optimizers take it."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: float
    """What the schedule's learning rate is multiplied by."""
    is_new: bool
    """These are new embeddings, which L2-SP leaves alone."""
    is_muon: bool
    """Muon updates these, not Adam."""


class Learner(nn.Module):
    """The language model and its loss as one module, which DeepSpeed wraps."""

    def __init__(self, model: PreTrainedModel, *, layout: VocabLayout, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.z_loss = z_loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, LossSums]:
        """Sum losses over one micro-batch: ids and labels, (B, S) each.

        Returns:
            the sum to backpropagate, z-loss included; the sums to record, on the same device.
        """
        # Loss and model are one module, so that the engine returns sums and logits (B, S, V) never exist as a whole.
        hidden = hidden_states(self.model, input_ids)  # (B, S, D)
        total, losses, squares = summed_loss(
            hidden,
            labels,
            head=head_of(self.model),
            z_loss=self.z_loss,
            image_rows=softmax_rows(self.model, layout=self.layout),
        )
        sums = split_sums(
            losses,
            labels,
            squares=squares,
            num_text_rows=self.layout.num_text_rows,
            first_image_id=self.layout.first_image_id,
        )
        return total, sums


def make_engine(
    learner: Learner, *, config: TrainConfig, ds_config: DsConfig, per_rank: int
) -> deepspeed.DeepSpeedEngine:
    """Hand model, optimizer and clipping to DeepSpeed.

    Args:
        per_rank: sequences per step of each rank.

    Raises:
        UserError: DeepSpeed refuses its JSON.
    """
    learning_attention.register()
    muon = muon_matrices(learner, config=config)
    groups = parameter_groups(learner, config=config, muon=muon)
    largest = max(value.numel() for group in groups for value in group["params"])
    whole = whole_ds_config(ds_config, config=config, per_rank=per_rank, largest=largest)
    with _refusals():
        engine, *_ = deepspeed.initialize(model=learner, model_parameters=groups, config=whole)
    measure_in_parts(engine.optimizer)
    if config.l2_sp:
        pull_to_start(adam_of(engine), share=config.l2_sp)
    if muon:
        use_muon(engine)
    return engine


def whole_ds_config(
    ds_config: DsConfig, *, config: TrainConfig, per_rank: int, largest: int = 0
) -> dict[str, object]:
    """Add to DeepSpeed's JSON what the run decides; check that DeepSpeed takes it, which costs no weight.

    Args:
        largest: elements of the largest trainable tensor; 0 if not known yet.

    Raises:
        UserError: it does not.
    """
    steps, micro_batch = accumulation(per_rank, micro_batch=ds_config["train_micro_batch_size_per_gpu"])
    chosen = ds_config.get("optimizer", {}).get("params", {})
    optimizer = {
        "type": "AdamW",
        "params": {
            "lr": config.lr,
            "betas": [config.beta1, config.beta2],
            "weight_decay": config.weight_decay,
            **chosen,
            # torch's Adam in one fused pass: without it, a step holds two more copies of the trainable parameters.
            **({"fused": True} if chosen.get("torch_adam") else {}),
        },
    }
    whole: dict[str, object] = {
        **ds_config,
        "train_micro_batch_size_per_gpu": micro_batch,
        # DeepSpeed divides each gradient by this and by the number of ranks; Stepper.accumulate multiplies by both.
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.grad_clip,
        "optimizer": optimizer,
        # DeepSpeed's own speed, which nobody reads: it waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    zero, num_ranks = ds_config["zero_optimization"], rank_and_size()[1]
    if num_ranks == 1:
        # There is nothing to reduce while the backward pass runs, and DeepSpeed would wait for the device every time.
        whole["zero_optimization"] = {**zero, "overlap_comm": False}
    elif zero.get("overlap_comm"):
        size = bucket_elements(zero, largest=largest, num_ranks=num_ranks)
        whole["zero_optimization"] = {**zero, "reduce_bucket_size": size}
    with _refusals():
        deepspeed.DeepSpeedConfig(whole)
    return whole


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what DeepSpeed says of its JSON into a user's error."""
    try:
        yield
    except UserError:
        raise
    # All that its checks of settings raise, pydantic's errors among them. Errors of the machine are others.
    except (
        DeepSpeedConfigError,
        AssertionError,
        ValueError,
        TypeError,
        KeyError,
        NotImplementedError,
    ) as error:
        said = " ".join(str(error).partition("For further information")[0].split())
        raise UserError(
            f"DeepSpeed refuses the JSON of --ds_config: {said or type(error).__name__}"
        ) from error


def pull_to_start(optimizer: torch.optim.Optimizer, *, share: float) -> None:
    """L2-SP: let every step first move pre-trained weights towards their present values, by lr * share.

    New embeddings have no pre-trained value and are left alone.
    """
    # Under ZeRO these are this rank's fp32 shards, so each rank copies only its part of the start.
    start = {
        value: value.detach().clone()
        for group in optimizer.param_groups
        if not group["is_new"]
        for value in group["params"]
    }

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for value in group["params"]:
                if value in start:
                    value.lerp_(start[value], group["lr"] * share)

    # A hook of the optimizer, not a call in the loop: a skipped step then moves nothing.
    optimizer.register_step_pre_hook(pull)


def muon_matrices(learner: Learner, *, config: TrainConfig) -> list[nn.Parameter]:
    """List the parameters that Muon updates: none, unless train.optimizer says so.

    Raises:
        UserError: it does, and there are none.
    """
    if config.optimizer == "adamw":
        return []
    found = layer_matrices(learner.model)
    if not found:
        raise UserError(
            f"train.optimizer is muon, which updates matrices of the layers; expected adamw, because no layer of"
            f" {type(learner.model).__name__} has a trainable one."
        )
    return found


def parameter_groups(
    module: nn.Module, *, config: TrainConfig, muon: Collection[nn.Parameter] = ()
) -> list[ParameterGroup]:
    """Group parameters: matrices with weight decay, norms and biases without, new embeddings with their own rate.

    Frozen parameters are in no group.

    Args:
        muon: the matrices that Muon updates, which share no group with others.
    """
    # A factor, not a rate: the loop sets every group's lr at each step, from one schedule.
    scale = 1.0 if config.new_embeddings_lr is None else config.new_embeddings_lr / config.lr
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    # split_rows names them so (model/resize.py); embeddings that were not split are among the others.
    new_rows = [value for name, value in trainable.items() if name.endswith(".new")]
    others = [value for name, value in trainable.items() if not name.endswith(".new")]
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    # DeepSpeed flattens a group of several tensors into a copy, and needs none for a single tensor.
    least = OWN_GROUP * sum(value.numel() for value in trainable.values())
    large = [[value] for value in matrices if value.numel() >= least]
    small = [value for value in matrices if value.numel() < least]
    of_muon = set(map(id, muon))
    small_of_adam = [value for value in small if id(value) not in of_muon]
    small_of_muon = [value for value in small if id(value) in of_muon]
    decay = config.weight_decay
    plain = ParameterGroup(params=[], weight_decay=decay, lr_scale=1.0, is_new=False, is_muon=False)
    groups: list[ParameterGroup] = [
        {**plain, "params": values, "is_muon": any(id(value) in of_muon for value in values)}
        for values in (*large, small_of_adam, small_of_muon)
    ]
    groups += [
        {**plain, "params": vectors, "weight_decay": 0.0},
        {**plain, "params": new_rows, "lr_scale": scale, "is_new": True},
    ]
    # ZeRO cannot flatten a group without parameters.
    return [group for group in groups if group["params"]]
