"""The tab of a run while it trains: what a look shows that was not there at the look before."""

import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from t2i.runs.metrics_log import append_metrics
from t2i.runs.run_folder import write_status

gr = pytest.importorskip("gradio", reason="pip install '.[play]' for these")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run's record that says that the run is training."""
    folder = tmp_path / "run"
    shutil.copytree(
        finished.run_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "engine", "*.pt", "samples")
    )
    write_status(folder, state="running", step=6, next_command="")
    return folder


@pytest.fixture
def look(run):
    """What the tab's timer calls with the slider's place and what was seen before."""
    from t2i.play.tabs.run import run_tab

    opened = SimpleNamespace(run_dir=run)
    with gr.Blocks() as page:
        run_tab(SimpleNamespace(painters=[SimpleNamespace(opened=opened)], price=0.0))
    [timer] = [block for block in page.blocks.values() if isinstance(block, gr.Timer)]
    assert timer.active
    [event] = [each for each in page.fns.values() if (timer._id, "tick") in each.targets]
    return event.fn


def grow(run, *steps):
    """Let the run take steps, and draw samples after each."""
    (run / "samples").mkdir(exist_ok=True)
    for step in steps:
        append_metrics(run, {"step": step, "tokens": step, "image_loss": 1.0 / step, "seconds": 60.0 * step})
        Image.new("RGB", (8, 8)).save(run / "samples" / f"step_{step:06d}.png")


def test_a_look_shows_what_the_run_has_done_since(run, look):
    seen, said, curves, slider, image = look(0, (0, 0))
    assert said.startswith("running: step 6 of 6")
    assert (slider.value, slider.visible, image.value) == (0, False, None)
    assert all(each == gr.skip() for each in look(0, seen))  # nothing has happened

    grow(run, 7)
    seen, said, newer_curves, slider, image = look(0, seen)
    assert said.startswith("running: step 7 of 6, 7 min in steps so far.")
    assert "<svg" in newer_curves and newer_curves != curves
    assert image.label == "Drawn at step 7"  # though the slider stays at 0

    grow(run, 8, 9, 10)  # as many as a hidden browser tab misses
    seen, said, curves, slider, image = look(0, seen)
    assert curves != newer_curves
    assert (slider.maximum, slider.value, slider.visible, image.label) == (3, 3, True, "Drawn at step 10")

    grow(run, 11)
    seen_since, said, _, slider, image = look(2, seen)  # somebody who looks at an older one
    assert said.startswith("running: step 11") and image == gr.skip()
    assert (slider.maximum, slider.value) == (4, None)  # stays there, and can be moved to the new one
    newest, _, _, slider, _ = look(3, seen)
    assert slider.value == 4
    grow(run, 12)
    _, _, _, slider, _ = look(4, seen_since)  # moved to the newest of then
    assert slider.value == 5

    write_status(run, state="done", step=11, next_command="")
    _, said, *_ = look(4, newest)
    assert said.startswith("done: step 11 of 6") and "It took " in said and "left" not in said
