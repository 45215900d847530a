"""Text encoders: captions to tokens. To add one, write a file with `XConfig` and `X`, list the
config in the union, and add a `case` in `build_…`."""

from __future__ import annotations

from mmdit.config import ConfigError
from mmdit.interfaces import TextEncoder
from mmdit.text_encoders.byte_level import ByteLevelConfig, ByteLevelEncoder
from mmdit.text_encoders.hashing import HashConfig, HashEncoder
from mmdit.text_encoders.huggingface import HuggingFaceConfig, HuggingFaceEncoder
from mmdit.text_encoders.umt5 import UMT5Config, UMT5Encoder
from mmdit.weights import Keep

TextEncoderConfig = ByteLevelConfig | HashConfig | HuggingFaceConfig | UMT5Config


def build_text_encoder(config: TextEncoderConfig, keep: Keep | None = None) -> TextEncoder:
    """Return the encoder of `config`, on the CPU.

    New weights come from torch's global generator. In a frozen encoder no parameter requires a
    gradient. `keep`: makes the weights of a UMT5 from the tensors as they lie in its files, see
    `weights.fill`. ConfigError if the encoder cannot be loaded.
    """
    try:
        match config:
            case ByteLevelConfig():
                return ByteLevelEncoder(config)
            case HashConfig():
                return HashEncoder(config)
            case UMT5Config():
                return UMT5Encoder(config, keep)
            case HuggingFaceConfig():
                return HuggingFaceEncoder(config)
    except ConfigError as error:
        raise error.under("text_encoder") from None
    raise AssertionError(f"no text encoder for {type(config).__name__}")


__all__ = [
    "ByteLevelConfig",
    "HashConfig",
    "HuggingFaceConfig",
    "TextEncoderConfig",
    "UMT5Config",
    "build_text_encoder",
]
