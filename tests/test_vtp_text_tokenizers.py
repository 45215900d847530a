"""Text tokenizers of VTP. The real CLIP merges file is used where open_clip is installed."""

import gzip
import importlib.util

import pytest
import torch
from vtp.tokenizers import ByteTokenizer, SimpleTokenizer, get_tokenizer
from vtp.tokenizers.simple import MERGES_FILE


@pytest.fixture
def merges(tmp_path):
    """A merges file of our own with six merges."""
    path = tmp_path / MERGES_FILE
    lines = ["#version", "d o", "do g</w>", "c a", "1 </w>", "ca t</w>", "l l</w>"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_byte_pairs_are_joined_by_rank(merges):
    tokenizer = SimpleTokenizer(merges, context_length=8)
    base = 512  # bytes, and bytes at a word's end
    assert tokenizer.vocab_size == base + 6 + 2 and tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.encode("dog cat") == [base + 1, base + 4]
    assert tokenizer.encode("  DOG\n\t&amp;amp;cat") == [base + 1, 256 + ord("&") - 33, base + 4]
    assert tokenizer.encode("he'll") == [
        ord("h") - 33,
        256 + ord("e") - 33,
        ord("'") - 33,
        base + 5,
    ]
    assert len(tokenizer.encode("12½")) == 4  # digits and other numbers stand alone; ½ is two bytes
    assert (
        tokenizer.encode("²a") != tokenizer.encode("a")
        and tokenizer.encode("_a")[0] == 256 + ord("_") - 33
    )
    ids = tokenizer(["dog", "dog cat dog cat dog cat dog cat"])
    assert ids.tolist()[0] == [tokenizer.start, base + 1, tokenizer.end, 0, 0, 0, 0, 0]
    assert ids.shape == (2, 8) and ids[1, -1] == tokenizer.end and ids.dtype == torch.int64
    assert torch.equal(get_tokenizer("ViT-B-32", 8, merges=str(merges))("dog"), ids[:1])


def test_merges_files_that_are_not(tmp_path, merges, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no merges file"):
        SimpleTokenizer(tmp_path / "absent")
    for content in (b"plain", gzip.compress(b"#version\none\n"), merges.read_bytes()[:20]):
        merges.write_bytes(content)
        with pytest.raises(ValueError, match="not a (gzipped )?merges file"):
            SimpleTokenizer(merges)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install open_clip_torch"):
        SimpleTokenizer()


@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None,
    reason="the merges file comes with open_clip_torch",
)
def test_clip_vocabulary():
    assert SimpleTokenizer()("a dog")[0, :5].tolist() == [49406, 320, 1929, 49407, 0]


def test_bytes():
    tokenizer = get_tokenizer("byte", context_length=6)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer(["hi", "", "猫 and more"]).tolist() == [
        [256, 104, 105, 257, 0, 0],
        [256, 257, 0, 0, 0, 0],
        [256, *"猫".encode(), 32, 257],
    ]
    assert tokenizer("hi", context_length=3).tolist() == [[256, 104, 257]]
    with pytest.raises(ValueError, match="at least the start and the end"):
        ByteTokenizer(1)
