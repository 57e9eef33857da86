"""Measures of models and images: features, Frechet and kernel distances, held-out losses."""
