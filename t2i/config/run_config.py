"""Every setting of a training run; the defaults train a small model on the embedded images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from t2i.errors import UserError
from t2i.settings import MAY_CHANGE, FormerDefault, Names, check_values

EMBEDDED_SHARDS = Path("data/openmoji64")
"""Where the shards of the embedded images are made on first use."""

Mode = Literal["text-to-image", "image-only", "text-only"]
Trainable = Literal["all", "embeddings", "norms", "first-half", "feed-forward"]
OptimizerName = Literal["adamw", "muon"]
ControlInit = Literal["none", "fresh", "within-tensors", "moments", "layer-order"]
ImageWeights = Literal["none", "feed-forward", "all", "lora"]
Family = Literal["open_lm", "llama", "qwen2", "gpt_neox"]
NormType = Literal[
    "default_layer_norm",
    "lp_layer_norm",
    "gain_only_layer_norm",
    "gain_only_lp_layer_norm",
    "no_wb_layer_norm",
    "rms_norm",
]


@dataclass(frozen=True)
class DataConfig:
    """Training data."""

    shards: Path = EMBEDDED_SHARDS
    """Folder made by launchers/prepare.py; the default is made on first use. With `remote`: the local cache."""
    remote: str = ""
    """URL of the shards (s3://BUCKET/FOLDER, gs://, ...), which are downloaded to `shards` as needed. Empty: they are
    in `shards` already."""
    cache_limit: Annotated[str | None, MAY_CHANGE] = None
    """Maximum size of the local cache of `remote`, such as 100gb; None for no limit."""
    mode: Mode = "text-to-image"
    """What a sequence contains: a caption and its image, an image only, or text only."""
    # Not Streaming's own subsampling, which draws another subset in each epoch.
    subsample_every: Annotated[int, Ge(1)] = 1
    """Keep only every n-th training sample (data-size ablation)."""
    # The embedded images have 64 codes and 6 markers, which leaves 26 tokens for the caption.
    seq_len: Annotated[int, Ge(1), Le(1_000_000)] = 96
    """Tokens per sequence, including padding; longer captions are truncated (paper: 1,152)."""
    # Guidance leads away from what the model does at the null caption, which it must have been trained on.
    caption_dropout: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of captions replaced by the null caption, for classifier-free guidance (not given in the paper)."""
    # A share of the sequences of every step, not of all steps: the losses of two steps then compare.
    replay_ratio: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Replay ratio: share of each step's sequences that are text only, against forgetting."""
    replay_shards: Path | None = None
    """Text shards for replay_ratio, of seq_len tokens per sequence, made with the model's text tokenizer."""
    num_workers: Annotated[int, Ge(0), Le(1_000), MAY_CHANGE] = 0
    """Loader processes per rank; the order of samples does not depend on it."""
    num_canonical_nodes: Annotated[int, Ge(1), Le(10_000)] = 1
    """Parts of the data that Streaming shuffles separately, whatever the number of ranks. With `remote` on several
    nodes, set it to their number: each node then downloads its own part only."""

    def __post_init__(self) -> None:
        check_values(self, group="data")
        if self.cache_limit and not self.remote:
            # A shard that left the cache could not be downloaded again.
            raise UserError(
                f"data.cache_limit is {self.cache_limit}; expected None while data.remote is empty."
            )
        if bool(self.replay_ratio) != (self.replay_shards is not None):
            raise UserError(
                f"data.replay_ratio is {self.replay_ratio} and data.replay_shards {self.replay_shards}; one needs the"
                " other."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The model, and which of its parameters are trained."""

    init: str = "random"
    """`random`, or a CKPT to start from: a run, one of its checkpoints, an exported or converted folder,
    or hf:USER/NAME of the Hugging Face hub."""
    # Never read from a model's own folder, which could otherwise give itself the permission.
    trust_remote_code: Annotated[bool, MAY_CHANGE] = False
    """Run the Python code that the folder of model.init brings for its class. Read it first: it can do all that you
    can."""
    new_embeddings: Annotated[
        str,
        Names(("auto", "uniform", "mean", "own", "random", "codebook", "captions"), suffix=".safetensors"),
        FormerDefault("random"),
    ] = "auto"
    """Initial embeddings and LM head of the image vocabulary. `uniform`: where an image code costs what a uniform guess
    over the vocabulary does. `mean`: at the mean of those of text. `own`: drawn with the mean and deviation of those.
    `random`: drawn around zero, by open_lm's rule. `codebook`: as uniform, with codes apart as their vectors in the
    image tokenizer are. `captions`: as uniform, with codes apart by the words in captions of images that have them. Or
    a .safetensors file such as launchers/align.py makes. `auto`: codebook; where the shards hold precomputed tokens
    without their image tokenizer, uniform, or random with init random."""
    control_init: ControlInit = "none"
    """Control initialisation, which destroys what model.init knows. `fresh`: the same architecture from scratch, drawn
    by its class's own rule. Or shuffle each tensor, redraw it with its moments, or permute the layers."""
    init_std: Annotated[float | None, Gt(0), Le(10)] = None
    """Deviation of the weights that control_init fresh draws, for classes with an initializer_range. None: the one in
    config.json, where a converted model may have transformers' default and not its own."""
    trainable: Trainable = "all"
    """Trainable parameters (paper, Figure 6): all; the embeddings and LM head; these and the norms; these two and the
    first half of the layers, or the feed-forward part of every layer."""
    lora_rank: Annotated[int, Ge(0), Le(1_000_000)] = 0
    """Rank of LoRA adapters on every matrix of the layers; only they and the new embeddings are trained. 0 for none."""
    image_weights: ImageWeights = "none"
    """Weights of their own for image positions: a copy of every layer's feed-forward part; of every matrix and norm; or
    a LoRA of lora_rank. The language model is frozen, so text logits stay bit for bit what they were. Attention is
    shared."""
    family: Family = "open_lm"
    """Architecture of a randomly initialised model; norm_type and qk_norm are for open_lm only."""
    # The defaults are of the demo, which trains on two CPU cores.
    hidden_size: Annotated[int, Ge(1), Le(1_000_000)] = 192
    """Width of a randomly initialised model (open_lm-1b: 2,048)."""
    num_layers: Annotated[int, Ge(1), Le(10_000)] = 6
    """Layers of a randomly initialised model (open_lm-1b: 24)."""
    num_heads: Annotated[int, Ge(1), Le(10_000)] = 6
    """Attention heads of a randomly initialised model (open_lm-1b: 16)."""
    norm_type: NormType = "default_layer_norm"
    """Norm of a randomly initialised model, by open_lm's names."""
    qk_norm: bool = False
    """Normalise queries and keys of a randomly initialised model."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass, which saves memory and takes a third more time."""

    def __post_init__(self) -> None:
        check_values(self, group="model")
        if self.init_std is not None and self.control_init != "fresh":
            raise UserError(f"model.init_std is {self.init_std}; expected None unless control_init is fresh.")
        if self.control_init != "none" and self.init == "random":
            raise UserError(f"model.control_init is {self.control_init}, but model.init is random.")
        if self.image_weights != "none":
            self._check_image_weights()
        if self.lora_rank and self.trainable != "all":
            # Adapters say themselves what is trained, so a second answer could only contradict.
            raise UserError(
                f"model.trainable is {self.trainable}; expected all with model.lora_rank {self.lora_rank}, which trains"
                " adapters and new embeddings only."
            )

    def _check_image_weights(self) -> None:
        kind = self.image_weights
        if self.init == "random" or self.control_init != "none":
            raise UserError(
                f"model.image_weights is {kind}, which keeps a language model as it is; expected model.init to name"
                " one, and model.control_init none."
            )
        if self.trainable != "all":
            raise UserError(
                f"model.trainable is {self.trainable}; expected all with model.image_weights {kind}, which says itself"
                " what is trained."
            )
        if (kind == "lora") != (self.lora_rank > 0):
            raise UserError(
                f"model.image_weights is {kind} and model.lora_rank {self.lora_rank}; expected a rank with lora, and 0"
                " with the others."
            )


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class TrainConfig:
    """Optimization: AdamW or Muon, with a linear warm-up and a cosine schedule."""

    max_steps: Annotated[int, Ge(1), MAY_CHANGE] = 1_600
    """Optimizer steps (paper: 100B tokens). Another number on resume moves the end of the cosine schedule."""
    global_batch_tokens: Annotated[int, Ge(1), Le(1_000_000_000)] = 3_072
    """Tokens per step over all ranks, including padding (paper: 1M), rounded to whole sequences."""
    optimizer: OptimizerName = "adamw"
    """What turns gradients into updates: AdamW; or Muon for the matrices of the layers, with AdamW for all else.
    train.lr and train.weight_decay then hold for both."""
    lr: Annotated[float, Ge(0)] = 1.5e-3
    """Peak learning rate (paper: 3e-4)."""
    new_embeddings_lr: Annotated[float | None, Ge(0)] = None
    """Peak learning rate of the embeddings and LM head of the image vocabulary; None for train.lr."""
    warmup_steps: Annotated[int, Ge(0)] = 50
    """Steps of linear warm-up (paper: 2,000)."""
    min_lr_ratio: Annotated[float, Ge(0), Le(1)] = 0.05
    """Final learning rate, as a share of the peak."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Adam's decay rate of the first moment."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Adam's decay rate of the second moment."""
    l2_sp: Annotated[float, Ge(0), Le(1_000_000)] = 0.0
    """L2-SP: decoupled decay of pre-trained weights towards their start. A step moves them by lr times this share."""
    weight_decay: Annotated[float, Ge(0), Le(1_000)] = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Maximum norm of the gradient; a larger one is scaled down to it. 0 for no limit."""
    # 0: metrics.jsonl has the squared log-partition all the same, which shows whether a run needs the term.
    z_loss: Annotated[float, Ge(0), Le(1_000)] = 0.0
    """Weight of the z-loss, which is the squared log-partition per token."""
    image_vocab_only: bool = False
    """Predict image codes by a softmax over the image vocabulary only. The image losses of such a run, held-out ones
    too, leave out the cost of choosing an image code rather than text. Compare them with one another only."""
    log_every: Annotated[int, Ge(1), MAY_CHANGE] = 1
    """Steps between rows of metrics.jsonl. The last step and those that are measured have a row in any case."""
    # Training waits for a save: its time is traded for the steps that a crash would lose.
    save_every: Annotated[int, Ge(0), MAY_CHANGE] = 200
    """Steps between checkpoints. The last step is always saved; 0 saves only the last."""
    # Two, so that a checkpoint which turns out to be damaged has one before it.
    keep_last: Annotated[int, Ge(1), MAY_CHANGE] = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Annotated[int, Ge(0), MAY_CHANGE] = 0
    """Steps between checkpoints that are never deleted; 0 for none."""
    eval_every: Annotated[int, Ge(0), MAY_CHANGE] = 200
    """Steps between measurements of the held-out losses; 0 for never."""
    eval_images: Annotated[int, Ge(1), MAY_CHANGE] = 256
    """Number of held-out images, or of text sequences, that are measured per split."""
    eval_text: Annotated[str, MAY_CHANGE] = ""
    """Text to measure forgetting on: text shards, a .txt file, a folder of these, or a Hugging Face dataset
    (hf:USER/NAME). It is measured before the first step and every eval_every steps. Empty for none."""
    sample_every: Annotated[int, Ge(0), MAY_CHANGE] = 0
    """Steps between grids of sampled images; 0 for never."""
    sample_prompts: Annotated[Path | None, MAY_CHANGE] = None
    """Your own prompts for these grids instead of held-out captions: .txt with one per line, or .csv, .tsv, .jsonl,
    .parquet with a column caption, text or prompt, and perhaps image or file_name, whose image stands beside it."""
    report_to: Annotated[tuple[Tracker, ...], MAY_CHANGE] = ("tensorboard",)
    """Trackers that show the run, any of these, by accelerate's classes; metrics.jsonl is written in any case."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of weights, sample order and caption dropout."""
    # May change on resume, as the next one: they choose kernels, not what these compute.
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the layers by torch.compile, which takes a minute or two at the first step. What a GPU gains has not been
    measured yet."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Give the same bits in every run on the same machine; slower on a GPU."""
    # Only logged by default: skipping or rewinding changes the experiment, so somebody has to ask for it.
    spike: Annotated[Literal["log", "skip", "rewind"], MAY_CHANGE] = "log"
    """At a loss spike: log it; skip the update; or rewind to the last checkpoint and skip the data after it."""
    spike_score: Annotated[float, Ge(0), MAY_CHANGE] = 8.0
    """A loss spike lies this many robust deviations above the median of the recent losses."""
    # Half an hour: the first step may compile, and a remote shard may be slow to come.
    hang_timeout_seconds: Annotated[int, Ge(0), Le(10_000_000), MAY_CHANGE] = 1_800
    """Seconds without a finished step after which a job ends; ten times that during a save or an evaluation. All stacks
    are then in hang_rank*.txt. 0 for never."""

    def __post_init__(self) -> None:
        check_values(self, group="train")
        if self.new_embeddings_lr is not None and not self.lr:
            raise UserError(
                f"train.new_embeddings_lr is {self.new_embeddings_lr} and train.lr 0; expected train.lr > 0, of whose"
                " schedule the other is a multiple."
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    run_dir: Annotated[Path, MAY_CHANGE] = Path("runs/train")
    """The run's folder. Run the same command to resume there."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        model = self.model
        # OpenLMConfig refuses it too, but only where the model is made, behind the run folder.
        if model.init == "random" and model.hidden_size % (2 * model.num_heads):
            raise UserError(
                f"model.num_heads is {model.num_heads}; expected a number that divides model.hidden_size"
                f" ({model.hidden_size}) into even widths."
            )
        if self.train.optimizer == "muon" and model.lora_rank:
            raise UserError(
                f"train.optimizer is muon with model.lora_rank {model.lora_rank}; expected adamw: Muon is for whole"
                " matrices, and nobody has measured here what it does to the two factors of an adapter."
            )
        if self.train.optimizer == "muon" and model.trainable in ("embeddings", "norms"):
            raise UserError(
                f"train.optimizer is muon with model.trainable {model.trainable}, which leaves it no matrix of a layer;"
                " expected adamw."
            )
