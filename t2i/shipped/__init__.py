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
    places = [SHIPPED / path, *(SHIPPED / folder / path for folder in FOLDERS if path.name == str(path))]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return path
    if os.environ.get("RANK", "0") == "0":  # ranks look before the first of them speaks for all
        logger.info("%s is not here, so the file of that name that ships with t2i is used: %s", path, found)
    return found
