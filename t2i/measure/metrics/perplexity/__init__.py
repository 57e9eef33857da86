"""Perplexity for evaluate.load."""
