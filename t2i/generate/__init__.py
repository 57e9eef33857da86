"""Captions to pictures: batches, guidance, a seed per caption, PNG files."""
