"""The path of the data: from captioned images to shards, and from shards to batches of whole optimizer steps."""
