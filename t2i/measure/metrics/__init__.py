"""Measures in the shape of Hugging Face's evaluate: `evaluate.load("t2i/measure/metrics/NAME")`, a folder each."""
