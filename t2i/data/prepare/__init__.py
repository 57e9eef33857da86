"""Captioned images become shards once: read, crop, encode, merge, look at."""
