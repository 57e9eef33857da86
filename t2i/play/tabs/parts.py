"""What several tabs are made of."""

import hashlib
import html
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from t2i.config import SamplerConfig
from t2i.errors import CheckpointError, DataError, UserError
from t2i.play.drawing import Drawn, Painter
from t2i.play.following import Visitors
from t2i.play.texts import Origin

ONE_AT_A_TIME = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "trigger_mode": "always_last",
}
"""For events that use a model: they queue for it, over all tabs and pages. What is clicked while the page is busy with
the same event follows it, as the fields are then; Gradio would drop it without a word."""
BUTTONS = ["download", "fullscreen"]
"""Of images; Gradio's own have one more, which uploads them."""
BROKEN = (UserError, DataError, CheckpointError)
"""What a user, a file or a folder can cause, with a sentence that says it."""
KEPT_SECONDS = 24 * 3600
"""How long files that the page has shown are kept."""
AT_ONCE = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""For events that no model is needed for. They are queued too: otherwise Gradio would not show what is wrong."""


@dataclass(frozen=True)
class Play:
    """What the page plays with."""

    painters: tuple[Painter, ...]
    """The model, and perhaps another beside it."""
    origin: Origin
    sampler: SamplerConfig
    """What the fields begin with."""
    most_images: int
    folder: Path
    """For drawn files, a day or until the page ends."""
    price: float
    """US dollars per GPU-hour; 0 where nobody named it."""
    visitors: Visitors

    def kept(self, drawn: Drawn) -> list[str]:
        """Write the finished files of a drawing, named by their seeds; return their paths."""
        for folder in self.folder.iterdir():
            if folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        paths = []
        for index, file in enumerate(drawn.files):
            # By content: a file of the same seed and other settings has the same name.
            folder = self.folder / hashlib.sha256(file).hexdigest()[:16]
            path = folder / f"seed_{drawn.seed + index}.png"
            if not path.exists():
                folder.mkdir(exist_ok=True)
                path.write_bytes(file)
            paths.append(str(path))
        return paths


@contextmanager
def said_on_page() -> Iterator[None]:
    """Let the page say what a user can cause; Gradio would show its text as HTML, so it is escaped."""
    try:
        yield
    except BROKEN as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


@dataclass(frozen=True)
class Form:
    """The fields of a drawing and the buttons under them."""

    fields: list[Any]
    """In the order of read_drawing."""
    button: Any
    buttons: Any
    """The row of the button, where another may stand beside it."""


def drawing_form(play: Play, *, label: str) -> Form:
    """Lay out the fields of a drawing, and a button with a label."""
    sampler = play.sampler
    prompt = gr.Textbox(label="Prompt", lines=2, placeholder="grinning face", elem_classes="prompt")
    with gr.Row():
        most = play.most_images
        count = gr.Slider(1, max(2, most), value=min(4, most), step=1, label="Images", min_width=120)
        # Text, because a browser's numbers are not exact beyond 2^53.
        seed = gr.Textbox(label="Seed", placeholder="chosen for you", min_width=120, elem_classes="seed")
    with gr.Row() as buttons:
        button = gr.Button(label, variant="primary", min_width=80, elem_classes="draw")
    with gr.Accordion("Sampler"):
        sliders = sampler_sliders(sampler, codebook_size=play.painters[0].opened.layout.codebook_size)
    return Form([prompt, count, seed, *sliders], button, buttons)


def sampler_sliders(sampler: SamplerConfig, *, codebook_size: int) -> list[Any]:
    """Make the sliders of a sampler, in the order of read_drawing.

    Each reaches as far as its value, which a flag or a dropped file may set beyond what is useful: Gradio refuses what
    is outside.
    """
    useful = {
        "guidance_scale": (0, 10, 0.1, "Guidance", "Useful: 1.5 to 4; 1 is none."),
        "temperature": (0, 2, 0.05, "Temperature", "Useful: 0.7 to 1.1; 0 is the likeliest code."),
        "top_k": (0, codebook_size, 1, "Top-k", "The k likeliest codes. Useful: 20 to 200; 0 is all."),
        "top_p": (
            0.01,
            1,
            0.01,
            "Top-p",
            "Of those, the likeliest that reach this probability. Useful: 0.9 to 1.",
        ),
    }
    sliders = []
    for name, (least, most, step, label, info) in useful.items():
        value = getattr(sampler, name)
        reach = {"minimum": min(least, value), "maximum": max(most, value)}
        sliders.append(gr.Slider(**reach, value=value, step=step, label=label, info=info))
    return sliders


def let_draw(
    play: Play, form: Form, draw: Callable[..., Any], *, outputs: list[Any], status: Any, tab: str
) -> None:
    """Let the button of a form and Enter in its prompt draw, and a button beside it give that up."""
    begun = [
        event(draw, form.fields, outputs, show_progress="hidden", **ONE_AT_A_TIME)
        for event in (form.button.click, form.fields[0].submit)
    ]
    with form.buttons:
        cancel_button(play, tab=tab, begun=begun, status=status)


def gallery(label: str, **how: Any) -> Any:
    """Lay out a gallery of drawn images."""
    # As PNG: another format would lose codes' colours and the settings inside.
    return gr.Gallery(
        label=label,
        format="png",
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=BUTTONS,
        **how,
    )


def shown(drawn: Drawn, *, kept: Sequence[str]) -> Any:
    """Return what a gallery shows of a drawing: files of what is finished, else images as far as they are."""
    images: list[str | Image.Image] = [*kept, *drawn.images[len(kept) :]]
    named = [(image, f"seed {drawn.seed + index}") for index, image in enumerate(images)]
    return gr.Gallery(value=named, columns=columns_of(drawn.num_images), selected_index=None)


def columns_of(num_images: int) -> int:
    """Choose the columns of a gallery, so that few images are large."""
    return 1 if num_images == 1 else 2 if num_images <= 4 else 4


def status_of(drawn: Drawn, *, prompt: str) -> str:
    """Say how far a drawing is, and what is read of a prompt that is too long."""
    cut = "\nNothing of the prompt is read: the model was trained without captions."
    if drawn.read:
        cut = f"\nThe prompt is longer than a sequence had room for in training; this is read: {drawn.read}"
    return drawn.status() + (cut if drawn.read != prompt else "")


def cancel_button(play: Play, *, tab: str, begun: Sequence[Any], status: Any) -> None:
    """Let a button give up what the events of a tab have begun, waiting or not."""

    def cancel(request: gr.Request) -> str:
        play.visitors.give_up(str(request.session_hash), tab=tab)
        return "Cancelled."

    button = gr.Button("Cancel", min_width=80, elem_classes="cancel")
    button.click(cancel, outputs=status, cancels=list(begun), queue=False, api_visibility="private")
