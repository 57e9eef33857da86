"""How many text tokens captions have, and what of them fits into a sequence."""

from t2i.config import DataConfig
from t2i.data.shards.manifest import Manifest
from t2i.tokens.sequence import NUM_MARKERS, caption_room
from t2i.tokens.text import TextTokenizer


def seq_len_for(caption_tokens: int, manifest: Manifest) -> int:
    """Return the sequence length that holds a caption of so many tokens and its image."""
    return caption_tokens + manifest.codes_per_image + NUM_MARKERS["text-to-image"]


def truncation(config: DataConfig, manifest: Manifest, tokenizer: TextTokenizer) -> str:
    """Say how many captions a run's sequences truncate; empty if none, or if that is not known.

    Shards made before captions were counted, or for another text tokenizer, do not tell.
    """
    made_by = manifest.text_tokenizer.fingerprint
    if config.mode == "image-only" or not manifest.caption_tokens or tokenizer.fingerprint() != made_by:
        return ""
    room = caption_room(mode=config.mode, seq_len=config.seq_len, num_codes=manifest.codes_per_image)
    lengths = {int(length): count for length, count in manifest.caption_tokens.items()}
    cut = sum(count for length, count in lengths.items() if length > room)
    if not cut:
        return ""
    longest = max(lengths)
    return (
        f"data.seq_len {config.seq_len} has room for {room} text tokens: {cut:,} of {sum(lengths.values()):,} captions"
        f" are longer (up to {longest:,}) and are truncated. --data.seq-len {seq_len_for(longest, manifest)} keeps all."
    )
