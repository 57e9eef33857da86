"""Every knob of a training run, with its unit; the defaults are the demo on the embedded pictures."""

from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Literal

ASSETS = Path(__file__).parent / "assets"
"""What the package carries: an image tokenizer and a text tokenizer for the embedded pictures."""

EMBEDDED_VIEWS = 8
"""PrepareConfig.views of the embedded pictures, which are only some 3,500."""

EMBEDDED_SHARDS = Path("data/openmoji64")
"""Where the embedded pictures' shards are made on first use."""


def _check_least(config: object, least: dict[str, int]) -> None:
    """Refuse numbers below the least that makes sense, by key."""
    wrong = [f"{key} is {getattr(config, key)}, wanted at least {few}" for key, few in least.items()
             if not getattr(config, key) >= few]  # fmt: skip
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")


@dataclass(frozen=True)
class SourceConfig:
    """What is read of a source, and which pairs are left out, each counted in the manifest by reason."""

    caption_key: str = ""
    """Column, json key or tar ending of the caption; empty for `txt` in tars, else `text` or `caption`."""
    image_key: str = ""
    """Column of the pictures in parquet and Hugging Face data sets; empty for their usual names."""
    pair_key: str = ""
    """Column or json key that names a pair, such as url: the first of a name is kept. Empty for its place."""
    hub_split: str = "train"
    """Split of a Hugging Face data set."""
    hub_subset: str = ""
    """Subset (configuration) of a Hugging Face data set; empty for its default."""
    min_side: int = 0
    """Pixels that the shorter side has at least."""
    max_aspect: float = 0.0
    """Longer side at most so many times the shorter; 0 for any."""
    min_caption: int = 1
    """Characters that a caption has at least."""
    max_caption: int = 0
    """Characters that a caption has at most; 0 for any."""
    score_key: str = ""
    """Column or json key of a score, such as aesthetic or similarity."""
    min_score: float | None = None
    """Smallest score that is kept, of score_key; None for any."""

    def __post_init__(self) -> None:
        _check_least(self, {"min_side": 0, "max_aspect": 0, "min_caption": 0, "max_caption": 0})
        if 0 < self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}, wanted 0 for any, or at least 1.")
        if 0 < self.max_caption < self.min_caption:
            raise ValueError(f"max_caption is {self.max_caption}, below min_caption {self.min_caption}.")
        if self.min_score is not None and isnan(self.min_score):
            raise ValueError("min_score is nan, wanted a number.")


@dataclass(frozen=True)
class PrepareConfig:
    """How shards are made."""

    image_size: int = 64
    """Pixels a side, after a centre crop (paper: 256)."""
    views: int = 1
    """Copies of each training picture: as it is, and shifted by up to a sixteenth of its side. Against overfitting."""
    batch_size: int = 32
    """Pictures encoded at a time."""
    unit_pairs: int = 512
    """Pairs of one resumable unit of work, which is also one shard file a split; a tar is always one."""
    max_broken: float = 0.1
    """Share of pictures that may be broken; with more, nothing is made. They are listed in broken.jsonl."""
    workers: int = 0
    """Processes a rank that read, crop and resize while the rank itself encodes; 0 for none."""

    def __post_init__(self) -> None:
        least = {"image_size": 1, "views": 1, "batch_size": 1, "unit_pairs": 1, "workers": 0, "max_broken": 0}
        _check_least(self, least)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    shards: Path = EMBEDDED_SHARDS
    """Folder made by launchers/prepare.py; the default is made on first use. With `remote`: the local cache."""
    remote: str = ""
    """Where the shards lie (s3://BUCKET/FOLDER, gs://, ...); they come to `shards` when needed. Empty: in `shards`."""
    cache_limit: str | None = None
    """Size that the cache of `remote` stays below, such as 100gb; None for any."""
    mode: Literal["text-to-image", "image-only", "text-only"] = "text-to-image"
    """What a sequence holds."""
    keep_every: int = 1
    """Train on every n-th sample of the shards alone, again and again: what less data would have given."""
    seq_len: int = 96
    """Tokens a sequence, padding included (paper: 1,152). A longer caption loses its end."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, which guidance needs (the paper is silent)."""
    text_mix: float = 0.0
    """Share of a step's sequences, so of its tokens with padding, that are text alone: against forgetting."""
    text_shards: Path | None = None
    """Where text_mix takes them: text shards of seq_len tokens a sequence, by the model's tokenizer. None for none."""
    num_workers: int = 0
    """Loader processes a rank; the order of samples does not depend on it."""
    num_canonical_nodes: int = 1
    """Streaming's canonical nodes: fixes the order of samples whatever the number of ranks."""

    def __post_init__(self) -> None:
        _check_least(self, {"seq_len": 1, "num_workers": 0, "num_canonical_nodes": 1})


