"""Text tokenizers for the contrastive tower: strings → ids (b, context_length), int64, padded with
zeros; the end id is the largest."""

from vtp.tokenizers.byte import ByteTokenizer
from vtp.tokenizers.simple import SimpleTokenizer

__all__ = ["ByteTokenizer", "SimpleTokenizer", "get_tokenizer"]


def get_tokenizer(name: str = "ViT-B-32", context_length: int = 77, merges: str | None = None):
    """Return a tokenizer. "byte" is the one of our own pre-training. For any other name it is
    open_clip's of that name if open_clip is installed and `merges` is None, else CLIP's own with
    the merges file `merges`. FileNotFoundError if there is neither open_clip nor a merges file."""
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
