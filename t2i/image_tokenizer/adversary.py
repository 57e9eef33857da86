"""A discriminator for image tokenizers: it learns to tell images from reconstructions, which learn to pass for images.

Pixel losses alone are least where a doubtful edge is blurred. A discriminator sees blur at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8
MOST_SCALE = 1e4


class Discriminator(nn.Module):
    """Verdicts on patches: high where a patch looks like one of an image.

    Source: Isola et al. 2017, Image-to-image translation with conditional adversarial networks; with group norms, as
    batches are small.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for level, width in enumerate(channels):
            # The last level looks around without a coarser grid.
            stride = 1 if level + 1 == len(channels) else 2
            layers.append(nn.Conv2d(before, width, 4, stride=stride, padding=1))
            if level:
                layers.append(nn.GroupNorm(GROUPS, width))
            layers.append(nn.LeakyReLU(0.2))
            before = width
        layers.append(nn.Conv2d(before, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Judge pixels (B, 3, H, W): (B, 1, h, w)."""
        return self.layers(pixels)


@dataclass(frozen=True)
class Adversary:
    """A discriminator in training."""

    discriminator: Discriminator
    optimizer: torch.optim.Optimizer

    @classmethod
    def begin(cls, channels: tuple[int, ...], *, lr: float, device: torch.device) -> "Adversary":
        """Make one with random weights."""
        discriminator = Discriminator(channels).to(device)
        return cls(discriminator, torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.5, 0.9)))

    def loss(self, output: Tensor, *, reconstruction: Tensor, last: Tensor) -> Tensor:
        """Return the loss of reconstructions (B, 3, H, W) that do not pass, scaled to what pixels weigh.

        At the decoder's last weights it has a gradient as long as the reconstruction's, so that its weight means the
        same for every image size and set.

        Args:
            reconstruction: the loss of the same output by pixels.
            last: the decoder's last weights.

        Source: Esser et al. 2021, Taming transformers for high-resolution image synthesis, equation 7.
        """
        # Its own weights learn in `learn` alone.
        self.discriminator.requires_grad_(False)
        failed = -self.discriminator(output).mean()
        self.discriminator.requires_grad_(True)
        lengths = [
            torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, failed)
        ]
        scale = (lengths[0] / (lengths[1] + 1e-4)).clamp(max=MOST_SCALE)
        return scale.detach() * failed

    def learn(self, pixels: Tensor, output: Tensor) -> None:
        """Take a step towards telling images from reconstructions (B, 3, H, W), by the hinge loss."""
        real, made = self.discriminator(torch.cat([pixels, output.detach()])).chunk(2)
        loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs."""
        return {"weights": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was saved."""
        self.discriminator.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
