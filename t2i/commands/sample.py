"""Draw images from captions.

Examples:
  python launchers/sample.py runs/train --prompts "grinning face" "red apple" --out drawn
  python launchers/sample.py runs/train --prompts captions.txt --out drawn --guidance-scale 2
  python launchers/sample.py runs/train --layout geneval --prompts evaluation_metadata.jsonl --out geneval
  torchrun --nproc-per-node 8 launchers/sample.py runs/train --layout dpg --prompts dpg_bench/prompts --out dpg
  python launchers/sample.py runs/train --prompts captions.txt --out drawn --best-of 8

Images are numbered; other captions or settings add theirs after those that --out holds. The layouts draw what
the scorers of GenEval, GenEval 2 and DPG-Bench read: four images per prompt, one for GenEval 2. Run the same command to
resume.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.commands.judges import JudgeFlags, judges_of
from t2i.config import Dtype, SampleConfig
from t2i.errors import UserError

if TYPE_CHECKING:
    from t2i.generate.best_of import Ranker


@dataclass(frozen=True)
class SampleCommand:
    """The model, the captions and the sampler."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i."""
    prompts: tuple[str, ...]
    """Captions, or one file: .txt with one caption per line, or .csv, .tsv, .jsonl, .parquet with a column caption,
    text or prompt. With --layout: the benchmark's prompts."""
    out: Path
    """Folder for the PNG files."""
    layout: Literal["plain", "geneval", "geneval2", "dpg"] = "plain"
    """plain: 00000.png and so on, after those that are there. geneval, geneval2: prompts from its .jsonl file. dpg:
    from its folder of .txt files."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Images per batch and process."""
    dtype: Dtype = "auto"
    """Number type of the model. auto: as it is stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    judging: Annotated[JudgeFlags, tyro.conf.arg(name="")] = field(default_factory=JudgeFlags)
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def captions_of(prompts: tuple[str, ...]) -> list[str]:
    from t2i.data.sources.caption_list import LISTS, read_caption_list
    from t2i.files import is_file, valid_text

    if not prompts:
        raise UserError("--prompts names no caption.")
    if len(prompts) == 1:
        path, is_word = Path(prompts[0]), len(prompts[0].split()) == 1
        if path.suffix in LISTS or ((is_word or path.suffix) and is_file(path)):
            return [row.text for row in read_caption_list(path)]
    files = [prompt for prompt in prompts if Path(prompt).suffix in LISTS and is_file(prompt)]
    if files:
        raise UserError(
            f"--prompts names {len(prompts)} captions, of which {files[0]} is a file; expected captions, or one file."
        )
    # An empty one is the null caption: dropped, it would shift the numbers of the others.
    # What a terminal of another encoding has typed may be no text, which no tokenizer takes.
    return [valid_text(prompt) for prompt in prompts]


def ranker_for(command: SampleCommand) -> "Ranker | None":
    from t2i.measure.remote_judge import ranker_of

    flags = command.judging
    if command.sample.best_by != "judge":
        if flags.judge_url or flags.judges or flags.judge_revision:
            raise UserError("--judge-url and --judges are for --best-by judge; --best-by is likelihood.")
        return None
    if not flags.judge_url or len(flags.judges) != 1:
        raise UserError("--best-by judge expects --judge-url and one of its --judges.")
    (judge,) = judges_of(flags)
    return ranker_of(judge)


def main() -> None:
    command = parse(SampleCommand, description=__doc__ or "")
    if command.layout != "plain" and len(command.prompts) != 1:
        raise UserError(
            f"--layout {command.layout} expects one --prompts path; found {len(command.prompts)}."
        )
    from t2i.distributed.launch import join, leave_job
    from t2i.files import check_writable
    from t2i.generate.benchmarks import Benchmark, read_benchmark
    from t2i.generate.beside import SETTINGS, named_beside
    from t2i.generate.sample import draw_folder, drawing_settings
    from t2i.runs.loading import open_model

    work, record = Benchmark(captions={}, drawn=command.out, metadata={}, sheets={}), SETTINGS
    texts = captions_of(command.prompts) if command.layout == "plain" else []
    if command.layout != "plain":
        work = read_benchmark(command.layout, prompts=Path(command.prompts[0]), out=command.out)
        work.check_sheets()
    for folder in (work.drawn, command.out):  # before the model is read
        check_writable(folder)
    ranker = ranker_for(command)
    processes = join()
    opened = open_model(
        command.ckpt,
        device=processes.device,
        needs_images=True,
        dtype=command.dtype,
        trust_remote_code=command.trust_remote_code,
    )
    if texts:
        settings_of = partial(
            drawing_settings,
            opened=opened,
            config=command.sample,
            batch_size=command.batch_size,
            ranker=ranker,
        )
        names, record = named_beside(texts, out=command.out, settings_of=settings_of)
        work = replace(work, captions=names)
    processes.wait_for_everyone()  # else the first image of a quick rank would move the numbers of a slow one
    draw_folder(
        opened,
        work.captions,
        out=work.drawn,
        config=command.sample,
        batch_size=command.batch_size,
        rank=processes.process_index,
        world_size=processes.num_processes,
        record=record,
        ranker=ranker,
    )
    processes.wait_for_everyone()
    if processes.is_main_process:
        work.write_metadata()
        work.write_sheets()
        first, last = next(iter(work.captions)), list(work.captions)[-1]
        which = f"{first}.png to {last}.png" if last != first else f"{first}.png"
        print(f"{len(work.captions)} images in {work.drawn}, {which}; each carries its caption and settings.")
        if work.sheets:
            print(f"{len(work.sheets)} sheets of them in {command.out}.")
    leave_job(processes)
