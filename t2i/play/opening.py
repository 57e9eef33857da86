"""One or two models become a page that is about to be served."""

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from t2i.config import SampleConfig, SamplerConfig
from t2i.errors import UserError
from t2i.generate.sample import drawer_of
from t2i.play.drawing import Painter
from t2i.play.following import Visitors
from t2i.play.serving import Application, Door
from t2i.play.texts import Origin
from t2i.runs.loading import OpenedModel
from t2i.serve.drawing import OneShape


def check_gradio() -> None:
    """Refuse to go on without Gradio, before a model is read.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio, which is not installed: pip install 't2i[play]'.")


@dataclass(frozen=True)
class Page:
    """A page that can be served."""

    application: Application
    give_up: Callable[[], None]
    """Ends the work that visitors wait for, and returns when the model is idle."""


def painters_of(models: Sequence[OpenedModel], *, batch_size: int) -> tuple[Painter, ...]:
    """Let models draw, one at a time.

    Raises:
        UserError: one draws no images.
    """
    for opened in models:
        drawer_of(opened, settings=SampleConfig())
    busy = Lock()
    names = [opened.name for opened in models]
    if len(set(names)) < len(names):  # two checkpoints of one run, or folders of one name
        names = [str(opened.folder) for opened in models]
    return tuple(
        Painter(name, OneShape(opened, batch_size=batch_size), busy)
        for name, opened in zip(names, models, strict=True)
    )


@contextmanager
def open_page(
    models: Sequence[OpenedModel],
    *,
    reference: str | None,
    sampler: SamplerConfig,
    batch_size: int,
    most_images: int,
    most_waiting: int,
    price: float = 0.0,
    api_key: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Page]:
    """Make the page of a model, and perhaps of another beside it; its files are removed at the end of the block.

    Args:
        reference: the language model before training; None for the run's model.init.
        price: US dollars per GPU-hour; 0 for no cost.
        api_key: what visitors must type; None for none.

    Raises:
        UserError: a model draws no images.
    """
    painters = painters_of(models, batch_size=batch_size)
    with tempfile.TemporaryDirectory(prefix="t2i_play_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
        # Here, and not above: only who lays out a page needs Gradio.
        from t2i.play.page import make_application
        from t2i.play.tabs.parts import Play

        visitors = Visitors()
        play = Play(
            painters,
            origin=Origin(models[0], asked=reference, trust_remote_code=trust_remote_code),
            sampler=sampler,
            most_images=most_images,
            folder=Path(folder),
            price=price,
            visitors=visitors,
        )
        application = make_application(play, api_key=api_key, most_waiting=most_waiting)

        def give_up() -> None:
            visitors.give_up_all()
            with painters[0].busy:
                pass

        yield Page(Door(application, is_open=api_key is not None), give_up)