@dataclass(frozen=True)
class ModelConfig:
    """What learns."""

    init: str = "random"
    """`random`, or a CKPT to start from: a run, a checkpoint of it, an exported or converted folder, a hub name."""
    rows: str = "random"
    """New embedding and head rows: `random`, `mean`, or a .safetensors file such as launchers/align.py makes."""
    scramble: Literal["none", "within-tensors", "moments", "layer-order"] = "none"
    """Destroy what model.init knows, as a control: shuffle each tensor, draw it anew with its moments, move layers."""
    learn: Literal["all", "embeddings", "norms", "first-half", "feed-forward"] = "all"
    """What learns (paper, Figure 6): all rows; these and norms; these two and the first half of layers, or all MLPs."""
    lora_rank: int = 0
    """Rank of adapters on every matrix of the layers: they and the new rows learn, nothing else. 0 for none."""
    family: Literal["open_lm", "llama", "qwen2", "gpt_neox"] = "open_lm"
    """Class of a random model; norm_type and qk_norm are open_lm's alone."""
    hidden_size: int = 192
    """Width of a random model."""
    num_layers: int = 6
    """Layers of a random model."""
    num_heads: int = 6
    """Attention heads of a random model."""
    norm_type: str = "default_layer_norm"
    """open_lm's name of the norm of a random model."""
    qk_norm: bool = False
    """Normalise queries and keys of a random model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


@dataclass(frozen=True)
class TrainConfig:
    """How it learns: AdamW, cosine after a linear warm-up."""

    max_steps: int = 1_600
    """Optimizer steps (paper: 100B tokens)."""
    global_batch_tokens: int = 3_072
    """Tokens a step over all ranks, padding included (paper: 1M), rounded to whole sequences."""
    lr: float = 1.5e-3
    """Peak learning rate (paper: 3e-4)."""
    new_rows_lr: float | None = None
    """Peak learning rate of the embedding and head rows that were added; None for that of all others."""
    warmup_steps: int = 50
    """Steps of linear warm-up (paper: 2,000)."""
    min_lr_ratio: float = 0.05
    """Last learning rate as a share of the peak."""
    beta1: float = 0.9
    """Adam's memory of gradients."""
    beta2: float = 0.95
    """Adam's memory of squared gradients."""
    l2_to_init: float = 0.0
    """Pull of what was there towards where it began, decoupled as decay is: a step moves it by lr times this share."""
    weight_decay: float = 0.1
    """Decay of matrices; norms have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    z_loss: float = 0.0
    """Weight of the squared log-partition, a token."""
    image_rows_only: bool = False
    """Learn image codes by a softmax over their own rows instead of all. Other mathematics: the image losses of such
    runs, held-out ones too, are less by what the choice of an image code costs, and compare with one another alone."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    save_every: int = 200
    """Steps between checkpoints; the last step always makes one, and with 0 it alone."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Steps between checkpoints that are kept for good; 0 for none."""
    eval_every: int = 200
    """Steps between held-out losses; 0 for never."""
    eval_pictures: int = 256
    """Held-out pictures, or sequences of text, of each split that are measured."""
    eval_text: str = ""
    """Text that forgetting is measured on, before the first step and every eval_every: text shards, a .txt file, a
    folder of them or a dataset's name. Empty for none."""
    sample_every: int = 0
    """Steps between grids of sampled pictures; 0 for never."""
    seed: int = 0
    """Seed of weights, sample order and caption dropout."""
    deterministic: bool = False
    """The same bits on every run of the same machine, on a GPU too; slower there."""
    spike: Literal["log", "skip", "rewind"] = "log"
    """At a jump of the loss: say so; leave the update out; or go back to the last checkpoint and past its data."""
    spike_score: float = 8.0
    """Deviations above the median of the last losses that make a jump."""
    hang_timeout_seconds: int = 1_800
    """Seconds without the end of a step after which a job ends, with all stacks in hang_rank*.txt; ten times that for a
    save or a measure. 0 for never."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run_dir: Path = Path("runs/train")
    """The run's folder; the same command again goes on there."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class AlignConfig:
    """How image rows are aligned to text rows."""

    num_pairs: int = 1_024
    """Pairs that a picture must find its caption among, over all ranks (paper: N = 1,024)."""
    max_steps: int = 300
    """Optimizer steps of Adam."""
    lr: float = 3e-3
    """Learning rate, constant."""
    temperature: float = 0.07
    """What similarities are divided by at the start; it learns."""
    save_every: int = 50
    """Steps between held-out retrieval and saves that the same command goes on from."""
    seed: int = 0
    """Seed of rows and sample order."""


