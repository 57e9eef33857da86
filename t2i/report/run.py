"""The report of one run: report.html, a page with everything inside it."""

import base64
import functools
import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from t2i.data.shards.manifest import Manifest
from t2i.data.sources import reopen_source
from t2i.errors import DataError, UserError
from t2i.files import check_keys, read_json, read_optional_json, why_lacking, write_whole
from t2i.measure.heldout_images import heldout_halves
from t2i.measure.protocol import SCORES
from t2i.report.figures import loss_curves
from t2i.runs.checkpoint_manifest import steps_of
from t2i.runs.metrics_log import METRICS
from t2i.runs.run_folder import (
    ENVIRONMENT,
    RESOLVED,
    SAMPLES,
    STATUS,
    Status,
    read_sample_captions,
    read_settings,
    read_status,
    report_command,
)
from t2i.study.results import TRAIN_ROWS, Row, data_manifest, image_baselines, read_run
from t2i.tokens.image import centre_crop_resize
from t2i.verbs import command_line

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("run.html.jinja")
NUM_IMAGES = 24
PATIENCE = 20
"""A run that is silent for so many times train.hang_timeout_seconds is gone: a save may take ten times a step."""


@dataclass(frozen=True)
class DrawnImage:
    """An image that the model drew, beside the real one of its caption."""

    caption: str
    split: str
    """Empty where the real images are gone."""
    real: str
    """As a data URL: the page is one file. Empty where the real images are gone."""
    drawn: str


@dataclass(frozen=True)
class RunPage:
    """All that the template shows; objects of JSON or YAML are as in their files."""

    name: str
    status: Status | None
    environment: dict[str, Any]
    settings: dict[str, Any]
    manifest: Manifest | None
    """Manifest of the training shards; None if the run has not begun."""
    scores: dict[str, Any]
    """Empty if no checkpoint was scored."""
    baselines: dict[str, float]
    """Count-based, in nats per code."""
    last: Row
    """The last training row."""
    heldout: list[Row]
    """Rows of the last step: losses under matched, shuffled and null captions."""
    curves: dict[str, str]
    """Image and text losses as SVG."""
    images: list[DrawnImage]
    samples: list[tuple[int, str]]
    """Steps and the grids drawn at them, as data URLs."""
    sample_captions: list[str]
    samples_are_held_out: bool
    """False where nothing is held out, so that training images' captions are drawn."""
    commands: list[str]


def write_report(run_dir: Path, *, refresh_seconds: int = 0) -> Path:
    """Write run_dir/report.html from the files of the run folder; return its path.

    Args:
        refresh_seconds: the page is read anew so often by a browser that shows it; 0 for never.

    Raises:
        UserError: the folder holds no run.
    """
    for name in (RESOLVED, ENVIRONMENT):  # an exported folder has only the first
        if not (run_dir / name).is_file():
            raise UserError(
                f"{run_dir} is no run folder: {why_lacking(run_dir, name)}. An exported folder has its numbers in"
                " README.md."
            )
    path = run_dir / "report.html"
    write_whole(path, _template().render(vars(_page(run_dir)), refresh_seconds=refresh_seconds))
    return path


@functools.cache  # a page that follows a run is written again and again
def _template() -> jinja2.Template:
    return jinja2.Template(
        TEMPLATE.read_text(),
        autoescape=True,  # captions are anybody's text
        trim_blocks=True,
        lstrip_blocks=True,
    )


def follow_run(run_dir: Path, *, every_seconds: int) -> None:
    """Write the report again and again until the run has ended, and once more then.

    A run that was killed could not say that it has ended: it is given up once it has been silent for too long.
    """
    while (status := read_status(run_dir)) and status.state == "running":
        if _is_silent(run_dir):
            logger.warning(
                "%s says that it is running, and has written nothing for so long that it was probably killed.",
                run_dir,
            )
            break
        try:
            write_report(run_dir, refresh_seconds=every_seconds)
        # Something that the run removed or changed meanwhile; the next page will have it right.
        except (OSError, DataError) as error:
            logger.warning("the page could not be written: %s", error)
        time.sleep(every_seconds)
    write_report(run_dir)


def _is_silent(run_dir: Path) -> bool:
    """Tell whether a run has written nothing for much longer than its watchdog lets a step take."""
    train = read_settings(run_dir).get("train")
    limit = train.get("hang_timeout_seconds") if isinstance(train, dict) else None
    written = [file.stat().st_mtime for file in (run_dir / METRICS, run_dir / STATUS) if file.is_file()]
    if not limit or not written:  # 0 is for no watchdog
        return False
    return time.time() - max(written) > PATIENCE * limit


