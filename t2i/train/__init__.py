"""Learning: the DeepSpeed engine, the loop and its metrics, and the image tokenizer's own training."""
