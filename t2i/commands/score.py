"""Score a model's images beside reference rows, or compare two scores.

Examples:
  python eval/coco_fid.py runs/train
  python eval/coco_fid.py runs/train --coco data/coco --clip models/clip-vit-large-patch14
  torchrun --nproc-per-node 8 eval/coco_fid.py runs/train --coco data/coco --num-samples 30000
  python eval/coco_fid.py runs/train --coco data/coco --captions uid_caption.csv
  python eval/coco_fid.py compare A/scores.json B/scores.json

Without --coco, images are drawn from half of the model's own held-out captions and compared with the other half, on
EfficientNet-Lite0 features, which need no download. That distance is not called FID. With --coco, the captions and
images of val2014 are used, on Inception features. Run the same command to resume. `compare` refuses scores that were
not measured alike.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.config import Dtype, SampleConfig
from t2i.errors import UserError

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.

if TYPE_CHECKING:
    from accelerate import PartialState

    from t2i.measure.heldout import CaptionMeter
    from t2i.measure.protocol import Scores
    from t2i.measure.score import Rulers, Task
    from t2i.runs.loading import OpenedModel


@dataclass(frozen=True)
class ScoreCommand:
    """The model, the images and the features."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder or a hub name (hf:USER/NAME); or the word `compare`."""
    coco: Path | None = None
    """Folder with annotations/captions_val2014.json and val2014/*.jpg; by default held-out images are used."""
    num_samples: Annotated[int | None, Ge(2)] = None
    """Captions drawn: by default 30,000 of COCO, or half of the held-out ones, of which there must be so many."""
    list_seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice of COCO captions."""
    captions: Path | None = None
    """A published list of COCO captions instead of --list-seed: .txt with one caption per line, or .csv, .tsv, .jsonl,
    .parquet with a column caption, text or prompt, and image_id, coco_id, uid or file_name if there is one."""
    out: Path | None = None
    """Folder for images and scores.json. Default: eval/ or coco/ in the run (by step) or exported folder."""
    features: Literal["efficientnet_lite0", "inception"] | None = None
    """Feature network. Default: inception with --coco, else efficientnet_lite0."""
    inception: Path | None = None
    """Inception-2015-12-05 weights; by default clean-fid's address, hash-checked."""
    resize: Literal["clean", "legacy_tensorflow"] = "clean"
    """How images are resized for the network; legacy_tensorflow is what most papers before 2021 used."""
    clip: Path | None = None
    """CLIP folder in transformers' layout, for the CLIP score. Default: none."""
    controls: tuple[Literal["shuffled", "untrained"], ...] | None = None
    """Rows drawn beside the model's, each at its full cost: untrained, by the same architecture before training;
    shuffled, again by other seeds, which shows what chance does to a distance. Default: untrained; none with --coco."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Images per batch and process."""
    dtype: Dtype = "auto"
    """Number type of the model. auto: as it is stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


@dataclass(frozen=True)
class CompareCommand:
    """The two scores."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """scores.json of one model, the folder that holds it, or a file of an export's .eval_results/."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """scores.json of another, or its folder."""


