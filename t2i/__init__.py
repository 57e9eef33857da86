"""Turn a pre-trained language model into an auto-regressive text-to-image model."""

__version__ = "0.1.0"
"""The one place of the version: pyproject.toml reads it from here."""
