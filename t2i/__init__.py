"""Turn a pre-trained language model into an auto-regressive text-to-image model."""

__version__ = "0.1.0"
