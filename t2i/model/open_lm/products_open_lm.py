"""Products with weights that oneDNN packs, and copies of a model whose linear layers multiply so.

This file is uploaded with exported models, so it imports only torch and transformers.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Kind = TypeVar("Kind", bound=nn.Module)


def product(weight: Tensor, *, num_rows: int, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Prepare x (num_rows, D) -> x weight^T + bias.

    In fp32 on x86 processors, oneDNN packs the weight in its own blocks: half the time at 2 rows, a third at 16.
    """
    if not has_blocks(weight):
        return functools.partial(F.linear, weight=weight, bias=bias)
    # Not public, but torch's own compiler calls it. Packed once here, and used by every step.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), num_rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, bias, "none", [], "")


def has_blocks(weight: Tensor) -> bool:
    """Tell whether oneDNN can pack a weight here."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return (
        is_plain and torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
    )


class PackedLinear(nn.Linear):
    """A mirror of a linear layer that multiplies by its packed weight."""

    multiply: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input)


class PackedConv1D(Conv1D):  # type: ignore[misc]
    """The same of GPT-2's linear layer, whose weight is transposed."""

    multiply: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class SplitHead(nn.Linear):
    """An LM head that computes the logits of its first ids by a product of their own."""

    num_first: int

    def forward(self, input: Tensor) -> Tensor:
        parts = []
        for ids in (slice(self.num_first), slice(self.num_first, None)):
            bias = None if self.bias is None else self.bias[ids]
            parts.append(F.linear(input, self.weight[ids], bias))
        return torch.cat(parts, dim=-1)


def split_head(head: nn.Module, *, num_first: int) -> SplitHead:
    """Mirror an LM head, so that further ids do not change how the logits of its first ids are rounded."""
    made = mirror(head, SplitHead)
    made.num_first = num_first
    return made


def mirrored(
    module: nn.Module,
    change: Callable[[nn.Module], nn.Module | None],
    *,
    seen: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """Copy a tree of modules, but no tensor: both have the same parameters, and neither knows of the other.

    A copy can be changed while the model stays as it is: in training, in another thread, and after an error.

    Args:
        change: returns what stands in the copy for a module and all below it; None for a plain mirror.
        seen: mirrors made so far, by the identity of the module.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:  # one module in two places stays one
        return seen[id(module)]
    made = change(module)
    if made is None:
        made = mirror(module, type(module))
        made._modules.update(
            # Some classes have None in the place of a module.
            (name, None if child is None else mirrored(child, change, seen=seen))
            for name, child in module._modules.items()
        )
    seen[id(module)] = made
    return made


def mirror(module: nn.Module, kind: type[Kind]) -> Kind:
    """Copy one module with its tensors and children shared, as an object of a class."""
    copied = object.__new__(kind)
    # Past __setattr__, which would register what is registered already.
    copied.__dict__.update(module.__dict__)
    for registered in ("_modules", "_parameters", "_buffers"):
        copied.__dict__[registered] = dict(module.__dict__[registered])
    return copied


def packed(module: nn.Module, *, num_rows: int) -> nn.Module | None:
    """Mirror a linear layer with its weight packed for so many rows; None for all other modules."""
    # By the exact class: what others have made of a linear layer, such as a quantised one, multiplies by itself.
    is_linear, is_transposed = type(module) is nn.Linear, type(module) is Conv1D
    if not (is_linear or is_transposed) or module._forward_hooks or module._forward_pre_hooks:
        return None
    linear: Any = module
    weight, bias = linear.weight, linear.bias
    if not has_blocks(weight):
        return None
    made = mirror(module, PackedConv1D if is_transposed else PackedLinear)
    made.__dict__["multiply"] = product(
        weight.T if is_transposed else weight, num_rows=num_rows, bias=None if bias is None else bias.detach()
    )
    return made
