"""The DeepSpeed engine: the JSON owns the machine, the run's configuration owns the science."""

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from t2i.config import DsConfig, TrainConfig
from t2i.data.batching import accumulation
from t2i.model.backbone import head_of, hidden_states, softmax_rows
from t2i.model.loss import LossSums, split_sums, summed_loss
from t2i.tokens.vocab import VocabLayout
from t2i.train.deepspeed_internals import adam_of, measure_in_parts

OWN_GROUP = 0.1
"""A matrix of at least this share of the trainable parameters is a group of its own, which DeepSpeed does not copy."""


class Learner(nn.Module):
    """The language model with its split loss: what DeepSpeed sees as one module."""

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
        hidden = hidden_states(self.model, input_ids)
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
    """Hand model, optimizer and clipping to DeepSpeed."""
    steps, micro_batch = accumulation(per_rank, micro_batch=ds_config["train_micro_batch_size_per_gpu"])
    chosen = ds_config.get("optimizer", {}).get("params", {})
    optimizer = {
        "type": "AdamW",
        "params": {
            "lr": config.lr,
            "betas": [config.beta1, config.beta2],
            "weight_decay": config.weight_decay,
            **chosen,
            # torch's own in one pass: without it, it holds two more copies of what it moves.
            **({"fused": True} if chosen.get("torch_adam") else {}),
        },
    }
    whole = {
        **ds_config,
        "train_micro_batch_size_per_gpu": micro_batch,
        # DeepSpeed divides each gradient by this and by the number of ranks; Trainer.accumulate multiplies by both.
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.grad_clip,
        "optimizer": optimizer,
    }
    engine, *_ = deepspeed.initialize(
        model=learner, model_parameters=parameter_groups(learner, config=config), config=whole
    )
    measure_in_parts(engine.optimizer)
    if config.l2_sp:
        pull_to_start(adam_of(engine), share=config.l2_sp)
    return engine


def pull_to_start(optimizer: torch.optim.Optimizer, *, share: float) -> None:
    """Let every step first move pre-trained weights towards where they are now, by lr * share (L2-SP); not new rows."""
    # Under ZeRO these are this rank's shards in fp32, so the copy of the start is shared out too.
    start = {
        value: value.detach().clone()
        for group in optimizer.param_groups
        if not group["is_new"]
        for value in group["params"]
    }

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for value in group["params"]:
                if value in start:
                    value.lerp_(start[value], group["lr"] * share)

    # A hook of the step, not a call in the loop: a step that is skipped for its gradient pulls nothing.
    optimizer.register_step_pre_hook(pull)


def parameter_groups(module: nn.Module, *, config: TrainConfig) -> list[dict[str, Any]]:
    """Group parameters: matrices decay, norms and biases do not, new rows that were split off may have their own rate.

    `lr_scale` is what the schedule's learning rate is multiplied by. Frozen parameters are in no group.
    """
    scale = 1.0 if config.new_embeddings_lr is None else config.new_embeddings_lr / config.lr
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    new_rows = [value for name, value in trainable.items() if name.endswith(".new")]
    others = [value for name, value in trainable.items() if not name.endswith(".new")]
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    # DeepSpeed flattens, updates and frees one group after the other, and copies a group of several tensors.
    least = OWN_GROUP * sum(value.numel() for value in trainable.values())
    large = [[value] for value in matrices if value.numel() >= least]
    small = [value for value in matrices if value.numel() < least]
    decay = config.weight_decay
    groups = [
        {"params": values, "weight_decay": decay, "lr_scale": 1.0, "is_new": False}
        for values in (*large, small)
    ]
    groups += [
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0, "is_new": False},
        {"params": new_rows, "weight_decay": decay, "lr_scale": scale, "is_new": True},
    ]
    return [group for group in groups if group["params"]]