def _page(run_dir: Path) -> RunPage:
    settings = read_settings(run_dir)
    check_keys(settings, {"train": {"max_steps": int}}, where=run_dir / RESOLVED)
    run = read_run(run_dir, seed=0)
    manifest = data_manifest(run)
    measured = _measured(run_dir)
    baselines = image_baselines([run])
    # A run that stopped before its first recorded step has a page too, for its settings and reason are looked for.
    last = next((row for row in reversed(run.rows) if row.split == TRAIN_ROWS), Row(0, TRAIN_ROWS, values={}))
    return RunPage(
        name=run_dir.name,
        status=read_status(run_dir),
        environment=_environment(run_dir),
        settings=settings,
        manifest=manifest,
        scores=_scores(measured / SCORES) if measured else {},
        baselines=baselines,
        last=last,
        # Of the last step alone: rows of earlier ones are in the curves.
        heldout=[
            row
            for row in run.rows
            if row.split != TRAIN_ROWS and "image_loss" in row.values and row.step == last.step
        ],
        # A run on text has no image loss: an empty figure would look like one that failed.
        curves={
            kind: loss_curves(run.rows, kind=kind, baselines=baselines if kind == "image" else {})
            for kind in ("image", "text")
            if any(f"{kind}_loss" in row.values for row in run.rows)
        },
        images=_images(measured / "model", manifest) if measured and manifest else [],
        samples=[(step, _data_url(_image(path))) for step, path in _spread(run_dir / SAMPLES)],
        sample_captions=read_sample_captions(run_dir),
        samples_are_held_out=manifest is None or bool(manifest.counts.get("heldout")),
        commands=_commands(run_dir),
    )


def _measured(run_dir: Path) -> Path | None:
    """Find the scores of the newest checkpoint that was scored on the run's own held-out images."""
    folders = steps_of((run_dir / "eval").glob("step_*"))
    found = [folder for _, folder in folders.items() if (folder / SCORES).is_file()]
    return found[-1] if found else None


def _environment(run_dir: Path) -> dict[str, Any]:
    """Read what the run was started with; an exported folder does not know it."""
    path = run_dir / ENVIRONMENT
    unknown = {"command": "", "python": "unknown", "platform": "unknown platform", "packages": {}}
    found = {**unknown, **read_optional_json(path)}
    check_keys(found, {"command": str, "python": str, "platform": str, "packages": dict}, where=path)
    return found


def _scores(path: Path) -> dict[str, Any]:
    found = read_json(path)
    check_keys(found, {"measures": list, "rows": dict, "captions_sha256": str, "sampler": dict}, where=path)
    check_keys(found["rows"], {row: {"what": str} for row in found["rows"]}, where=f"{path}: rows")
    return found


def _images(folder: Path, manifest: Manifest) -> list[DrawnImage]:
    """Pair drawn images with the real ones of their captions, evenly spread over the half that was drawn."""
    drawn = sorted(folder.glob("*.png"))
    if not drawn:
        return []
    # Every n-th and never the best: a page of chosen images says nothing of the others.
    step = max(1, len(drawn) // NUM_IMAGES)
    try:
        halves = heldout_halves(reopen_source(manifest), num_samples=len(drawn))
    except (DataError, UserError) as error:
        logger.warning("The page shows drawn images alone. %s", error)
        return [_drawn_alone(path) for path in drawn[::step][:NUM_IMAGES]]
    # `t2i score --other-half` draws the captions of the reference.
    is_other = _image(drawn[0]).info.get("caption") == halves.reference[0].caption
    pairs = halves.reference if is_other else halves.drawn
    shown = [
        (pair, path, _image(path)) for pair, path in list(zip(pairs, drawn, strict=True))[::step][:NUM_IMAGES]
    ]
    # The source may have other images by now, or the score was of another one.
    others = [path for pair, path, image in shown if image.info.get("caption", pair.caption) != pair.caption]
    if others:
        logger.warning(
            "The page shows drawn images alone: %s has another caption than the data now.", others[0]
        )
        return [_drawn_alone(path) for _, path, _ in shown]
    return [
        DrawnImage(
            caption=pair.caption,
            split=pair.split,
            # Cropped and resized as training saw it; beside the whole photograph the drawn one would look worse.
            real=_data_url(centre_crop_resize(pair.open().image, size=manifest.image_size)),
            drawn=_data_url(image),
        )
        for pair, path, image in shown
    ]


def _drawn_alone(path: Path) -> DrawnImage:
    image = _image(path)
    return DrawnImage(str(image.info.get("caption", "")), split="", real="", drawn=_data_url(image))


def _spread(folder: Path) -> list[tuple[int, Path]]:
    """Choose the first, the last and up to two grids of samples between them, with their steps."""
    found = list(steps_of(folder.glob("step_*.png")).items())
    places = {round(share * (len(found) - 1)) for share in (0, 1 / 3, 2 / 3, 1)} if found else set()
    return [found[place] for place in sorted(places)]


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises each of these
        raise DataError(f"{path} cannot be read as an image: {error}.") from error


def _commands(run_dir: Path) -> list[str]:
    """List the commands that made the run's files, to be copied and run again."""
    commands = [_environment(run_dir)["command"]]
    if _measured(run_dir):
        commands.append(command_line("score", str(run_dir)))
    return [*commands, report_command(run_dir)]


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
