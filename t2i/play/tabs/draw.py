"""The tab that draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from t2i.play.asked import read_drawing
from t2i.play.drawing import draw_by_rows
from t2i.play.png_settings import read_png_settings
from t2i.play.tabs.parts import (
    AT_ONCE,
    Play,
    drawing_form,
    gallery,
    let_draw,
    said_on_page,
    sampler_sliders,
    shown,
    status_of,
)

TAB = "draw"


def draw_tab(play: Play) -> Any:
    """Lay out the tab; return its gallery."""
    painter = play.painters[0]

    def draw(request: gr.Request, *fields: Any) -> Iterator[tuple[Any, ...]]:
        with said_on_page():
            drawing = read_drawing(*fields, most_images=play.most_images)
            given_up = play.visitors.begin(str(request.session_hash), tab=TAB)
            yield [], "Begins.", None
            for drawn in draw_by_rows(painter, drawing, given_up=given_up):
                kept = play.kept(drawn)
                files = kept if drawn.is_finished else gr.skip()
                yield shown(drawn, kept=kept), status_of(drawn, prompt=drawing.prompt), files

    def settings_of_file(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return (*[gr.skip()] * 7, gr.skip())
        with said_on_page():
            found = read_png_settings(Path(path), weights=painter.opened.weights, dtype=painter.opened.dtype)
        notes = " ".join(["Its settings are in the fields.", *found.notes])
        sliders = sampler_sliders(found.sampler, codebook_size=painter.opened.layout.codebook_size)
        return found.prompt, 1, str(found.seed), *sliders, notes

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = drawing_form(play, label="Draw")
            dropped = gr.File(
                label="Drop a drawn PNG here to get its settings back",
                file_types=[".png"],
                height=130,
                elem_classes="dropped",
            )
        with gr.Column(scale=3, min_width=300):
            images = gallery("Images", elem_classes="drawn")
            status = gr.Textbox(label="Status", interactive=False, elem_classes="status", max_lines=4)
            files = gr.File(
                label="PNG files with their settings inside",
                file_count="multiple",
                interactive=False,
                height=150,
                elem_classes="files",
            )
    outputs = [images, status, files]
    let_draw(play, form, draw, outputs=outputs, status=status, tab=TAB)
    dropped.upload(settings_of_file, dropped, [*form.fields, status], **AT_ONCE)
    return images
