"""What t2i makes of one class: a tiny model is grown, trained, resumed, exported, loaded and drawn from."""

import os
import re
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from backbones.tiny import POSITIONS, tiny_config
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from t2i.config import ASSETS, DataConfig, ModelConfig, PlanConfig, RunConfig, SampleConfig, TrainConfig
from t2i.cost.plan import make_plan
from t2i.data.shards.manifest import read_manifest
from t2i.errors import UserError
from t2i.generate.sample import draw_codes, drawer_of
from t2i.model.open_lm.forms_open_lm import ClassForm
from t2i.runs.export import export
from t2i.runs.loading import OpenedModel, open_model
from t2i.runs.metrics_log import read_metrics
from t2i.tokens.text import TextTokenizer
from t2i.train.build import build_model
from t2i.train.ds_config import read_ds_config
from t2i.train.main import train

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2_fp32.json"
SEQ_LEN = 42
PASSES, REFUSED, FAILS, NOT_MADE = "passes", "refused", "fails", "not made"


@dataclass
class Found:
    """One row of the table."""

    model_type: str
    kind: str = ""
    """Name of the class."""
    result: str = NOT_MADE
    step: str = "make"
    """What was done last: make, train, resume, open, draw, export, load, draw again."""
    reason: str = ""
    form: str = ""
    """What the class does around its LM head and how prompts are read, where it is not what most do."""
    image_weights: str = ""
    """Kinds of image weights that it takes."""


def try_class(model_type: str, *, shards: Path, folder: Path) -> Found:
    """Take a class through everything; every end is a row."""
    os.environ.pop("RANK", None)  # a job of its own
    found = Found(model_type)
    try:
        _try(found, shards=shards, folder=folder)
        found.result = PASSES
    except UserError as error:
        found.result = REFUSED if found.step == "train" else FAILS
        found.reason = _one_line(error)
    except Exception as error:  # whatever a class of a library raises is a row
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/t2i/" in frame.filename]
        place = (ours or frames)[-1]
        found.result = NOT_MADE if found.step == "make" else FAILS
        found.reason = (
            f"{type(error).__name__}: {_one_line(error)} ({Path(place.filename).name}:{place.lineno})"
        )
    return found


def _one_line(error: Exception) -> str:
    # Without the temporary folder's name, which differs from run to run.
    return re.sub(r"\S*/language-model", "it", " ".join(str(error).split()))[:400]


def _try(found: Found, *, shards: Path, folder: Path) -> None:
    start, tokenizer = folder / "language-model", TextTokenizer.load(ASSETS / "text_tokenizer")
    torch.manual_seed(0)
    description = tiny_config(found.model_type, vocab_size=tokenizer.num_tokens + 5)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(description)]
    is_whole = isinstance(description, kind.config_class)
    model = kind(description if is_whole else description.get_text_config(decoder=True))
    found.kind = type(model).__name__
    model.save_pretrained(start)
    if not is_whole:  # the folder that people have holds the description of all parts
        description.save_pretrained(start)
    tokenizer.tokenizer.save_pretrained(start)
    config = _config(shards, start=start, run_dir=folder / "run")
    found.step = "train"
    plan(config)
    train(config, ds_config_path=DS_CONFIG)
    found.step = "resume"
    train(replace(config, train=replace(config.train, max_steps=3)), ds_config_path=DS_CONFIG)
    losses = [row["loss"] for row in read_metrics(config.run_dir) if "split" not in row]
    assert len(losses) == 3 and all(loss is not None for loss in losses), losses
    found.step = "open"
    opened = open_model(str(config.run_dir), needs_images=True)
    found.form = _said(ClassForm.of(opened.model))
    found.step = "draw"
    codes = _drawn(opened)
    found.step = "export"
    export(opened, out=folder / "exported", command="a test")
    found.step = "load"
    again = open_model(str(folder / "exported"), needs_images=True)
    found.step = "draw again"
    assert torch.equal(codes, _drawn(again)), "the export draws other codes"
    found.image_weights = ", ".join(
        kind for kind in ("feed-forward", "all") if _can_be_routed(config, kind, tokenizer)
    )


def _config(shards: Path, *, start: Path, run_dir: Path) -> RunConfig:
    assert SEQ_LEN <= POSITIONS
    return RunConfig(
        run_dir=run_dir,
        data=DataConfig(shards=shards, seq_len=SEQ_LEN),
        model=ModelConfig(init=str(start)),
        train=TrainConfig(
            max_steps=2,
            global_batch_tokens=4 * SEQ_LEN,
            save_every=2,
            eval_every=0,
            warmup_steps=1,
            keep_last=1,
        ),
    )


def plan(config: RunConfig) -> None:
    """Estimate what the run needs, as a person does before the first step."""
    described = make_plan(
        config.data,
        model=config.model,
        train=config.train,
        ds_config=read_ds_config(DS_CONFIG),
        plan=PlanConfig(gpu="cpu"),
    )
    assert described.counts.total > 0 and described.step_seconds > 0, described


def _drawn(opened: OpenedModel) -> torch.Tensor:
    """Draw an image's codes, the likeliest ones, from two prompts of different lengths."""
    drawer = drawer_of(opened, settings=SampleConfig(guidance_scale=2.0, temperature=0))
    return draw_codes(drawer, ["picture 3", "a longer caption"])


def _said(form: ClassForm) -> str:
    plain = asdict(ClassForm())
    return ", ".join(f"{name} {value}" for name, value in asdict(form).items() if value != plain[name])


def _can_be_routed(config: RunConfig, kind: str, tokenizer: TextTokenizer) -> bool:
    """Tell whether a class takes image weights of a kind."""
    try:
        model, layout = build_model(
            replace(config.model, image_weights=kind, lora_rank=0),
            data=config.data,
            train=config.train,
            manifest=read_manifest(config.data.shards),
            text_tokenizer=tokenizer,
        )
        ids = torch.tensor(
            [[1, 2, layout.num_text_rows + 1, layout.first_image_id, layout.first_image_id + 1]]
        )
        model(ids).logits.sum().backward()
    except Exception:  # as above
        return False
    return True
