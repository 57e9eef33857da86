"""A list of captions, written down and named by its hash."""

import hashlib
import json


def caption_lines(captions: dict[str, str]) -> str:
    """Write a list of captions down, a JSON object per line; its hash names the list."""
    return "".join(json.dumps({"name": name, "caption": text}) + "\n" for name, text in captions.items())


def captions_sha256(captions: dict[str, str]) -> str:
    """Hash a list of captions with its names and its order (hex SHA-256 of caption_lines)."""
    return hashlib.sha256(caption_lines(captions).encode()).hexdigest()
