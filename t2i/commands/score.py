"""Score a model's images beside reference rows, or compare two scores.

Examples:
  python eval/coco_fid.py runs/train
  python eval/coco_fid.py runs/train --coco data/coco --clip models/clip-vit-large-patch14
  torchrun --nproc-per-node 8 eval/coco_fid.py runs/train --coco data/coco --num-samples 30000
  python eval/coco_fid.py runs/train --coco data/coco --captions uid_caption.csv
  python eval/coco_fid.py runs/train --judge-url http://localhost:8080 --judges hpsv3=v3.0
  python eval/coco_fid.py compare A/scores.json B/scores.json
  python eval/coco_fid.py judge

Without --coco, images are drawn from half of the model's own held-out captions and compared with the other half, on
EfficientNet-Lite0 features, which need no download. That distance is not called FID. With --coco, the captions and
images of val2014 are used, on Inception features. Run the same command to resume. `compare` refuses scores that were
not measured alike. `judge` trains the exact judge of the embedded images, and says how often it is right.
"""

import difflib
import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.commands.judges import JudgeFlags, check_judges, judges_of
from t2i.commands.scores import CompareCommand, JudgeCommand, compare, show_judge
from t2i.config import Dtype, SampleConfig
from t2i.errors import UserError
from t2i.settings import OR_ZERO

# What loads torch is imported in functions, so that --help and wrong flags are answered at once.

if TYPE_CHECKING:
    from accelerate import PartialState

    from t2i.data.shards.manifest import Manifest
    from t2i.measure.heldout import CaptionMeter
    from t2i.measure.judge import Judge
    from t2i.measure.score import Contestant, Control, Rulers, Task

logger = logging.getLogger(__name__)

KINDS = ("compare", "judge")
"""Words in the place of a CKPT: each is a command of its own."""


