"""VTP, a ViT auto-encoder whose latents also carry semantics (Yao et al., "Towards Scalable
Pre-training of Visual Tokenizers for Generation", arXiv 2512.13687). Networks in `vtp.models`, text
tokenizers in `vtp.tokenizers`, pre-training in `mmdit.vtp_training`.
"""
