"""Download single files of a shard folder from a bucket, through Streaming's downloaders."""

import logging
import random
import time
from functools import cache
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from streaming.base.storage.download import CloudDownloader

from t2i.data.shards.integrity import HASH
from t2i.errors import DataError
from t2i.files import aside, file_hash

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
"""Pause before the second attempt; it doubles with each further one, plus up to half of it at random."""
TIMEOUT_SECONDS = 120.0


def fetch(remote: str, folder: Path, name: str, *, anew: bool = False, xxh64: str = "") -> Path:
    """Download REMOTE/NAME to folder/NAME, whole or not at all, unless it is there; return its path.

    Args:
        anew: download it in any case, to a temporary path beside it.
        xxh64: the expected hash; a file with another one is downloaded again. Empty for any.

    Raises:
        DataError: it cannot be downloaded, or arrives broken each time.
    """
    path = folder / name
    if path.exists() and not anew and xxh64 in ("", file_hash(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks of one machine, or of several that share the folder, may download the same file.
    coming = aside(path)
    url = f"{remote.rstrip('/')}/{name}"
    for attempt in range(1, NUM_ATTEMPTS + 1):
        reason = _attempt(remote, url, coming, xxh64)
        if not reason:
            return coming if anew else coming.replace(path)
        coming.unlink(missing_ok=True)
        if attempt < NUM_ATTEMPTS:
            logger.warning("%s: %s; attempt %d of %d failed", url, reason, attempt, NUM_ATTEMPTS)
            # The random part keeps the ranks of a job from asking again all at once.
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(1.0, 1.5))
    raise DataError(f"{url} could not be downloaded in {NUM_ATTEMPTS} attempts: {reason}.")


def _attempt(remote: str, url: str, coming: Path, xxh64: str) -> str:
    """Download once; return the reason if it failed and may succeed later, else an empty text.

    Raises:
        DataError: another attempt would fail in the same way.
    """
    coming.unlink(missing_ok=True)
    try:
        _downloader(remote).download(url, str(coming), TIMEOUT_SECONDS)
    except (ClientError, FileNotFoundError, PermissionError, ValueError) as error:
        coming.unlink(missing_ok=True)
        raise DataError(f"{url} cannot be downloaded: {error}") from error
    except (BotoCoreError, OSError) as error:  # TimeoutError is one
        return f"{type(error).__name__}: {error}"
    found = file_hash(coming) if xxh64 else ""
    return "" if found == xxh64 else f"it arrived with {HASH} {found}; expected {xxh64}"


@cache
def _downloader(remote: str) -> CloudDownloader:
    """Open one connection per bucket: opening one takes longer than downloading a small file."""
    return CloudDownloader.get(remote)
