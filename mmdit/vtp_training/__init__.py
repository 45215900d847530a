"""Pre-training of a VTP tokenizer on generated pictures: reconstruction, image-text contrast and
self-supervision.

The public release has no training code; this is ours. Run it with `python -m
mmdit.scripts.train_vtp --config VTP/configs/….yaml`.
"""
