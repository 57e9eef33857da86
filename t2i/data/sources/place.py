"""Where a source lies: what is typed is relative to the folder where it is typed, and shards are read elsewhere too."""

from pathlib import Path

PREFIXES = ("coco:", "ids:", "iconify:", "text:shuffled:", "text:", "hf:")
PATTERN_CHARACTERS = frozenset("*?[{")


def absolute_source(name: str) -> str:
    """Name an existing source so that it is found from any folder; a name that is no path stays as it is."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    path = name.removeprefix(prefix)
    if path.split(":")[0] in ("openmoji", "docstrings", "code"):
        return name
    is_path = not PATTERN_CHARACTERS.isdisjoint(path) or Path(path).exists()
    # Neither `..` nor links are resolved: the keys of tars have their folder's name as it was typed.
    return f"{prefix}{Path.cwd() / path}" if is_path else name
