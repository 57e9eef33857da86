"""One run as one page: report.html, with everything inside it."""

import base64
import io
import json
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from t2i.data.shards.manifest import Manifest, read_manifest_file
from t2i.data.sources import reopen_source
from t2i.errors import UserError
from t2i.measure.heldout_images import heldout_halves
from t2i.measure.protocol import SCORES
from t2i.report.figures import loss_curves
from t2i.runs.loading import DATA_MANIFEST
from t2i.runs.metrics_log import read_metrics
from t2i.runs.run_folder import ENVIRONMENT, RESOLVED, SAMPLE_CAPTIONS, SAMPLES, STATUS
from t2i.tokens.image import centre_crop_resize

TEMPLATE = Path(__file__).with_name("report.html")
NUM_PICTURES = 24


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files of the run folder; return its path.

    Raises:
        UserError: the folder holds no run.
    """
    if not (run_dir / RESOLVED).is_file():
        raise UserError(f"{run_dir} is no run folder: it has no {RESOLVED}.")
    rows = read_metrics(run_dir)
    manifest = _json(run_dir / DATA_MANIFEST)
    measured = _measured(run_dir)
    scores = _json(measured / SCORES) if measured else {}
    floors = manifest.get("floors_nats", {}).get("heldout", {})
    steps = [row for row in rows if "split" not in row]
    last_step = steps[-1]["step"] if steps else 0
    page = jinja2.Template(
        TEMPLATE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).render(
        name=run_dir.name,
        status=_json(run_dir / STATUS),
        environment=_json(run_dir / ENVIRONMENT),
        settings=yaml.safe_load((run_dir / RESOLVED).read_text()),
        manifest=manifest,
        scores=scores,
        floors=floors,
        last=steps[-1] if steps else {},
        heldout=[
            row
            for row in rows
            if row.get("image_loss_wrong_caption") is not None and row["step"] == last_step
        ],
        curves={
            kind: loss_curves(rows, kind=kind, floors=floors if kind == "image" else {})
            for kind in ("image", "text")
        },
        pictures=_pictures(measured / "model", read_manifest_file(run_dir / DATA_MANIFEST))
        if measured
        else [],
        samples=[(int(path.stem[-6:]), _data_url(Image.open(path))) for path in _spread(run_dir / SAMPLES)],
        sample_captions=_lines(run_dir / SAMPLES / SAMPLE_CAPTIONS),
        commands=_commands(run_dir),
    )
    path = run_dir / "report.html"
    path.write_text(page)
    return path


def _measured(run_dir: Path) -> Path | None:
    """Find the measures of the newest checkpoint that was measured on the run's own held-out pictures."""
    found = sorted((run_dir / "eval").glob(f"step_*/{SCORES}"))
    return found[-1].parent if found else None


def _pictures(folder: Path, manifest: Manifest) -> list[dict[str, str]]:
    """Pair drawn pictures with the real ones of their captions, spread over the drawn half."""
    drawn = sorted(folder.glob("*.png"))
    pairs = heldout_halves(reopen_source(manifest), num_samples=len(drawn)).drawn
    step = max(1, len(drawn) // NUM_PICTURES)
    shown = list(zip(pairs, drawn, strict=True))[::step][:NUM_PICTURES]
    return [
        {
            "caption": pair.caption,
            "split": pair.split,
            "real": _data_url(centre_crop_resize(pair.open(), size=manifest.image_size)),
            "drawn": _data_url(Image.open(path)),
        }
        for pair, path in shown
    ]


def _spread(folder: Path) -> list[Path]:
    """Choose the first, the last and up to two grids of samples between them."""
    paths = sorted(folder.glob("step_*.png"))
    places = {round(share * (len(paths) - 1)) for share in (0, 1 / 3, 2 / 3, 1)} if paths else set()
    return [paths[place] for place in sorted(places)]


def _commands(run_dir: Path) -> list[str]:
    """Write out what made the run's files, to be copied and run again."""
    commands = [_json(run_dir / ENVIRONMENT)["command"]]
    if _measured(run_dir):
        commands.append(shlex.join(["python", "eval/coco_fid.py", str(run_dir)]))
    return [*commands, shlex.join(["python", "launchers/report.py", str(run_dir)])]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
