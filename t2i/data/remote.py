"""Files of a shard folder that lies in a bucket, brought here one by one through Streaming's downloaders."""

import os
from functools import cache
from pathlib import Path

from streaming.base.storage.download import CloudDownloader
from streaming.base.util import retry

from t2i.errors import DataError

NUM_ATTEMPTS = 5
TIMEOUT_SECONDS = 120.0


def fetch(remote: str, folder: Path, name: str, *, anew: bool = False) -> Path:
    """Bring REMOTE/NAME to folder/NAME, whole or not at all, unless it is there; return its path.

    Args:
        anew: bring it whatever is there, to a path of its own beside it.

    Raises:
        DataError: it cannot be brought.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    path = folder / name
    if path.exists() and not anew:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f".{path.name}.{os.getpid()}")
    coming.unlink(missing_ok=True)
    url = f"{remote.rstrip('/')}/{name}"
    try:
        downloader = _downloader(remote)
        retry((BotoCoreError, TimeoutError), num_attempts=NUM_ATTEMPTS)(
            lambda: downloader.download(url, str(coming), TIMEOUT_SECONDS)
        )()
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        coming.unlink(missing_ok=True)
        raise DataError(f"{url} cannot be downloaded: {error}") from error
    return coming if anew else coming.replace(path)


@cache
def _downloader(remote: str) -> CloudDownloader:
    """Open one connection a place: opening takes longer than a small file."""
    return CloudDownloader.get(remote)
