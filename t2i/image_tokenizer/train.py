"""Train a small MoVQ image tokenizer on your own images: diffusers' VQModel with spatial norms.

The autoencoder is first trained without a codebook. K-means on its latents then makes the first codebook. From there
on, codes are exponential averages of their latents, and unused codes are moved onto latents. One that is there already
can be trained further (start.py), and a discriminator can join the losses (adversary.py).
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor, nn
from tqdm import tqdm

from t2i.config import TokenizerConfig
from t2i.distributed.signals import stop_flag
from t2i.errors import NumericalError, Stopped, UserError
from t2i.files import hash_uniform, whole_file
from t2i.image_tokenizer.adversary import Adversary
from t2i.image_tokenizer.alignment import Alignment, Target
from t2i.image_tokenizer.codebook import Codebook, kmeans
from t2i.image_tokenizer.start import Start
from t2i.tokens.image import pixels_of

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""Pixels (B, 3, H, W), and the numbers of the images (B,)."""
STATE_FILE = "training_state.pt"
KMEANS_LATENTS = 65_536
LATENTS_PER_CODE = 4
"""At the least, where the codes are many."""


def build_vq_model(config: TokenizerConfig) -> VQModel:
    """Make a randomly initialised VQModel of MoVQGAN's family, with attention at the coarsest resolution only."""
    levels = len(config.channels)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        vq_embed_dim=config.latent_channels,
        num_vq_embeddings=config.codebook_size,
        norm_num_groups=32,
        norm_type="spatial",
        lookup_from_codebook=True,
        sample_size=config.image_size,
    )


