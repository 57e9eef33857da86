"""Shards on disk: manifest, verified reading, remote copies and the count-based baselines beside them."""
