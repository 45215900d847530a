"""Text tokenizers for the contrastive tower: strings → ids (b, context_length), int64, zero-padded,
the end id the largest."""

from vtp.tokenizers.byte import ByteTokenizer
from vtp.tokenizers.simple import SimpleTokenizer

__all__ = ["ByteTokenizer", "SimpleTokenizer", "get_tokenizer"]


def get_tokenizer(name: str = "ViT-B-32", context_length: int = 77, merges: str | None = None):
    """Return a tokenizer. "byte": that of our own pre-training. Any other name: open_clip's of that
    name when open_clip is installed, else CLIP's own with the merges file `merges` (given, it is
    always used). FileNotFoundError without either.
    """
    if name == "byte":
        return ByteTokenizer(context_length)
    if merges is None:
        try:
            import open_clip
        except ImportError:
            pass
        else:
            return open_clip.get_tokenizer(name, context_length=context_length)
    return SimpleTokenizer(merges, context_length)
