"""The tab that watches the run that the model is of."""

import time
from pathlib import Path
from typing import Any

import gradio as gr

from t2i.play.tabs.parts import AT_ONCE, BROKEN, BUTTONS, Play, said_on_page
from t2i.play.watching import Watched, grids_of, is_watchable, version_of, watch

EVERY_SECONDS = 10
"""Between looks at a run, which may go on after it was done."""


def run_tab(play: Play) -> None:
    """Lay out the tab."""
    run_dir = play.painters[0].opened.run_dir
    if not is_watchable(run_dir):
        gr.Markdown(
            "The model does not lie in a run folder with a recorded step, so there is no run to watch."
        )
        return
    try:
        watched = watch(run_dir, price=play.price)
    except BROKEN as error:  # the model can be played with all the same
        gr.Textbox(f"The run cannot be shown: {error}", label="The run", interactive=False)
        return
    seen = gr.State(version_of(run_dir))
    said = gr.Textbox(_said(watched), label="The run", lines=3, interactive=False, elem_classes="forecast")
    curves = gr.HTML(_curves(watched), elem_classes="curves")
    slider = gr.Slider(
        **_range(watched),
        step=1,
        label="Samples: first to last",
        interactive=True,
        buttons=[],
        elem_classes="steps",
    )
    newest = _grid(run_dir, len(watched.grids) - 1)
    image = gr.Image(**newest, interactive=False, buttons=BUTTONS, height=300, elem_classes="grid")
    gr.Textbox(
        "\n".join(watched.captions), label="Captions, in reading order", interactive=False, max_lines=16
    )

    def look(place: float, before: tuple[int, int]) -> tuple[Any, ...]:
        version = version_of(run_dir)
        if version == before:
            return (gr.skip(),) * 5
        with said_on_page():
            now = watch(run_dir, price=play.price)
        # Who looks at an older grid than the last one at the look before is left at it.
        if place < before[1] - 1:
            further = {key: value for key, value in _range(now).items() if key != "value"}
            return version, _said(now), _curves(now), gr.Slider(**further), gr.skip()
        # The image too: at the first grid the slider does not move.
        newest = gr.Image(**_grid(run_dir, len(now.grids) - 1))
        return version, _said(now), _curves(now), gr.Slider(**_range(now)), newest

    timer = gr.Timer(EVERY_SECONDS)
    timer.tick(
        look,
        [slider, seen],
        [seen, said, curves, slider, image],
        show_progress="hidden",
        concurrency_id="figures",  # matplotlib draws one at a time
        concurrency_limit=1,
        api_visibility="private",
    )
    slider.change(lambda place: gr.Image(**_grid(run_dir, int(place))), slider, image, **AT_ONCE)


def _said(watched: Watched) -> str:
    return "\n".join(watched.forecast.lines(now=time.time()))


def _curves(watched: Watched) -> str:
    # The report's own figures: all their text is drawn as paths.
    return "".join(["<div class='figures'>", *watched.curves.values(), "</div>"])


def _range(watched: Watched) -> dict[str, Any]:
    last = max(0, len(watched.grids) - 1)
    return {"minimum": 0, "maximum": max(1, last), "value": last, "visible": last > 0}


def _grid(run_dir: Path, place: int) -> dict[str, Any]:
    grids = list(grids_of(run_dir).items())
    if not grids:
        return {"value": None, "label": "No samples were drawn yet (train.sample_every)"}
    step, path = grids[min(max(place, 0), len(grids) - 1)]
    return {"value": str(path), "label": f"Drawn at step {step:,}"}
