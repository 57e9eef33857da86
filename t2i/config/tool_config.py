"""Settings of the tools around a run: alignment, plans, sampling, and training an image tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

from t2i.config.run_config import DataConfig, Mode
from t2i.errors import UserError
from t2i.settings import MAY_CHANGE, OR_ZERO, check_values

Dtype = Literal["auto", "float32", "bfloat16"]
"""Of a model that is opened to draw or to measure; auto as it is stored on a GPU, and float32 on a CPU."""
Gpu = Literal[
    "a100-40gb",
    "a100-80gb",
    "h100-80gb",
    "h100-pcie",
    "h100-nvl",
    "h200",
    "b200",
    "l40s",
    "rtx4090",
    "rtx3090",
    "cpu",
]


@dataclass(frozen=True)
class AlignConfig:
    """Contrastive alignment of image embeddings to text embeddings (paper, Figure 7)."""

    num_pairs: Annotated[int, Ge(1), Le(1_000_000_000)] = 1_024
    """Pairs per step over all ranks, among which each image has to find its caption (paper: N = 1,024)."""
    max_steps: Annotated[int, Ge(1)] = 300
    """Optimizer steps of Adam."""
    lr: Annotated[float, Ge(0)] = 3e-3
    """Constant learning rate."""
    # CLIP's own initial value.
    temperature: Annotated[float, Gt(0), Le(1_000)] = 0.07
    """Initial temperature that similarities are divided by; it is trained."""
    save_every: Annotated[int, Ge(1)] = 50
    """Steps between saves to resume from; held-out retrieval is measured at each."""
    placement: Literal["uniform", "zero"] = "uniform"
    """Where the aligned embeddings lie. `uniform`: around the mean of those of text, so that an image code costs what a
    uniform guess does. `zero`: around zero."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the initial embeddings and the sample order."""

    def __post_init__(self) -> None:
        check_values(self, group="align")


@dataclass(frozen=True)
class AlignRun:
    """One alignment."""

    run_dir: Annotated[Path, MAY_CHANGE]
    """Folder for the aligned embeddings and metrics."""
    data: DataConfig
    """Captions are never dropped here, no text is replayed, and sequences are text-to-image."""
    model: str
    """The language model, a CKPT."""
    trust_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Run the Python code that the model's folder brings for its class."""
    align: AlignConfig = field(default_factory=AlignConfig)


@dataclass(frozen=True)
class PlanConfig:
    """The hardware and the data of a plan. Settings about data are used only until the shards are made."""

    gpu: Gpu = "a100-80gb"
    """Kind of GPU; `cpu` measures this machine."""
    # The paper's sizes are the defaults here: a plan is mostly asked before any data is there.
    num_gpus: Annotated[int, Ge(1), Le(1_000_000)] = 1
    """GPUs, or processes on the CPU."""
    mfu: Annotated[float, Gt(0), Le(1)] = 0.4
    """Model FLOPs utilisation without gradient checkpointing, as a share of the peak; a guess until it is measured."""
    price: Annotated[float, Ge(0), Le(1_000_000)] = 0.0
    """US dollars per GPU-hour; 0 for no cost."""
    text_vocab_size: Annotated[int, Ge(1), Le(1_000_000_000)] = 50_432
    """Size of the text vocabulary (open_lm-1b's), unless model.init or shards that are there give it."""
    codebook_size: Annotated[int, Ge(1), Le(1_000_000_000)] = 16_384
    """Image codes (paper sec. 2.1), while no shards are there."""
    codes_per_image: Annotated[int, Ge(1), Le(1_000_000_000)] = 1_024
    """Codes per image (paper sec. 2.1), while no shards are there."""
    num_pairs: Annotated[int, Ge(1)] = 134_000_000
    """Captioned images to train on (paper sec. 2.1), while no shards are there."""
    caption_tokens: Annotated[int, Ge(1), Le(1_000_000_000)] = 30
    """Mean tokens per caption (paper sec. 2.1), while no shards are there."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class SamplerConfig:
    """How the codes of an image are sampled, whatever its seed."""

    # The range keeps what it multiplies finite in 32 bits. What is useful is far below, and said.
    guidance_scale: Annotated[float, Ge(0), Le(1_000)] = 2.0
    """Scale of classifier-free guidance; 1 for none. Useful are 1.5 to 4; the 6 to 8 of diffusion models ruin images
    here."""
    # Logits of some hundreds, divided by less, would leave the range of 32 bits.
    temperature: Annotated[float, Ge(0.001), Le(1_000), OR_ZERO] = 0.9
    """Sampling temperature; 0 for the most likely code each time."""
    top_k: Annotated[int, Ge(0)] = 50
    """Sample from the k most likely codes; 0 for all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Of those, keep the most likely codes that together reach this probability."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """How images are sampled from captions."""

    # By image and not by batch or rank: any number of processes samples the same images.
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the first image; image i is sampled with seed + i."""
    best_of: Annotated[int, Ge(1), Le(1_000)] = 1
    """Images drawn per caption, of which the one that fits it best is kept. Candidate j of n captions is sampled with
    seed + i + j n."""
    best_by: Literal["likelihood", "judge"] = "likelihood"
    """What fits: likelihood, by how much likelier the model finds the codes under the caption than under the null
    caption; judge, by the judge of --judge-url."""
    # Off by default: it pays only over many images.
    compile: bool = False
    """Compile the decoding step, which takes a minute or more before the first image."""
    # Wider windows keep hardly more codes per pass, and cost attention over so many places more.
    window: Annotated[int | Literal["auto"], Ge(1), Le(64)] = "auto"
    """Codes per pass: the next ones are guessed and checked together, and the image is that of one code per pass. auto:
    measured while drawing; 1 where more do not pay, with --compile, and in 16 bits, where rounding would decide."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.best_by == "judge" and self.best_of == 1:
            raise UserError(
                "--best-by judge chooses among several images; --best-of is 1, expected a number >= 2."
            )
        if self.compile and self.window not in ("auto", 1):
            raise UserError(
                f"--window is {self.window}; expected 1 or auto with --compile, whose step has one code per pass."
            )


@dataclass(frozen=True)
class HeldoutData:
    """The held-out data that a model is measured on."""

    shards: Path | None = None
    """Shard folder. Default: the run's own."""
    mode: Mode | None = None
    """Form of the sequences. Default: that of the model's training, else text-to-image."""

    def __post_init__(self) -> None:
        check_values(self, group="data")


