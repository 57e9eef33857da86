"""Training of an image tokenizer, and measures of its reconstructions."""
