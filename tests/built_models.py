"""A run's model as training builds it, before its first step."""

from t2i.data.shards.manifest import read_manifest
from t2i.train.build import build_model


def built(config, tokenizer, **given):
    """Build the model of a run's settings: it and its vocabulary layout."""
    return build_model(
        config.model,
        data=config.data,
        train=config.train,
        manifest=read_manifest(config.data.shards),
        text_tokenizer=tokenizer,
        **given,
    )