@dataclass(frozen=True)
class TokenizerConfig:
    """How an image tokenizer is built and trained."""

    # Structural similarity looks through a window of 11 pixels.
    image_size: Annotated[int, Ge(16), Le(16_384)] = 64
    """Pixels per side, a multiple of what a code covers."""
    init_from: str = ""
    """Folder of a VQModel whose weights and codebook the training begins with, to fine-tune it on your own images. Its
    channels, layers_per_block, latent_channels and codebook_size are taken over. Optimizer and schedule begin anew: a
    smaller lr, such as 1e-4, keeps more of it. Empty for random weights."""
    # Four levels: 64 pixels per side become 8 x 8 codes.
    channels: tuple[Annotated[int, Ge(32), Le(1_000_000), MultipleOf(32)], ...] = (32, 32, 64, 96)
    """Channels per resolution, finest first. A code covers 2^(levels - 1) pixels per side. Spatial norms need multiples
    of 32."""
    latent_channels: Annotated[int, Ge(1), Le(1_000_000)] = 4
    """Width of a codebook vector (MoVQGAN: 4)."""
    # No more than the latents that k-means makes the first codebook from.
    codebook_size: Annotated[int, Ge(2), Le(65_536)] = 1_024
    """Number of codes."""
    layers_per_block: Annotated[int, Ge(1), Le(1_000)] = 1
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    max_steps: Annotated[int, Ge(1)] = 9_000
    """Optimizer steps."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 16
    """Images per step."""
    lr: Annotated[float, Ge(0)] = 1e-3
    """Peak learning rate of Adam, reached after 100 steps, then cosine to a fiftieth."""
    # k-means on the latents of an autoencoder that is trained already gives a codebook that is used.
    continuous_share: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the steps that train the autoencoder before the codebook is used; the last step always uses it. None
    with init_from, which brings its codebook."""
    edge_weight: Annotated[float, Ge(0)] = 1.0
    """Weight of the L1 loss of image gradients, at full and half size, beside the L1 loss of pixels."""
    colour_weight: Annotated[float, Ge(0)] = 4.0
    """Weight of the squared error, of pixels and of 8x8 patch means: L1 alone paints rare colours brown."""
    channel_swap_share: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of training images with permuted colour channels, so that rare colours are trained."""
    commitment_weight: Annotated[float, Ge(0)] = 0.25
    """Weight of the squared distance of latents to their codes."""
    align_to: str = ""
    """What codes are aligned to: the captions, by a folder of a sentence encoder (such as all-MiniLM-L6-v2), or what a
    vision encoder sees where a code is, by the folder of one (CLIP, SigLIP, DINOv2) or efficientnet_lite0, which is
    installed. Empty for no alignment. Captions are told apart within a batch: batch_size 64 aligns better than 16."""
    align_weight: Annotated[float, Ge(0)] = 0.5
    """Weight of the alignment loss. More meaning costs fidelity: compare PSNR with that of 0."""
    adversarial_weight: Annotated[float, Ge(0)] = 0.0
    """Weight of a discriminator that learns to tell images from reconstructions, as by blurred edges. Of 1, it
    changes the decoder's last weights as much as the pixels do. 0 for none; VQGAN's is 0.8."""
    adversarial_after_share: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of the steps before the discriminator begins: early images are too blurred to pass."""
    discriminator_channels: tuple[Annotated[int, Ge(8), Le(1_000_000), MultipleOf(8)], ...] = (32, 64, 128)
    """Channels per level of the discriminator. Each but the last halves the size; of three, a verdict is on 34 x 34
    pixels."""
    codebook_decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay rate of the moving averages of latents that codes follow."""
    revive_every: Annotated[int, Ge(1)] = 50
    """Steps between revivals of codes that are used less than 3% as often as the average code."""
    save_every: Annotated[int, Ge(1)] = 500
    """Steps between saves to resume from."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of weights, batches and revivals."""

    def __post_init__(self) -> None:
        check_values(self)
        if not self.channels:
            raise UserError("--channels is empty; expected a number per resolution.")
        if not self.discriminator_channels:
            raise UserError("--discriminator-channels is empty; expected a number per level.")
        least = 3 * 2 ** (len(self.discriminator_channels) - 1)
        if self.adversarial_weight and self.image_size < least:
            raise UserError(
                f"--discriminator-channels has {len(self.discriminator_channels)} levels, which need images of {least}"
                f" pixels per side; --image-size is {self.image_size}."
            )
        if self.init_from and self.continuous_share not in (0.0, type(self).continuous_share):
            raise UserError(
                f"--continuous-share is {self.continuous_share}: it is for a codebook that is made anew, and"
                " --init-from brings one. Leave it out."
            )
        covered = 2 ** (len(self.channels) - 1)
        # What init_from names has a shape of its own.
        if not self.init_from and self.image_size % covered:
            raise UserError(
                f"--image-size is {self.image_size}; expected a multiple of {covered}, the pixels per side of a code"
                f" with {len(self.channels)} --channels."
            )