@dataclass(frozen=True)
class AlignRun:
    """One alignment."""

    run_dir: Path
    """Where its rows and metrics go."""
    data: DataConfig
    """Captions are never dropped here, and sequences are text-to-image."""
    model: str
    """The language model."""
    align: AlignConfig = field(default_factory=AlignConfig)


@dataclass(frozen=True)
class PlanConfig:
    """What a plan is made for; the numbers about data count only where the shards are not made yet."""

    gpu: str = "a100-80gb"
    """a100-40gb, a100-80gb, h100-80gb, h200, b200, l40s, rtx4090, rtx3090; `cpu` measures this machine."""
    num_gpus: int = 1
    """GPUs, or processes on the CPU."""
    mfu: float = 0.4
    """Share of the peak that the model's own products reach without gradient checkpointing; a guess until measured."""
    price: float = 0.0
    """US dollars a GPU hour; 0 for no cost."""
    text_rows: int = 50_432
    """Rows of the language model's embedding (open_lm-1b's), unless model.init says."""
    codebook_size: int = 16_384
    """Image codes (paper sec. 2.1)."""
    codes_per_image: int = 1_024
    """Codes of a picture (paper sec. 2.1)."""
    num_pairs: int = 134_000_000
    """Captioned pictures to train on (paper sec. 2.1)."""
    caption_tokens: int = 30
    """Tokens of a caption on average (paper sec. 2.1)."""


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn from captions."""

    guidance_scale: float = 2.0
    """Classifier-free guidance; 1 for none."""
    temperature: float = 0.9
    """0 for the most likely code each time."""
    top_k: int = 50
    """Codes kept before a draw; 0 for all."""
    top_p: float = 1.0
    """Of those, the most likely that together reach this probability."""
    seed: int = 0
    """Picture i is drawn with seed + i."""
    compile: bool = False
    """Compile the step that draws a code, of open_lm's models alone: a minute before the first picture."""

    def __post_init__(self) -> None:
        keys = ("guidance_scale", "temperature", "top_k", "seed")
        wrong = [f"{key} {getattr(self, key)}" for key in keys if not 0 <= getattr(self, key) < 2**63]
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p {self.top_p}")
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: {', '.join(keys)} are at least 0 and below 2^63, top_p is in (0, 1]."
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """How the image tokenizer is built and trained."""

    image_size: int = 64
    """Pixels a side."""
    channels: tuple[int, ...] = (32, 32, 64, 96)
    """Channels of each resolution, finest first, multiples of 32; a code covers 2^(levels - 1) pixels."""
    latent_channels: int = 4
    """Numbers in a codebook vector (MoVQGAN: 4)."""
    codebook_size: int = 1_024
    """Number of codes."""
    layers_per_block: int = 1
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    max_steps: int = 9_000
    """Optimizer steps."""
    batch_size: int = 16
    """Pictures a step."""
    lr: float = 1e-3
    """Peak learning rate of Adam, reached after 100 steps, then cosine to a fiftieth."""
    continuous_share: float = 0.1
    """Share of the steps before the codebook comes in."""
    edge_weight: float = 1.0
    """Weight of the L1 loss of picture gradients, at full and half size, beside the L1 loss of pixels."""
    colour_weight: float = 4.0
    """Weight of the squared error, of pixels and of 8x8 patch means: L1 alone paints rare colours brown."""
    channel_swap_share: float = 0.3
    """Share of training pictures with permuted colour channels, so that rare colours are practised."""
    commitment_weight: float = 0.25
    """Weight of the squared distance of latents to their codes."""
    codebook_decay: float = 0.99
    """A step's memory in the averages that codes follow."""
    revive_every: int = 50
    """Steps between revivals of codes that are used less than 3% of the even share."""
    save_every: int = 500
    """Steps between saves that the same command goes on from."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_least(self, {"image_size": 1, "latent_channels": 1, "codebook_size": 2, "layers_per_block": 1})
        _check_least(
            self, {"max_steps": 1, "batch_size": 1, "lr": 0, "revive_every": 1, "save_every": 1, "seed": 0}
        )
