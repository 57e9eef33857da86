"""Files that an installed package has from the checkout: scripts, run files, studies and DeepSpeed's JSONs.

In a checkout the folders here are links to those at the root, so every file is kept once; a wheel has copies.
"""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent
FOLDERS = ("ds_configs", "launchers/configs", "launchers/studies")
"""Where a bare name such as zero2.json is looked for."""


def find_shipped(path: Path) -> Path:
    """Return the shipped file that a path names where the path itself leads nowhere; else the path as it is.

    Both `ds_configs/zero2.json` and `zero2.json` name a shipped file, so commands can be typed outside a checkout as in
    one. A file of the user's own always comes first.
    """
    if path.exists() or path.is_absolute():
        return path
    found = SHIPPED / in_checkout(path)
    if not found.is_file():
        return path
    if os.environ.get("RANK", "0") == "0":  # ranks look before the first of them speaks for all
        logger.info("%s is not here, so the file of that name that ships with t2i is used: %s", path, found)
    return found


def in_checkout(path: Path) -> Path:
    """Return where a checkout has the shipped file of a bare name, as ds_configs/zero2.json; else the path as it is."""
    # Of os.path: a word of any length is asked about, and Path's own checks raise where a name is too long.
    if os.path.exists(path) or path.name != str(path):  # noqa: PTH110
        return path
    places = (Path(folder) / path for folder in FOLDERS)
    return next((place for place in places if os.path.isfile(SHIPPED / place)), path)  # noqa: PTH113