@dataclass(frozen=True)
class Training:
    """What a training changes, and what a saved state must have been started with."""

    config: TokenizerConfig
    images: str
    """Hash of the training images."""
    aligned_with: str
    """What the alignment is to, in hashes of captions and encoder; empty without one."""
    begun_with: str
    """Fingerprint of the image tokenizer that it began with; empty where its weights were random."""
    trained: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    codebook: Codebook
    generator: torch.Generator
    adversary: Adversary | None

    def save(self, path: Path, *, step: int) -> None:
        """Write all of it; `step` is the next one."""
        state = {
            "config": asdict(self.config),
            "images": self.images,
            "aligned_with": self.aligned_with,
            "begun_with": self.begun_with,
            "step": step,
            **{name: module.state_dict() for name, module in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "counts": self.codebook.counts,
            "sums": self.codebook.sums,
            "generator": self.generator.get_state(),
            **({"adversary": self.adversary.state_dict()} if self.adversary is not None else {}),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # A kill leaves the old state or the new one.
        with whole_file(path) as written:
            torch.save(state, written)

    def restore(self, path: Path) -> int:
        """Load a saved state if there is one, and return the step to resume from."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)  # a generator's state stays there
        changed = _changed(state, self.config, begun_with=self.begun_with)
        # Of another share too: images that were held out would be trained on.
        for what in ("images", "aligned_with"):
            changed += [what] if state.get(what, getattr(self, what)) != getattr(self, what) else []
        _refuse_changed(changed, folder=path.parent)
        # One without alignment is the model's alone, as it always was.
        for name, module in self.trained.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.codebook.counts.copy_(state["counts"])
        self.codebook.sums.copy_(state["sums"])
        self.generator.set_state(state["generator"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        logger.info("resuming from step %d of %d", state["step"], self.config.max_steps)
        return int(state["step"])


def check_settings(path: Path, *, config: TokenizerConfig, begun_with: str) -> None:
    """Check that a saved state, if there is one, was started with these settings.

    Args:
        begun_with: fingerprint of the image tokenizer that it begins with, or empty.

    Raises:
        UserError: it was not.
    """
    if path.exists():
        # Mapped: only the settings are read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _refuse_changed(_changed(state, config, begun_with=begun_with), folder=path.parent)


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete settings that were written before some were there, to be compared; tuples are lists, as in JSON.

    init_from is left out: what it names is known by its weights.
    """
    default = asdict(TokenizerConfig())
    del default["init_from"]
    whole = {key: settings.get(key, value) for key, value in default.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in whole.items()}


def _changed(state: Mapping[str, Any], config: TokenizerConfig, *, begun_with: str) -> list[str]:
    begun, asked = with_defaults(state["config"]), with_defaults(asdict(config))
    changed = [key for key, value in asked.items() if begun[key] != value]
    return changed + (["init_from"] if state.get("begun_with", "") != begun_with else [])


def _refuse_changed(changed: list[str], *, folder: Path) -> None:
    if changed:
        raise UserError(
            f"{folder} was started with other settings ({', '.join(changed)}); choose another --out."
        )


def reconstruction_loss(
    output: Tensor, pixels: Tensor, *, edge_weight: float, colour_weight: float
) -> Tensor:
    """Compare images (B, 3, H, W) by absolute error, its gradients at two sizes, and squared error at two sizes."""
    difference = output - pixels
    edges = _gradients(difference) + _gradients(F.avg_pool2d(difference, 2))
    # Without squared terms rare colours, such as purple and orange, come out brown.
    colours = difference.square().mean() + F.avg_pool2d(difference, 8).square().mean()
    return difference.abs().mean() + edge_weight * edges + colour_weight * colours


def train_image_tokenizer(
    images: np.ndarray,
    *,
    config: TokenizerConfig,
    out: Path,
    start: Start | None = None,
    target: Target | None = None,
    aligned_with: str = "",
) -> VQModel:
    """Train on uint8 images (N, H, W, 3), with their mirror images, and return the model.

    The state is saved in `out` from time to time, and on SIGTERM or Ctrl-C; training resumes from it.

    Args:
        start: what config.init_from names, which is trained itself; None for random weights.
        target: what the codes are aligned to; None for no alignment.
        aligned_with: what that is made of, which a training that is resumed must have again.

    Raises:
        UserError: `out` holds the state of a training with other settings or images.
        NumericalError: a loss is not finite.
        Stopped: a signal asked for it, and all is saved.
    """
    torch.manual_seed(config.seed)
    # On the CPU whatever computes, so that every device sees the same images in the same order.
    generator = torch.Generator().manual_seed(config.seed)
    if bool(config.init_from) != (start is not None):
        raise ValueError(f"init_from is {config.init_from!r}, and start is {start}.")
    begun_with = "" if start is None else start.fingerprint
    model = build_vq_model(config) if start is None else start.tokenizer.model.requires_grad_(True).train()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    trained = nn.ModuleDict({"model": model})
    if target is not None:
        trained["alignment"] = Alignment(target, latent_channels=config.latent_channels).to(model.device)
    optimizer = torch.optim.Adam(trained.parameters(), lr=config.lr, betas=(0.9, 0.99))
    weight = model.quantize.embedding.weight.requires_grad_(False)
    codebook = Codebook(weight, decay=config.codebook_decay)
    if start is not None:
        # As if each had been chosen evenly so far: with less behind them, codes would jump onto the first batch.
        codebook.count_as(config.batch_size * start.tokenizer.num_codes(config.image_size) / len(weight))
    adversary = None
    if config.adversarial_weight:
        adversary = Adversary.begin(config.discriminator_channels, lr=config.lr, device=model.device)
    seen = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    training = Training(
        config, seen, aligned_with, begun_with, trained, optimizer, codebook, generator, adversary
    )
    first_step = training.restore(out / STATE_FILE)
    num_continuous, num_unopposed = (
        min(round(config.max_steps * share), config.max_steps - 1)
        for share in (config.continuous_share, config.adversarial_after_share)
    )
    batches = ((pixels.to(model.device), picks) for pixels, picks in _batches(images, config, generator))
    bar = tqdm(range(first_step, config.max_steps), initial=first_step, total=config.max_steps, unit="step")
    with stop_flag() as flag:
        flag.begin()
        for step in bar:
            if step == num_continuous and start is None:
                _start_codebook(model, codebook, batches, generator)
            _set_lr(optimizer, config, step)
            batch = next(batches)
            opposed = adversary if step >= num_unopposed else None
            loss, latents, output = _step_loss(
                trained, batch, codebook if step >= num_continuous else None, opposed, config
            )
            if not torch.isfinite(loss):
                raise NumericalError(
                    f"The loss of step {step} is {loss.item()}. A smaller --lr, or smaller weights, may help."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            if opposed is not None:
                _set_lr(opposed.optimizer, config, step)
                opposed.learn(batch[0], output)
            # Not in the last tenth: a revived code needs steps until the decoder knows it.
            if (
                step >= num_continuous
                and (step + 1) % config.revive_every == 0
                and step < 0.9 * config.max_steps
            ):
                # By a generator of this step's own: how many codes are dead depends on the training, and drawn from the
                # other one it would decide which images come next, which trainings of one seed have in common.
                codebook.revive(latents, generator=_revival_generator(config.seed, step))
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            is_due = (step + 1) % config.save_every == 0 or step + 1 == config.max_steps
            if is_due or flag.is_set():
                training.save(out / STATE_FILE, step=step + 1)
            if flag.is_set():
                raise Stopped(
                    f"Stopped and saved after step {step + 1} of {config.max_steps}. Run the same command to resume."
                )
    return model


def _revival_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(hash_uniform("revive", seed, step) * 2**53))


def _step_loss(
    trained: nn.ModuleDict,
    batch: Batch,
    codebook: Codebook | None,
    adversary: Adversary | None,
    config: TokenizerConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of one batch, its latents (M, C) and its reconstructions (B, 3, H, W).

    Without a codebook latents are not quantised.
    """
    (pixels, picks), model = batch, cast(VQModel, trained["model"])
    latents = model.encode(pixels).latents  # (B, C, h, w)
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (M, C)
    quantised, commitment = latents, pixels.new_zeros(())
    if codebook is not None:
        codes = codebook.nearest(flat.detach())
        codebook.follow(flat.detach(), codes)
        chosen = (
            codebook.weight[codes].unflatten(0, latents.permute(0, 2, 3, 1).shape[:3]).permute(0, 3, 1, 2)
        )
        commitment = F.mse_loss(latents, chosen)
        # Straight-through: the decoder sees the codes, and the encoder gets the decoder's gradient.
        quantised = latents + (chosen - latents).detach()
    output = model.decoder(
        model.post_quant_conv(quantised), quantised if model.config.norm_type == "spatial" else None
    )
    loss = reconstruction_loss(
        output, pixels, edge_weight=config.edge_weight, colour_weight=config.colour_weight
    )
    if adversary is not None:
        last = model.decoder.conv_out.weight
        opposition = adversary.loss(output, reconstruction=loss, last=last)
        loss = loss + config.adversarial_weight * opposition
    # Not computed where it weighs nothing, as an encoder may cost more than the step.
    if "alignment" in trained and config.align_weight:
        loss = loss + config.align_weight * trained["alignment"](quantised, pixels, picks)
    return loss + config.commitment_weight * commitment, flat.detach(), output


def _gradients(pixels: Tensor) -> Tensor:
    return pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()


def _batches(images: np.ndarray, config: TokenizerConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Draw random batches without end, half of the images mirrored, some recoloured."""
    size = (config.batch_size, 1, 1, 1)
    while True:
        picks = torch.randint(len(images), size[:1], generator=generator)
        pixels = pixels_of(torch.from_numpy(images[picks.numpy()]))
        mirrored = torch.rand(size, generator=generator) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        # Channels are swapped so that rare colours are seen as often as others.
        recoloured = torch.rand(size, generator=generator) < config.channel_swap_share
        yield torch.where(recoloured, pixels[:, torch.randperm(3, generator=generator)], pixels), picks


@torch.no_grad()
def _start_codebook(
    model: VQModel, codebook: Codebook, batches: Iterator[Batch], generator: torch.Generator
) -> None:
    # From batches as training draws them, so that the codes also cover mirrored and recoloured images.
    latents: list[Tensor] = []
    wanted = max(KMEANS_LATENTS, LATENTS_PER_CODE * len(codebook.weight))
    while sum(map(len, latents)) < wanted:
        latents.append(model.encode(next(batches)[0]).latents.permute(0, 2, 3, 1).flatten(0, 2))
    centres = kmeans(torch.cat(latents), num_centres=len(codebook.weight), generator=generator)
    codebook.weight.copy_(centres)
    codebook.sums.copy_(centres)
    codebook.counts.fill_(1.0)


def _set_lr(optimizer: torch.optim.Optimizer, config: TokenizerConfig, step: int) -> None:
    warm_up = min(1.0, (step + 1) / 100)
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * warm_up * cosine
