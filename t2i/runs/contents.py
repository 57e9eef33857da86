"""What t2i writes, name by name: files of a run, a checkpoint, shards and an export, and the keys of metrics.jsonl.

The reference pages are made from these tables, and tests hold them against real folders.
"""

from dataclasses import dataclass

from t2i.data.shards import manifest as shards
from t2i.data.sources.listing import LISTING
from t2i.distributed.run_id import RUN_ID
from t2i.runs import checkpoint_store as store
from t2i.runs.checkpoint_manifest import CHECKPOINTS, MANIFEST
from t2i.runs.metrics_log import METRICS
from t2i.runs.run_folder import (
    DS_CONFIG,
    ENVIRONMENT,
    LOCK,
    REPLAY_MANIFEST,
    RESOLVED,
    SAMPLES,
    START,
    STATUS,
)


@dataclass(frozen=True)
class Described:
    """A file, or a key."""

    name: str
    """A glob pattern for files; a folder ends in a slash."""
    text: str
    is_always_there: bool = True


def sometimes(name: str, text: str) -> Described:
    """An entry that is there only under the condition that its text says."""
    return Described(name, text, is_always_there=False)


RUN_FOLDER = (
    Described(RESOLVED, "every setting of the run, and above them what follows on these ranks"),
    Described(DS_CONFIG, "DeepSpeed's JSON as it was given"),
    Described(ENVIRONMENT, "command, commit, Python, platform and package versions of the last start"),
    Described(
        STATUS,
        "state (running, done, stopped, failed), exit status, step, reason, and the command to run next",
    ),
    sometimes(RUN_ID, "id of this run, which its checkpoints carry; not in folders of version 0.1.0"),
    Described(METRICS, "every number of the run, one JSON object per line"),
    sometimes(f"{METRICS}.rewound", "rows beyond the checkpoint that a later start resumed from"),
    Described("tensorboard/", f"TensorBoard's view of {METRICS}"),
    Described(f"{CHECKPOINTS}/", "one folder per checkpoint, such as step_000500; best leads to the best"),
    Described(store.LATEST, "name of the newest checkpoint"),
    sometimes(f"{SAMPLES}/", "grids of sampled images and their captions, with train.sample_every"),
    Described("data_manifest.json", "manifest of the shards that the run reads"),
    sometimes(START, "with train.l2_sp: folder and hash of the weights that the run is pulled to"),
    sometimes(REPLAY_MANIFEST, "manifest of data.replay_shards"),
    sometimes(
        "roundtrip.safetensors",
        "images, their codes and reconstructions, by which its image tokenizer is checked",
    ),
    sometimes("image_tokenizer/", "the image tokenizer, where the shards have one"),
    Described(LOCK, "held by the process that trains here"),
    sometimes("error*.txt", "why the last start failed, with its traceback; error_rankN.txt is rank N's"),
    sometimes("hang_rank*.txt", "stacks of a rank whose step did not end"),
    sometimes("STOP", "made by you: end after this step, saved"),
    sometimes("SAVE", "made by you: save a checkpoint after this step"),
    sometimes("eval/", "scores.json and images of `t2i score`; coco/ with COCO"),
    sometimes(
        "*.json",
        "results of a measure, such as perplexity.json, nearest.json, gradients.json or forgetting.json",
    ),
    sometimes("report.html", "what `t2i report` writes"),
    sometimes("trackers/", "what `train.report_to` beside TensorBoard keeps and says"),
)

CHECKPOINT = (
    Described("config.json", "the model's configuration, with the vocabulary layout"),
    Described("generation_config.json", "defaults of transformers' generate()"),
    Described("model*.safetensors", "weights"),
    sometimes("model.safetensors.index.json", "which file holds which weight, where there are several"),
    sometimes("*_open_lm.py", "the model's class, for from_pretrained where t2i is not installed"),
    sometimes("*_routed.py", "the same, of a model with image weights"),
    Described("*token*.json", "the text tokenizer; some have vocab.json and merges.txt too"),
    Described("engine/", "DeepSpeed's state; sampling, scoring and export do not read it"),
    Described(MANIFEST, "the run's id, size and hash of every file, and a hash of itself; written last"),
)

