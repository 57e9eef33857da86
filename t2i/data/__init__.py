"""How ids travel: captioned pictures, shards, and whole optimizer steps of batches."""
