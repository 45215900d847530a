"""Open encoders and tokenizers of the transformers library so that neither their config nor their
weights can run code, and whatever is wrong with them is reported in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdit.config import ConfigError
from mmdit.foreign import read_json

# The class of the encoder half or text tower, by the checkpoint's model_type; other types are
# opened with AutoModel.
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
    "clip": "CLIPTextModel",
    "siglip": "SiglipTextModel",
}


def load_encoder(name_or_path: str, dtype: torch.dtype, local: bool) -> tuple[Any, nn.Module]:
    """Return a tokenizer, and an encoder without its decoder. ConfigError (what, where, remedy) for
    whatever prevents this. `local`: nothing is fetched from a hub."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "type",
            f"is hf, which needs the transformers library ({error}); pip install transformers",
        ) from None
    source = name_or_path
    if source.startswith("~"):
        source = os.path.expanduser(source)
    folder = Path(source)
    if not folder.is_dir() and (source.startswith((".", "/")) or source.count("/") > 1):
        raise ConfigError(
            "name_or_path",
            f"is {source}, which is no folder; give one with config.json, or a hub name",
        )
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    with explained("config", source, local):
        if folder.is_dir():
            check_folder(folder)
        network_config = transformers.AutoConfig.from_pretrained(source, **options)
        _refuse_quantised(getattr(network_config, "quantization_config", None), source)
    with explained("tokenizer", source, local):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    with explained("weights", source, local), _quiet(transformers):
        # without it, version 4 gives float32 and version 5 what the file holds
        options[dtype_option(transformers)] = dtype
        if network_config.model_type == "t5gemma":
            options["is_encoder_decoder"] = False
        model_class = _encoder_class(transformers, network_config)
        options["attn_implementation"] = _attention_of(model_class, network_config)
        encoder, report = model_class.from_pretrained(source, output_loading_info=True, **options)
    _check(tokenizer, encoder, report, name_or_path)
    return tokenizer, encoder


def network_settings(name_or_path: str, local: bool) -> str:
    """Return a hexadecimal hash of what the config.json of an encoder says and its weights do not:
    the activation, the reach of relative positions, constants of norms."""
    from transformers import PretrainedConfig

    with explained("config", name_or_path, local):
        source = os.path.expanduser(name_or_path)
        raw, _ = PretrainedConfig.get_config_dict(source, local_files_only=local)
    kept = {name: raw[name] for name in raw if name not in IDLE and not name.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


# keys of a config.json that have no effect on embeddings
IDLE = ("transformers_version", "torch_dtype", "dtype", "architectures", "task_specific_params")
CODE = re.compile(r"_?[a-z]+_implementation(_internal|_autoset)?")
OURS = (None, "eager", "sdpa")  # the implementations that torch and transformers contain
LAYERS, SIZE = 1024, 1 << 24  # the most layers, and the largest size, that a config may give


def dtype_option(transformers: Any) -> str:
    """Return the name of the option of `from_pretrained` that was called torch_dtype before
    4.56."""
    recent = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    return "dtype" if recent else "torch_dtype"


def check_folder(folder: Path) -> None:
    """Raise ValueError if the config.json in `folder` makes the library fetch or run code, or
    describes a network that fits into no memory. Weights are mere data, but the library takes more
    from their config than sizes."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter_config.json, which names another model to be "
            "loaded; give the folder of a whole encoder"
        )
    whole = read_json(folder / "config.json", "config of an encoder")
    _refuse_quantised(whole.get("quantization_config"), folder)
    parts = [("", whole)]
    while parts:
        where, part = parts.pop()
        for key, value in part.items():
            name = f"{where}{key}"
            if isinstance(value, dict):
                parts.append((f"{name}.", value))
            if CODE.fullmatch(key) and value not in OURS:
                raise ValueError(
                    f"{folder / 'config.json'}: {name} is {value!r}, which chooses code to "
                    f"run; must be one of {OURS}, or left out"
                )
            most = LAYERS if "layers" in key else SIZE
            size = isinstance(value, int) and re.search("layers|size|dim|heads|d_|positions", key)
            if size and value > most:
                raise ValueError(
                    f"{folder / 'config.json'}: {name} is {value}; must be at most {most}"
                )


def _refuse_quantised(settings: object, source: object) -> None:
    """Raise ValueError if a config has quantisation settings: another library would have to unpack
    the weights."""
    if settings:
        raise ValueError(f"{source} is quantised; give the float32, bfloat16 or float16 weights")


def _attention_of(model_class: Any, network_config: Any) -> str:
    """Return the name of the attention to ask for; without a name, the library would take the one
    that the weights' config names."""
    mapping = getattr(model_class, "_model_mapping", {})
    with contextlib.suppress(KeyError):  # AutoModel opens another class
        model_class = mapping[type(network_config)]
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def _encoder_class(transformers: Any, network_config: Any) -> Any:
    """Return the class of the encoder half, or of the whole network if that is no encoder-decoder.
    ValueError if no class is known."""
    model_type = network_config.model_type
    name = ENCODERS.get(model_type)
    if name is None and getattr(network_config, "is_encoder_decoder", False):
        raise ValueError(
            f"no encoder half is known for model_type {model_type!r}; known: {', '.join(ENCODERS)}"
        )
    model_class = getattr(transformers, name or "AutoModel", None)
    if model_class is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {name}; install a newer version"
        )
    return model_class


def _check(tokenizer: Any, encoder: Any, report: dict, source: str) -> None:
    """Raise ConfigError if tensors or the tokenizer's files are absent, or if tokenizer and encoder
    do not belong together."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError("name_or_path", f"is {source}: {problem}")

    missing = sorted(report["missing_keys"])
    if missing:
        raise refuse(
            f"{len(missing)} tensors of {type(encoder).__name__} are absent, first {missing[0]!r};"
            " it is incomplete or of another kind"
        )
    words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    words -= set(tokenizer.all_special_tokens)
    if len(words) < 4:  # without its files, transformers 5 silently makes an empty one
        raise refuse(
            f"its {type(tokenizer).__name__} knows {len(words)} words: the tokenizer's files are"
            " absent; add them, tokenizer.json for example"
        )
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise refuse(
            f"the tokenizer has {len(tokenizer)} entries, the embedding {rows}; they belong to"
            " different models"
        )


def most_tokens(tokenizer: Any, encoder: Any) -> int | None:
    """Return for how many tokens the encoder has positions; None if positions are relative."""
    places = getattr(encoder.config, "max_position_embeddings", None)
    if places is None:
        return None
    for name, part in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            places = part.num_embeddings - part.padding_idx - 1  # RoBERTa counts from padding on
    return min(places, tokenizer.model_max_length)


@contextmanager
def explained(part: str, source: str, local: bool) -> Iterator[None]:
    """Turn whatever the library raises while loading `part` into a ConfigError of one sentence: its
    own errors, and those of safetensors, the hub client and sentencepiece."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = "check the spelling and the connection, or give the folder of a downloaded copy"
        if Path(source).is_dir():
            remedy = (
                "the folder must hold config.json, the tokenizer's files and model.safetensors"
                " (save_pretrained)"
            )
        elif local:
            remedy = (
                "local_files_only is true: download it first, give a folder, or set it to false"
                " while online"
            )
        raise ConfigError(
            "name_or_path", f"is {source}: cannot load its {part}: {reason}; {remedy}"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the library's warnings: it would write pages about the decoder, which we leave out on
    purpose."""
    logging_module = transformers.utils.logging
    level = logging_module.get_verbosity()
    logging_module.set_verbosity_error()
    try:
        yield
    finally:
        logging_module.set_verbosity(level)
