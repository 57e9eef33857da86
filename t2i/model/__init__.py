"""Who predicts the ids: an open_lm model as transformers classes, its growth, its loss and its sampler."""
