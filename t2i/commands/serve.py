"""Serve images over HTTP, by the route of OpenAI's images API.

Examples:
  python launchers/serve.py runs/train
  python launchers/serve.py exported --port 8080 --batch-size 16 --guidance-scale 3
  T2I_API_KEY=SECRET python launchers/serve.py exported --host 0.0.0.0

Requests that wait are drawn together. The same seed gives the same image, whatever is drawn beside it.
"""

import os
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from t2i.cli import Ckpt, parse
from t2i.config import SamplerConfig


@dataclass(frozen=True)
class ServeCommand:
    """The model, the address, the limits and the sampler."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, a hub name (hf:USER/NAME), or demo, which comes with t2i."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own expects an API key in the environment variable T2I_API_KEY."""
    port: Annotated[int, Ge(0), Le(65_535)] = 8000
    """Port; 0 for a free one."""
    batch_size: Annotated[int, Ge(1), Le(100_000)] = 8
    """Images drawn together. Every batch is filled up to it, so that an image does not depend on the others."""
    max_waiting: Annotated[int, Ge(1), Le(1_000_000)] = 256
    """Images that may wait; further requests are answered with status 429."""
    max_images: Annotated[int, Ge(1), Le(1_000)] = 10
    """Images per request, and never more than may wait."""
    model_name: str | None = None
    """What clients call the model; by default its name on the hub, or the folder's."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    sample: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)


def main() -> None:
    command = parse(ServeCommand, description=__doc__ or "")
    from t2i.distributed.launch import join
    from t2i.runs.loading import open_model
    from t2i.serve.opening import api_key_of, check_exposure, listen, start, url_of
    from t2i.serve.stopping import serve_until_stopped, stop_signal

    api_key = api_key_of(os.environ)
    check_exposure(command.host, api_key=api_key)
    listen(command.host, command.port).close()  # a port that is taken is said before the model is read
    opened = open_model(
        command.ckpt,
        device=join().device,
        needs_images=True,
        trust_remote_code=command.trust_remote_code,
    )
    server = start(
        opened,
        sampler=command.sample,
        address=(command.host, command.port),
        batch_size=command.batch_size,
        most_waiting=command.max_waiting,
        most_images=command.max_images,
        model_name=command.model_name,
        api_key=api_key,
    )
    url = url_of(command.host, server.server_port)
    stopped = stop_signal()  # before the address is said: who waits for it may stop the server at once
    print(f"{server.service.limits.model} draws at {url}/v1; Ctrl-C stops.", flush=True)
    serve_until_stopped(server, stopped=stopped)
