"""The image tokenizer's own training, and what its reconstructions are worth."""
