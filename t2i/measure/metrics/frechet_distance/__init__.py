"""Frechet distance for evaluate.load."""