SHARDS = (
    Described("train/", "MosaicML Streaming's MDS files: key, caption, caption_ids, codes"),
    Described("heldout/", "the same, never trained on"),
    sometimes("combinations/", "of emoji: known ones in held-out skin tones or styles"),
    sometimes("*-french/", "of icon sets: held-out images under other words; also -tags and -definition"),
    Described(
        shards.MANIFEST,
        "format version, source, split rule, counts, sizes, fingerprints of both tokenizers, hashes",
    ),
    sometimes(
        f"{shards.IMAGE_TOKENIZER}/", "the image tokenizer that made the codes; not with precomputed tokens"
    ),
    Described(f"{shards.TEXT_TOKENIZER}/", "the text tokenizer that made the caption ids"),
    sometimes(
        "roundtrip.safetensors",
        "eight images, codes and reconstructions: a run checks its tokenizer against them",
    ),
    sometimes(LISTING, "what the source consisted of, as hashes: a source that changed is noticed"),
    sometimes(shards.BROKEN, "images that could not be read, each with the reason"),
    sometimes(shards.RECONSTRUCTIONS, "images beside what their codes decode to"),
    sometimes("verified.json", "shards that a run has hashed, by size and time of change"),
)

EXPORT = (
    *(entry for entry in CHECKPOINT if entry.name not in ("engine/", MANIFEST)),
    Described("image_tokenizer/", "the image tokenizer, in diffusers' format"),
    Described("model_index.json", "what diffusers' DiffusionPipeline.from_pretrained opens"),
    Described("pipeline_t2i.py", "that pipeline"),
    Described("language_model/", "how it opens the language model of the folder around it"),
    Described("README.md", "model card: measured numbers, how to draw, and the command that made it"),
    sometimes("draw/", "the sampler, where the model's class cannot draw by itself"),
    sometimes("data_manifest.json", "manifest of the shards that it was trained on"),
    sometimes("roundtrip.safetensors", "images and codes, by which the image tokenizer is checked"),
    sometimes(RESOLVED, "every setting of the run"),
    sometimes("scores.json", "of `t2i score`; coco_scores.json with COCO"),
    sometimes("coco_scores.json", "of `t2i score --coco`"),
    sometimes(".eval_results/", "the model's scores in the hub's form, with n and protocol"),
)

STEP_KEYS = (
    Described("step", "optimizer steps done"),
    Described("epoch", "passes over the data begun, from 0"),
    Described("samples", "sequences trained on so far"),
    Described("tokens", "tokens with a label so far, padding left out"),
    Described("padded", "positions of this step's micro-batches that are padding"),
    Described("loss", "mean over all tokens of the step, nats per token"),
    Described("text_loss", "mean over text tokens, nats per token; null without any"),
    Described("image_loss", "mean over image tokens, nats per code; null without any"),
    Described("special_loss", "mean over special tokens, nats per token; null without any"),
    Described("text_tokens", "text tokens of this step"),
    Described("image_tokens", "image tokens of this step"),
    Described("special_tokens", "special tokens of this step"),
    sometimes("z_loss", "mean squared log-partition, which train.z_loss weights; loss is without it"),
    Described("lr", "learning rate"),
    Described("grad_norm", "norm of the gradient before clipping; null if it is not finite"),
    Described(
        "spike_score",
        "robust deviations of the loss from the median of the last ones; null before there are enough",
    ),
    Described("spike", "whether spike_score is above train.spike_score"),
    Described("skipped", "whether the step changed no weight"),
    sometimes("skipped_keys", "keys of the step's samples, where it was skipped"),
    Described("tokens_per_second", "of all ranks, padding left out"),
    Described("flops_per_second", "estimated floating-point operations"),
    sometimes("mfu", "share of the GPUs' peak, where that is known"),
    Described("seconds", "time in steps so far"),
    Described("step_seconds", "time of this step"),
    Described("data_seconds", "of these, waiting for data"),
    Described("memory_bytes", "most memory that the first rank has held"),
)

HELDOUT_KEYS = (
    Described("step", "optimizer steps done"),
    Described("split", "name of a held-out split; text for train.eval_text"),
    sometimes("num_pictures", "images read"),
    sometimes("num_sequences", "sequences read, of documents"),
    sometimes("image_rows_only", "whether image losses are over the image vocabulary alone"),
    sometimes("image_loss", "under the matched caption, nats per code"),
    sometimes("image_loss_wrong_caption", "under a shuffled caption, nats per code"),
    sometimes("image_loss_empty_caption", "under the null caption, nats per code"),
    sometimes("text_loss", "nats per text token"),
    sometimes("text_loss_text_rows", "the same over the text vocabulary alone"),
    sometimes("leaked", "mean probability of anything but text where text is next"),
)
