"""Files of a shard folder that lies in a bucket, brought here one by one through Streaming's downloaders."""

import logging
import os
import random
import time
from functools import cache
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from streaming.base.storage.download import CloudDownloader

from t2i.data.shards.integrity import HASH
from t2i.errors import DataError
from t2i.files import file_hash

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
"""Before the second attempt; twice as long before each further one, and up to half as long again by chance."""
TIMEOUT_SECONDS = 120.0


def fetch(remote: str, folder: Path, name: str, *, anew: bool = False, wanted: str = "") -> Path:
    """Bring REMOTE/NAME to folder/NAME, whole or not at all, unless it is there; return its path.

    Args:
        anew: bring it whatever is there, to a path of its own beside it.
        wanted: hash that it has; what is there with another one is brought again. Empty for any.

    Raises:
        DataError: it cannot be brought, or arrives broken each time.
    """
    path = folder / name
    if path.exists() and not anew and wanted in ("", file_hash(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f".{path.name}.{os.getpid()}")
    url = f"{remote.rstrip('/')}/{name}"
    for attempt in range(1, NUM_ATTEMPTS + 1):
        reason = _attempt(remote, url, coming, wanted)
        if not reason:
            return coming if anew else coming.replace(path)
        coming.unlink(missing_ok=True)
        if attempt < NUM_ATTEMPTS:
            logger.warning("%s: %s; attempt %d of %d failed", url, reason, attempt, NUM_ATTEMPTS)
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(1.0, 1.5))
    raise DataError(f"{url} could not be downloaded in {NUM_ATTEMPTS} attempts: {reason}.")


def _attempt(remote: str, url: str, coming: Path, wanted: str) -> str:
    """Download once; return why it failed where it is worth another attempt, empty if it did not.

    Raises:
        DataError: another attempt would end the same.
    """
    coming.unlink(missing_ok=True)
    try:
        _downloader(remote).download(url, str(coming), TIMEOUT_SECONDS)
    except (ClientError, FileNotFoundError, PermissionError, ValueError) as error:
        coming.unlink(missing_ok=True)
        raise DataError(f"{url} cannot be downloaded: {error}") from error
    except (BotoCoreError, OSError) as error:  # TimeoutError is one
        return f"{type(error).__name__}: {error}"
    found = file_hash(coming) if wanted else ""
    return "" if found == wanted else f"it arrived with the {HASH} {found}; made with {wanted}"


@cache
def _downloader(remote: str) -> CloudDownloader:
    """Open one connection a place: opening takes longer than a small file."""
    return CloudDownloader.get(remote)
