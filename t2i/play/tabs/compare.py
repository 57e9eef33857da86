"""The tab that compares two models, and shows what a caption is worth."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from t2i.data.sources.image import decode_image
from t2i.errors import UserError
from t2i.play.asked import read_drawing, read_text
from t2i.play.comparing import draw_side_by_side
from t2i.play.png_settings import read_png_settings
from t2i.play.tabs.parts import (
    AT_ONCE,
    BUTTONS,
    ONE_AT_A_TIME,
    Play,
    drawing_form,
    gallery,
    let_draw,
    said_on_page,
    shown,
    status_of,
)
from t2i.play.worth import worth_of

TAB = "compare"


def compare_tab(play: Play, *, drawn_elsewhere: list[Any]) -> None:
    """Lay out the tab.

    Args:
        drawn_elsewhere: galleries of other tabs, whose images can be measured here.
    """
    galleries = _side_by_side(play) if len(play.painters) > 1 else []
    if not galleries:
        gr.Markdown("To draw by two models under the same seeds, start the page with `--beside CKPT`.")
    image, caption = _worth(play)

    def take(images: list[tuple[str, str]] | None, chosen: gr.SelectData) -> tuple[Any, Any]:
        # By its place: a path that the browser names could be any file.
        path = images[int(chosen.index)][0] if images else None
        try:
            return path, read_png_settings(Path(path), weights="").prompt if path else ""
        except UserError:  # not finished
            return gr.skip(), gr.skip()

    for each in [*drawn_elsewhere, *galleries]:
        each.select(take, each, [image, caption], **AT_ONCE)


def _side_by_side(play: Play) -> list[Any]:
    def draw(request: gr.Request, *fields: Any) -> Iterator[list[Any]]:
        with said_on_page():
            drawing = read_drawing(*fields, most_images=play.most_images)
            given_up = play.visitors.begin(str(request.session_hash), tab=TAB)
            yield [[]] * len(play.painters) + ["Begins."]
            for drawn in draw_side_by_side(play.painters, drawing, given_up=given_up):
                said = [
                    f"{painter.name}: {status_of(one, prompt=drawing.prompt)}"
                    for painter, one in zip(play.painters, drawn, strict=True)
                    if one is not None
                ]
                yield [[] if one is None else shown(one, kept=play.kept(one)) for one in drawn] + [
                    "\n".join(said)
                ]

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = drawing_form(play, label="Draw by both")
        with gr.Column(scale=4, min_width=300):
            with gr.Row():
                galleries = [gallery(painter.name, elem_classes="drawn") for painter in play.painters]
            status = gr.Textbox(label="Status", interactive=False, elem_classes="status", max_lines=6)
    outputs = [*galleries, status]
    let_draw(play, form, draw, outputs=outputs, status=status, tab=TAB)
    return galleries


def _worth(play: Play) -> tuple[Any, Any]:
    """Lay out the heat maps; return the fields of the image and its caption."""

    def measure(path: str | None, caption: str) -> tuple[Any, str]:
        with said_on_page():
            if path is None:
                raise UserError(
                    "There is no image yet; expected one that is uploaded or chosen in a gallery."
                )
            text, image = read_text("caption", caption), _read_image(Path(path))
            maps, said = [], []
            for painter in play.painters:
                with painter.busy:
                    worth = worth_of(painter.opened, text, image)
                maps.append((worth.heat_map(), painter.name))
                said.append(f"{painter.name}: {worth.status()}.")
        return gr.Gallery(value=maps, columns=len(maps)), "\n".join(said)

    gr.Markdown(
        "### What a caption is worth, place by place\n"
        "Loss under the null caption minus loss under the caption: red where the caption makes the image likelier,"
        " blue where less likely. Upload an image, or choose a drawn one in a gallery."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image = gr.Image(
                label="Image",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=240,
                buttons=BUTTONS,
                elem_classes="measured",
            )
            caption = gr.Textbox(label="Caption", elem_classes="caption")
            button = gr.Button("Measure", variant="primary", elem_classes="measure")
        with gr.Column(scale=4, min_width=300):
            maps = gallery("Worth of the caption", elem_classes="maps", columns=2)
            status = gr.Textbox(label="Over the whole image", interactive=False, elem_classes="worth")
    button.click(measure, [image, caption], [maps, status], **ONE_AT_A_TIME)
    return image, caption


def _read_image(path: Path) -> Any:
    try:
        return decode_image(path.read_bytes()).image
    except (OSError, ValueError) as error:
        raise UserError(f"The image cannot be read: {error}.") from error
