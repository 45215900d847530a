"""Pre-train a VTP tokenizer on generated pictures: reconstruction, image-text contrast and
self-supervision.

The public release has no training code; this one is our own. Run it with `mmdit train-vtp --config
VTP/configs/….yaml`.
"""
