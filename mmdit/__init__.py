"""mmdit: train text-to-image and text-to-video transformers from scratch on VTP latents, and study
adapters on Wan."""

__version__ = "0.2.0"