@dataclass(frozen=True)
class ScoreCommand:
    """The model, the images and the measures."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i; a
    Janus, an Emu3 or a Chameleon of transformers; or the word `compare` or `judge`."""
    image_size: Annotated[int | None, Ge(1)] = None
    """Pixels per side that an Emu3 draws. Default: 720."""
    heldout_shards: Path | None = None
    """Shard folder whose held-out images are used. Default: those that the model was trained on."""
    coco: Path | None = None
    """Folder with annotations/captions_val2014.json and val2014/*.jpg; by default held-out images are used."""
    num_samples: Annotated[int | None, Ge(2)] = None
    """Captions drawn: by default 30,000 of COCO, or half of the held-out ones. Without --coco from 10 to that half."""
    other_half: bool = False
    """Swap the halves of the held-out images: settings that were chosen on one are confirmed on the other."""
    list_seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice of COCO captions."""
    captions: Path | None = None
    """A published list of COCO captions instead of --list-seed: .txt with one caption per line, or .csv, .tsv, .jsonl,
    .parquet with a column caption, text or prompt, and image_id, coco_id, uid or file_name if there is one."""
    out: Path | None = None
    """Folder for images and scores.json. Default: eval/ or coco/ in the run (by step) or exported folder, or in
    demo_measures/ for demo."""
    features: Literal["efficientnet_lite0", "inception", "dinov2", "clip"] | None = None
    """Feature network. Default: inception with --coco, else efficientnet_lite0. clip measures CMMD as well."""
    features_folder: Path | None = None
    """Folder of --features dinov2 or clip, in transformers' layout."""
    bootstrap: Annotated[int | None, Ge(2), Le(100_000), OR_ZERO] = None
    """Resamplings per 95% interval; 0 for no intervals. Default: 100, or 0 for more than 5,000 images. Fewer than 10
    images have no interval."""
    inception: Path | None = None
    """Inception-2015-12-05 weights; by default clean-fid's address, hash-checked."""
    resize: Literal["clean", "legacy_tensorflow"] = "clean"
    """How images are resized for the network; legacy_tensorflow is what most papers before 2021 used."""
    clip: Path | None = None
    """CLIP folder in transformers' layout, for the CLIP score. Default: none."""
    exact_judge: bool = True
    """With the embedded images: judge whether images show what captions state (kind, colour, skin tone, flag, count).
    The judge is trained once, in some seconds."""
    controls: tuple[Literal["redrawn", "untrained", "shuffled"], ...] | None = None
    """Rows drawn beside the model's, each at its full cost: untrained, by the same architecture, randomly initialised;
    redrawn, again by other seeds, which shows what chance does (once called shuffled). Default: untrained; none with
    --coco."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Images per batch and process."""
    dtype: Dtype = "auto"
    """Number type of the model. auto: as it is stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    judging: Annotated[JudgeFlags, tyro.conf.arg(name="")] = field(default_factory=JudgeFlags)
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def score_model(command: ScoreCommand) -> None:
    from t2i.distributed.launch import join, leave_job
    from t2i.files import check_writable
    from t2i.measure.compare import lines_of
    from t2i.measure.feature_cache import measure_reference
    from t2i.measure.protocol import DrawingFacts
    from t2i.measure.remote_judge import ranker_of
    from t2i.measure.score import Drawing, draw_rows, score
    from t2i.runs.loading import OpenedModel

    started = time.perf_counter()
    check_flags(command)
    processes = join()
    rulers = rulers_of(command, processes)
    checkpoint = contestant_of(command, processes)
    task = task_of(command, checkpoint)
    out = command.out or checkpoint.measures_folder("coco" if command.coco else "eval")
    check_writable(out)
    is_judged = command.sample.best_by == "judge"
    drawing = Drawing(
        out=out,
        config=command.sample,
        controls=controls_of(command, is_ours=isinstance(checkpoint, OpenedModel)),
        ranker=ranker_of(rulers.remote[0]) if is_judged and rulers.remote else None,
        batch_size=command.batch_size,
    )
    rank, world_size = processes.process_index, processes.num_processes
    is_begun = (out / "model").exists()
    processes.wait_for_everyone()  # before any rank draws
    if processes.is_main_process and task.reference.cache:  # a broken image is named before days of drawing
        measure_reference(task.reference, rulers.extractor, progress=True)
    if is_judged and processes.is_main_process and len(rulers.remote) > 1:
        logger.info(
            "%s, the first of --judges, chooses the images that all of them score.", rulers.remote[0].reward
        )
    drawn = draw_rows(checkpoint, task, drawing=drawing, rank=rank, world_size=world_size)
    facts = DrawingFacts(
        processes=world_size,
        seconds_to_draw=None if is_begun else time.perf_counter() - started,
        captions_heard=captions_heard(command, checkpoint),
    )
    processes.wait_for_everyone()
    if processes.is_main_process:
        rulers = replace(rulers, judge=exact_judge(command, checkpoint))
        scores = score(checkpoint, task, drawing=drawing, drawn=drawn, rulers=rulers, facts=facts)
        print("\n".join(lines_of(scores, out=drawing.out)))
    leave_job(processes)


def check_flags(command: ScoreCommand) -> None:
    """Refuse flags that would change nothing, and files that are not there."""
    from t2i.measure.coco import check_val2014

    if command.captions and (command.coco is None or command.list_seed):
        raise UserError("--captions is a list of COCO's captions: it wants --coco DIR, and no --list-seed.")
    if command.list_seed and command.coco is None:
        raise UserError(
            f"--list-seed is {command.list_seed}, the seed of a choice of COCO's captions: it wants --coco."
        )
    if command.coco and command.other_half:
        raise UserError("--other-half is of a model's own held-out images, which --coco takes the place of.")
    if command.coco and command.heldout_shards:
        raise UserError("--coco and --heldout-shards both name images; expected one of them.")
    if command.coco:
        check_val2014(command.coco)  # before networks are downloaded and models read
    if command.captions and not command.captions.is_file():
        raise UserError(f"--captions {command.captions} is no file.")
    check_judges(command.judging)
    if command.sample.best_by == "judge" and not command.judging.judges:
        raise UserError("--best-by judge expects --judge-url and its --judges, of which the first chooses.")


def controls_of(command: ScoreCommand, *, is_ours: bool) -> "tuple[Control, ...]":
    if command.controls is None:
        return () if command.coco or not is_ours else ("untrained",)
    if "shuffled" in command.controls:
        logger.warning("--controls shuffled is now called redrawn; the old name works until 0.2.")
    names: dict[str, Control] = {"redrawn": "redrawn", "untrained": "untrained", "shuffled": "redrawn"}
    return tuple(names[control] for control in command.controls)


def contestant_of(command: ScoreCommand, processes: "PartialState") -> "Contestant":
    from t2i.generate.others.kinds import kind_of, open_others
    from t2i.runs.loading import open_model

    folder = Path(command.ckpt)
    if kind_of(folder):
        return open_others(
            folder, device=processes.device, dtype=command.dtype, image_size=command.image_size
        )
    if command.image_size is not None:
        raise UserError(
            f"--image-size is {command.image_size}; it is for an Emu3. {command.ckpt} draws one size."
        )
    return open_model(
        command.ckpt,
        device=processes.device,
        needs_images=True,
        dtype=command.dtype,
        trust_remote_code=command.trust_remote_code,
    )


def manifest_of(command: ScoreCommand, checkpoint: "Contestant") -> "Manifest":
    from t2i.data.shards.manifest import read_manifest
    from t2i.measure.heldout_images import read_data_manifest
    from t2i.runs.loading import OpenedModel

    if command.heldout_shards is not None:
        manifest = read_manifest(command.heldout_shards)
    elif isinstance(checkpoint, OpenedModel):
        manifest = read_data_manifest(checkpoint)
    else:
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.kind}: name images with --coco or --heldout-shards."
        )
    # Shards of another model's size hold the same images.
    return replace(manifest, image_size=checkpoint.image_size())


def task_of(command: ScoreCommand, checkpoint: "Contestant") -> "Task":
    from t2i.measure.coco import NUM_SAMPLES, coco_task, drawn_captions, listed_captions, read_val2014
    from t2i.measure.heldout_images import halves_task

    if command.coco is None:
        return halves_task(
            manifest_of(command, checkpoint), num_samples=command.num_samples, other_half=command.other_half
        )
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
        extractor = load_features(
            name,
            weights=command.inception,
            folder=command.features_folder,
            resize=command.resize,
            device=device,
        )
    return Rulers(
        extractor,
        clip=load_clip(command.clip, device=device) if command.clip else None,
        remote=judges_of(command.judging),
        replicates=command.bootstrap,
    )


def exact_judge(command: ScoreCommand, checkpoint: "Contestant") -> "Judge | None":
    from t2i.measure.judge import SOURCE, load_judge

    is_embedded = command.coco is None and manifest_of(command, checkpoint).source == SOURCE
    return load_judge() if is_embedded and command.exact_judge else None


def captions_heard(command: ScoreCommand, checkpoint: "Contestant") -> "dict[str, CaptionMeter] | None":
    from t2i.measure.heldout_images import caption_meters
    from t2i.runs.loading import OpenedModel

    if command.coco or not isinstance(checkpoint, OpenedModel):
        return None
    return caption_meters(checkpoint, manifest_of(command, checkpoint))


def main() -> None:
    verb = next(iter(sys.argv[1:]), "")
    if verb in KINDS:
        sys.argv[:2] = [f"{sys.argv[0]} {verb}"]  # the verb becomes part of the program's name
    elif (meant := difflib.get_close_matches(verb, KINDS, n=1)) and not Path(verb).exists():
        raise UserError(f"{verb} does not exist, so it is no CKPT; perhaps you meant {meant[0]}.")
    if verb == "compare":
        compare(parse(CompareCommand, description=__doc__ or ""))
    elif verb == "judge":
        show_judge(parse(JudgeCommand, description=__doc__ or ""))
    else:
        score_model(parse(ScoreCommand, description=__doc__ or ""))
