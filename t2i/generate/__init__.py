"""Captions to images: batches, guidance, a seed per caption, PNG files."""
