"""A frozen network with its name, and what distances on its features are called."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network, with what a result file says about it."""

    name: str
    dims: int
    resize: str
    """clean: PIL bicubic in float, never rounded; legacy_tensorflow: in the network, with aliasing."""
    weights_sha256: str
    resizer: Callable[[np.ndarray], np.ndarray]
    """uint8 image (H, W, 3) -> the network's size, in [0, 255]."""
    network: Callable[[Tensor], Tensor]
    """float32 pixels (B, 3, H, W) in [0, 255] -> features (B, dims)."""
    device: torch.device
    preprocessing: str = ""
    """Hash of what a folder says of its network beside the weights: size, scale and description; empty for others."""


def metric_key(name: str) -> str:
    """Name the Frechet distance on these features: `fid` on Inception's only, else `fd_` and the features."""
    return "fid" if name == "inception" else f"fd_{name}"


def kernel_key(name: str) -> str:
    """Name the kernel distance on these features: `kid` on Inception's only, else `kd_` and the features."""
    return "kid" if name == "inception" else f"kd_{name}"


def sliced_key(name: str) -> str:
    """Name MIND on these features: `mind` on Inception's only, else `mind_` and the features."""
    return "mind" if name == "inception" else f"mind_{name}"
