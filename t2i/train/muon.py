"""Muon: a matrix of the layers moves along its momentum made orthogonal, where Adam divides each value by its own size.

    update = U V^T, of the momentum's singular value decomposition U S V^T, nearly, by a few matrix products
    weight = weight - lr * (weight_decay * weight + 0.2 sqrt(max(rows, columns)) * update)

The factor gives updates the size that Adam's have, so that one learning rate and one weight decay serve both.

Sources: Jordan et al., Muon, 2024 (the products); Liu et al., Muon is scalable for LLM training, 2025 (the factor).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from t2i.train.deepspeed_internals import Shard, adam_of, muon_shards, one_moment

MOMENTUM = 0.95
"""Decay rate of the momentum, which is Nesterov's."""
ADAMS_SIZE = 0.2
"""Root mean square of the values of an update of Adam, as found on language models."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""A round turns a singular value x into a x + b x^3 + c x^5: all but the smallest are soon between 0.7 and 1.2."""
ROUNDS = 5
BATCH = 2**26
"""Values of matrices that are multiplied, or sent, at a time; in bf16 a step takes under 1 GB for it, for a moment."""


class Matrix(NamedTuple):
    """A matrix, and its place in the vector of its parameter group."""

    shape: torch.Size
    begin: int
    end: int


def use_muon(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let Muon update the parameter groups that are marked for it, and the engine's Adam all others."""
    steps = {id(shard.value): MuonStep(shard) for shard in muon_shards(engine)}

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        # ZeRO calls the optimizer for one group at a time, in the same order on every rank.
        for group in optimizer.param_groups:
            for value in group["params"]:
                if id(value) in steps:
                    steps[id(value)].take(optimizer.state[value], group=group)

    # A hook of the optimizer: gradients are clipped by then, and a skipped step moves nothing.
    adam_of(engine).register_step_pre_hook(update)


class MuonStep:
    """Updates one rank's part of a parameter group of matrices."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.precision = shard.params[0][0].dtype
        matrices = [Matrix(value.shape, begin, begin + value.numel()) for value, begin in shard.params]
        size = shard.value.numel()
        cut = [matrix for matrix in matrices if matrix.begin // size < (matrix.end - 1) // size]
        by_shape: defaultdict[torch.Size, list[Matrix]] = defaultdict(list)
        for matrix in matrices:
            if shard.begin <= matrix.begin and matrix.end <= shard.end:
                by_shape[matrix.shape].append(matrix)
        self.own = [batch for group in by_shape.values() for batch in _batches(group)]
        """Matrices of this rank alone, those of one shape together."""
        self.cut = list(_batches(cut))
        """Matrices that several ranks have parts of, the same list on every rank."""

    def take(self, state: dict[str, Any], *, group: dict[str, Any]) -> None:
        """Take one step, and leave no gradient for Adam.

        Args:
            state: the optimizer's, of this part.
            group: with lr and weight_decay.
        """
        value, gradient = self.shard.value, self.shard.value.grad
        assert gradient is not None  # which ZeRO has just put there
        momentum = one_moment(value, state)
        state["step"] += 1
        momentum.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp_(momentum, MOMENTUM)  # in place: nobody reads this gradient again
        value.grad = None
        value.mul_(1 - group["lr"] * group["weight_decay"])
        for matrix, update in self.updates(direction):
            in_shard, in_matrix = self.overlap(matrix)
            factor = group["lr"] * ADAMS_SIZE * max(matrix.shape) ** 0.5
            value[in_shard].add_(update.flatten()[in_matrix], alpha=-factor)

    def updates(self, direction: Tensor) -> Iterator[tuple[Matrix, Tensor]]:
        """Make orthogonal each matrix that this rank has a part of.

        Args:
            direction: (N,), this rank's part; N values as in the shard.

        Yields:
            the matrix and its update, (R, C), in the precision of the model's weights.
        """
        for batch in self.own:
            parts = (direction[self.overlap(matrix)[0]].view(matrix.shape) for matrix in batch)
            whole = torch.stack([part.to(self.precision) for part in parts])
            yield from zip(batch, orthogonal(whole), strict=True)
        for batch in self.cut:
            for matrix, values in zip(batch, self.joined(direction, batch), strict=True):
                in_shard, _ = self.overlap(matrix)
                if in_shard.start < in_shard.stop:
                    yield matrix, orthogonal(values.view(1, *matrix.shape))[0]

    def joined(self, direction: Tensor, batch: list[Matrix]) -> list[Tensor]:
        """Join matrices from the parts that ranks have; every rank calls this."""
        sizes = [_size(matrix) for matrix in batch]
        found = direction.new_zeros(sum(sizes), dtype=self.precision)
        values = list(found.split(sizes))
        for matrix, into in zip(batch, values, strict=True):
            in_shard, in_matrix = self.overlap(matrix)
            into[in_matrix] = direction[in_shard]
        # A sum, to which each rank adds zeros where it has no part: exact, and any number of ranks may share a matrix.
        dist.all_reduce(found)
        return values

    def overlap(self, matrix: Matrix) -> tuple[slice, slice]:
        """Return where this rank's part of a matrix is, in the shard and in the matrix; it may be empty."""
        first, last = self.shard.begin, self.shard.end
        begin, end = (min(max(place, first), last) for place in (matrix.begin, matrix.end))
        in_matrix = slice(begin - matrix.begin, end - matrix.begin)
        return slice(begin - first, end - first), in_matrix


def orthogonal(matrices: Tensor) -> Tensor:
    """Replace the singular values of matrices, (N, R, C), by values near 1, all but the smallest.

    Source: Jordan et al., Muon, 2024.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    norms = torch.linalg.matrix_norm(matrices.float(), keepdim=True)
    x = matrices / (norms + 1e-7).to(matrices.dtype)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _batches(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """Split matrices into lists of BATCH values at most, or of one matrix."""
    batch: list[Matrix] = []
    for matrix in matrices:
        if batch and sum(map(_size, (*batch, matrix))) > BATCH:
            yield batch
            batch = []
        batch.append(matrix)
    if batch:
        yield batch


def _size(matrix: Matrix) -> int:
    return matrix.end - matrix.begin
