"""A model becomes a server that is about to accept requests."""

import socket
from collections.abc import Mapping
from pathlib import Path

from t2i.config import SampleConfig, SamplerConfig
from t2i.errors import UserError
from t2i.generate.sample import drawer_of
from t2i.runs.loading import OpenedModel
from t2i.serve.clients import LOOPBACK
from t2i.serve.drawing import batch_drawer, cut_caption
from t2i.serve.http_server import ImageServer, Service
from t2i.serve.images_request import MOST_CHARACTERS, Limits
from t2i.serve.meters import Meters
from t2i.serve.waiting import Waiting


def check_exposure(host: str, *, api_key: str | None) -> None:
    """Refuse to let a whole network draw without a key.

    Raises:
        UserError: the address is not this machine's own, and there is no key.
    """
    if host not in LOOPBACK and not api_key:
        raise UserError(
            f"--host is {host}, which other machines reach; expected an API key in T2I_API_KEY, or --host 127.0.0.1."
        )


def api_key_of(variables: Mapping[str, str]) -> str | None:
    """Read the key that clients must send; None for none."""
    # A secret made from a file ends with a line feed, which no client can send.
    return variables.get("T2I_API_KEY", "").strip() or None


def url_of(host: str, port: int) -> str:
    """Return the address that a browser or a client is given."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; whoever comes before the page is served waits.

    Raises:
        UserError: it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"{host}:{port} cannot be listened at: {error}.") from error
    return listening


def start(
    opened: OpenedModel,
    *,
    sampler: SamplerConfig,
    address: tuple[str, int],
    batch_size: int,
    most_waiting: int,
    most_images: int,
    most_characters: int = MOST_CHARACTERS,
    model_name: str | None = None,
    api_key: str | None = None,
) -> ImageServer:
    """Bind the address and start the drawing thread; nothing is accepted yet.

    Raises:
        UserError: the model draws no images, or the address is taken.
    """
    drawer_of(opened, settings=SampleConfig(**vars(sampler)))  # refuses a model that cannot draw
    meters = Meters()
    waiting = Waiting(
        batch_drawer(opened, sampler=sampler, batch_size=batch_size),
        batch_size=batch_size,
        most_waiting=most_waiting,
        meters=meters,
    )
    service = Service(
        waiting,
        meters=meters,
        limits=Limits(
            model_name or opened.name,
            image_size=opened.image_size(),
            most_images=min(
                most_images, most_waiting
            ),  # more than may wait would be sent away again and again
            most_characters=most_characters,
        ),
        cut_caption=lambda caption: cut_caption(opened, caption),
        created=int(Path(opened.folder, "config.json").stat().st_mtime),
        api_key=api_key,
    )
    try:
        return ImageServer(address, service=service)
    except (OSError, OverflowError) as error:
        waiting.close()
        raise UserError(f"{address[0]}:{address[1]} cannot be listened at: {error}.") from error
