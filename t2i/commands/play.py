"""Play with a model on a local web page: draw, compare, complete text, watch its run.

Examples:
  python launchers/play.py runs/train
  python launchers/play.py exported --beside runs/train --port 8080
  python launchers/play.py runs/train --reference models/smollm2 --price 2

Images appear while they are drawn. The same seed gives the same image, whatever is drawn beside it. The page needs
Gradio: pip install 't2i[play]'. It answers to this machine alone, and nothing leaves it.
"""

import os
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from t2i.cli import CKPT, Ckpt, parse
from t2i.config import Dtype, SamplerConfig


@dataclass(frozen=True)
class PlayCommand:
    """The models, the address, the limits and the sampler that the page begins with."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i."""
    beside: Annotated[str | None, CKPT] = None
    """Another CKPT, which draws beside it under the same seeds."""
    reference: Annotated[str | None, CKPT] = None
    """The language model before training, for texts beside texts. Default: the run's model.init."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own expects an API key in the environment variable T2I_API_KEY,
    which visitors type as the password."""
    port: Annotated[int, Ge(0), Le(65_535)] = 7860
    """Port; 0 for a free one."""
    batch_size: Annotated[int, Ge(1), Le(100_000)] = 4
    """Images drawn together. Every batch is filled up to it, so that an image does not depend on the others."""
    max_waiting: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Drawings and texts that may wait; further ones are told that the page is busy."""
    max_images: Annotated[int, Ge(1), Le(1_000)] = 16
    """Images per drawing."""
    price: Annotated[float, Ge(0), Le(1_000_000)] = 0.0
    """US dollars per GPU-hour, for what the run costs; 0 for no cost."""
    dtype: Dtype = "auto"
    """Number type of the models. auto: as they are stored on a GPU, and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    sample: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)


def main() -> None:
    command = parse(PlayCommand, description=__doc__ or "")
    from t2i.play.opening import check_gradio, open_page

    check_gradio()
    from t2i.distributed.launch import join
    from t2i.play.serving import serve_until_stopped
    from t2i.runs.loading import open_model
    from t2i.serve.opening import api_key_of, check_exposure, listen, url_of
    from t2i.serve.stopping import stop_signal

    api_key = api_key_of(os.environ)
    check_exposure(command.host, api_key=api_key)
    # Before the models are read, so that a port that is taken is said at once.
    listening = listen(command.host, command.port)
    device = join().device
    models = [
        open_model(
            ckpt,
            device=device,
            needs_images=True,
            dtype=command.dtype,
            trust_remote_code=command.trust_remote_code,
        )
        for ckpt in (command.ckpt, command.beside)
        if ckpt is not None
    ]
    with open_page(
        models,
        reference=command.reference,
        sampler=command.sample,
        batch_size=command.batch_size,
        most_images=command.max_images,
        most_waiting=command.max_waiting,
        price=command.price,
        api_key=api_key,
        trust_remote_code=command.trust_remote_code,
    ) as page:
        url = url_of(command.host, listening.getsockname()[1])
        stopped = stop_signal()  # before the address is said: who waits for it may stop the page at once
        print(f"Open {url} in a browser; Ctrl-C stops.", flush=True)
        serve_until_stopped(page.application, listening=listening, stopped=stopped, give_up=page.give_up)
