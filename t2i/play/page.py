"""The page: its tabs, its look, and the application that serves it."""

import hmac
import os
from typing import Any

# Before Gradio is imported, which reads it then: nothing is reported to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI

from t2i.play.tabs.compare import compare_tab
from t2i.play.tabs.draw import draw_tab
from t2i.play.tabs.parts import KEPT_SECONDS, Play
from t2i.play.tabs.run import run_tab
from t2i.play.tabs.text import text_tab
from t2i.runs.run_folder import SAMPLES

MOST_UPLOAD = "32mb"
CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto; }
.drawn .grid-wrap, .maps .grid-wrap { max-height: none !important; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem; }
.figures svg { width: 100%; height: auto; background: white; }
"""


def make_page(play: Play) -> Any:
    """Lay out the page."""
    with gr.Blocks(
        title=f"t2i: {play.painters[0].name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        gr.Markdown("## t2i")
        gr.Textbox(
            "\n".join(_description(play)),
            show_label=False,
            container=False,
            interactive=False,
            lines=len(play.painters),
            elem_classes="model",
        )
        with gr.Tab("Draw"):
            drawn = draw_tab(play)
        with gr.Tab("Compare"):
            compare_tab(play, drawn_elsewhere=[drawn])
        with gr.Tab("Text"):
            text_tab(play)
        with gr.Tab("Run"):
            run_tab(play)

        def leave(request: gr.Request) -> None:
            play.visitors.give_up(str(request.session_hash))

        page.unload(leave)
    return page


def make_application(play: Play, *, api_key: str | None, most_waiting: int) -> FastAPI:
    """Make the web application of the page.

    Args:
        api_key: what visitors must type as the password, under any name; None for none.
        most_waiting: visitors that may wait for the model; further ones are told that it is busy.
    """
    page = make_page(play)
    page.queue(max_size=most_waiting, api_open=False)
    # Of a page that is mounted and not launched, Gradio 6.17 checks no path: a browser could name any file as uploaded.
    page.has_launched = True
    run_dir = play.painters[0].opened.run_dir

    def may_enter(name: str, password: str) -> bool:
        # A variable has surrogates for what is no UTF-8, and so may a password.
        sent, wanted = password.encode(errors="replace"), (api_key or "").encode(errors="surrogateescape")
        return hmac.compare_digest(sent, wanted)

    # Fonts of the system, and no address of elsewhere: the page is whole without a network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        auth=may_enter if api_key else None,
        # What is not foreseen stays in the log: the page would show its text as HTML.
        show_error=False,
        max_file_size=MOST_UPLOAD,
        allowed_paths=[] if run_dir is None else [str((run_dir / SAMPLES).resolve())],
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme,
        css=CSS,
    )


def _description(play: Play) -> list[str]:
    lines = []
    for painter in play.painters:
        opened = painter.opened
        size = opened.image_size()
        lines.append(
            f"{painter.name}: {opened.folder}, {size} x {size} pixels of"
            f" {opened.model.config.codes_per_image} codes, {opened.dtype} on {opened.model.device}"
        )
    return lines