def score_model(command: ScoreCommand) -> None:
    from t2i.distributed.launch import join, leave_job
    from t2i.measure.feature_cache import measure_reference
    from t2i.measure.protocol import DrawingFacts
    from t2i.measure.score import Drawing, draw_rows, score
    from t2i.runs.loading import open_model

    started = time.perf_counter()
    if command.captions and (command.coco is None or command.list_seed):
        raise UserError("--captions is a list of COCO's captions: it wants --coco DIR, and no --list-seed.")
    processes = join()
    rulers = rulers_of(command, processes)
    checkpoint = open_model(
        command.ckpt,
        device=processes.device,
        needs_images=True,
        dtype=command.dtype,
        trust_remote_code=command.trust_remote_code,
    )
    task = task_of(command, checkpoint)
    folder = checkpoint.measures_folder("coco" if command.coco else "eval")
    controls: tuple[Literal["shuffled", "untrained"], ...]
    controls = () if command.coco else ("untrained",)
    drawing = Drawing(
        out=command.out or folder,
        config=command.sample,
        controls=controls if command.controls is None else command.controls,
        batch_size=command.batch_size,
    )
    rank, world_size = processes.process_index, processes.num_processes
    if processes.is_main_process and task.reference.cache:  # a broken picture is named before days of drawing
        measure_reference(task.reference, rulers.extractor, progress=True)
    drawn = draw_rows(checkpoint, task, drawing=drawing, rank=rank, world_size=world_size)
    facts = DrawingFacts(
        processes=world_size,
        seconds_to_draw=time.perf_counter() - started,
        captions_heard=None if command.coco else captions_heard(checkpoint),
    )
    processes.wait_for_everyone()
    if processes.is_main_process:
        scores = score(checkpoint, task, drawing=drawing, drawn=drawn, rulers=rulers, facts=facts)
        print_scores(scores, out=drawing.out)
    leave_job(processes)


def task_of(command: ScoreCommand, checkpoint: "OpenedModel") -> "Task":
    from t2i.measure.coco import NUM_SAMPLES, coco_task, drawn_captions, listed_captions, read_val2014
    from t2i.measure.heldout_images import halves_task, read_data_manifest

    if command.coco is None:
        return halves_task(read_data_manifest(checkpoint), num_samples=command.num_samples)
    coco = read_val2014(command.coco)
    if command.captions:
        choice = listed_captions(coco, command.captions, num_samples=command.num_samples)
    else:
        count = NUM_SAMPLES if command.num_samples is None else command.num_samples
        choice = drawn_captions(coco, num_samples=count, seed=command.list_seed)
    return coco_task(coco, choice, image_size=checkpoint.image_size())


def rulers_of(command: ScoreCommand, processes: "PartialState") -> "Rulers":
    from t2i.measure.clip import load_clip
    from t2i.measure.features import load_features
    from t2i.measure.score import Rulers

    name = command.features or ("inception" if command.coco else "efficientnet_lite0")
    device = processes.device
    with processes.local_main_process_first():  # one download a machine
        extractor = load_features(name, weights=command.inception, resize=command.resize, device=device)
    return Rulers(extractor, clip=load_clip(command.clip, device=device) if command.clip else None)


def captions_heard(checkpoint: "OpenedModel") -> "dict[str, CaptionMeter]":
    from t2i.measure.heldout_images import caption_meters, read_data_manifest

    return caption_meters(checkpoint, read_data_manifest(checkpoint))


def print_scores(scores: "Scores", *, out: Path) -> None:
    from t2i.measure.compare import table

    print("\n".join(table(scores.rows.values(), measures=scores.measures)))
    for split, meter in (scores.facts.captions_heard or {}).items():
        matched, shuffled, null = (
            "unknown" if loss is None else f"{loss:.3f}" for loss in (meter.own, meter.wrong, meter.empty)
        )
        print(
            f"{split}: image loss {matched} nats per code, shuffled captions {shuffled}, null caption {null}"
            f" ({meter.num_pictures} images)"
        )
    one = scores.protocol
    print(f"{one.n:,} captions against {one.reference}, {one.features}, {one.resize}.")
    print(f"{scores.note}\nAll of it: {out / scores.file}".lstrip())


def compare(command: CompareCommand) -> None:
    from t2i.measure.compare import check_protocols, differing_subjects, read_scores, table

    a, b = read_scores(command.a), read_scores(command.b)
    check_protocols(a, b)
    for file, scores in ((command.a, a), (command.b, b)):
        print("\n".join([str(file), *table(scores.rows.values(), measures=scores.measures)]))
    print("\n".join(["Measured alike. They differ in (first | second):", *differing_subjects(a, b)]))


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        sys.argv[:2] = [f"{sys.argv[0]} compare"]  # the verb becomes part of the program's name
        compare(parse(CompareCommand, description=__doc__ or ""))
    else:
        score_model(parse(ScoreCommand, description=__doc__ or ""))
