"""What is on disk: run folders, checkpoints committed whole, and anything a CKPT may be."""
