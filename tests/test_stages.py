"""The stages after training, on one tiny run: draw, score, export, and use the export without t2i."""

import errno
import json
import os
import sys

import processes
import pytest
import torch
from PIL import Image

from t2i.config import SampleConfig
from t2i.errors import UserError
from t2i.generate import image_files
from t2i.generate.sample import draw_folder
from t2i.measure.features import load_features
from t2i.measure.heldout_images import halves_task, read_data_manifest
from t2i.measure.protocol import DrawingFacts
from t2i.measure.score import Drawing, Rulers, draw_rows, score
from t2i.report.run import write_report
from t2i.runs.export import export
from t2i.runs.loading import open_model

CAPTIONS = {f"{index:02d}": f"picture {index}" for index in range(3)}


@pytest.fixture(scope="module")
def checkpoint(finished):
    return open_model(str(finished.run_dir), needs_images=True)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(checkpoint, out=out, command="python launchers/export.py")
    return out


def score_heldout(checkpoint, out):
    task = halves_task(read_data_manifest(checkpoint), num_samples=10)
    drawing = Drawing(out=out, config=SampleConfig(), controls=("redrawn", "untrained"), batch_size=32)
    drawn = draw_rows(checkpoint, task, drawing=drawing)
    rulers = Rulers(load_features("efficientnet_lite0"), clip=None)
    facts = DrawingFacts(processes=1, seconds_to_draw=0.0)
    scores = score(checkpoint, task, drawing=drawing, drawn=drawn, rulers=rulers, facts=facts)
    return scores.to_json()


def test_images_carry_caption_and_settings_and_are_not_drawn_twice(checkpoint, tmp_path):
    paths = draw_folder(checkpoint, CAPTIONS, out=tmp_path, config=SampleConfig(seed=5))
    assert Image.open(paths[1]).text["caption"] == "picture 1"
    assert Image.open(paths[1]).text["seed"] == "5"
    before = [path.stat().st_mtime_ns for path in paths]
    first = paths[0].read_bytes()
    paths[0].unlink()
    again = draw_folder(checkpoint, CAPTIONS, out=tmp_path, config=SampleConfig(seed=5))
    assert again[0].read_bytes() == first
    assert set(tmp_path.iterdir()) == {*paths, tmp_path / "settings.json"}
    assert before != [path.stat().st_mtime_ns for path in paths]  # the batch with the missing one, once
    with pytest.raises(UserError, match="seed: 5 there, 6 asked"):
        draw_folder(checkpoint, CAPTIONS, out=tmp_path, config=SampleConfig(seed=6))


def test_an_image_that_cannot_be_written_ends_the_drawing(checkpoint, tmp_path, monkeypatch):
    def full(path, picture, facts):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(image_files, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        draw_folder(checkpoint, CAPTIONS, out=tmp_path, config=SampleConfig(), batch_size=3)


def test_compiled_drawing_fills_the_last_batch_and_gives_the_same_images(checkpoint, tmp_path, monkeypatch):
    real, shapes = torch.compile, []

    def without_inductor(step, *, fullgraph, **_):  # whose kernels take a minute to build
        compiled = real(step, fullgraph=fullgraph, backend="aot_eager")
        return lambda codes, *rest: shapes.append(codes.shape) or compiled(codes, *rest)

    monkeypatch.setattr(torch, "compile", without_inductor)
    drawn = {
        is_compiled: draw_folder(
            checkpoint,
            CAPTIONS,
            out=tmp_path / str(is_compiled),
            config=SampleConfig(compile=is_compiled),
            batch_size=2,
        )
        for is_compiled in (False, True)
    }
    for plain, compiled in zip(*drawn.values(), strict=True):
        assert Image.open(plain).tobytes() == Image.open(compiled).tobytes()
    assert shapes == [(2,)] * 2 * 63  # codes after the first of two batches


def test_scores_name_everything_and_never_call_it_fid(checkpoint, tmp_path):
    scores = score_heldout(checkpoint, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert "fid" not in scores
    assert set(scores["rows"]) == {"real", "reconstructions", "model", "redrawn", "untrained"}
    assert all(row["fd_efficientnet_lite0"] > 0 for row in scores["rows"].values())
    row = scores["rows"]["real"]
    names = {f"{kind}_efficientnet_lite0" for kind in ("fd", "kd", "mind")}
    assert set(row) == {"what", "n", "n_reference", "intervals", *names} and set(row["intervals"]) == names
    assert {"n", "features", "resize", "reference", "captions_sha256", "sampler", "checkpoint"} <= set(scores)


def test_an_export_opens_like_any_ckpt_and_is_never_overwritten(checkpoint, exported):
    again = open_model(str(exported), needs_images=True)
    assert again.layout == checkpoint.layout
    assert (exported / "data_manifest.json").is_file()
    with pytest.raises(UserError, match="already exists"):
        export(checkpoint, out=exported, command="again")


def test_the_model_cards_lines_draw_images_without_t2i(exported, tmp_path):
    card = (exported / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    guard = (
        "import sys\n"
        "class NoT2I:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.split('.')[0] != 't2i', name\n"
        "sys.meta_path.insert(0, NoT2I())\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = processes.run(
        [sys.executable, "-c", guard + lines],
        cwd=exported.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(exported.parent / "0.png").size == (64, 64)


def test_the_report_is_one_page_with_everything_inside(finished, checkpoint):
    score_heldout(checkpoint, checkpoint.measures_folder("eval"))
    page = write_report(finished.run_dir).read_text()
    assert page.count("<svg") == 2
    assert page.count('alt="drawn"') == 10
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "drawn by the same architecture, randomly initialised" in page
    with pytest.raises(UserError, match="is no run folder"):
        write_report(finished.run_dir / "nowhere")
