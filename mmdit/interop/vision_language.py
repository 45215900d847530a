"""Captions by a local vision-language model of the transformers library, loaded from safetensors
alone. The model runs no code of its own."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmdit.foreign import explain_errors
from mmdit.text_encoders.transformers_loading import check_folder, dtype_option

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
WHAT = "vision-language model of transformers (config, processor and safetensors)"


class LocalCaptioner:
    """`captioner(pictures, prompt, seed)` returns the text of the model in `folder` about the
    pictures, and whether it was cut at `max_tokens`. With a temperature, tokens are sampled, keyed
    by the seed; without one, the most likely are taken. ValueError if there is no such model, or it
    cannot be loaded."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: str = "auto",
        max_tokens: int = 256,
        temperature: float = 0.0,
    ):
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"--model is {folder}, which is no folder with a config.json; give that of a"
                " downloaded model, or --server with the name of a model there"
            )
        self.folder, self.device = folder, device
        self.max_tokens, self.temperature = max_tokens, temperature
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.dtype = DTYPES[dtype] or half
        with explain_errors(folder, WHAT):
            check_folder(folder)
        self.processor, self.model = self._load()

    def _load(self) -> tuple[Any, Any]:
        """Return the processor and the model."""
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                f"a local captioner needs the transformers library ({error}): pip install"
                " transformers"
            ) from None
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with (
            _own_code_refused(self.folder),
            explain_errors(self.folder, WHAT),
            _quiet(transformers),
        ):
            config = transformers.AutoConfig.from_pretrained(self.folder, **options)
            processor = transformers.AutoProcessor.from_pretrained(self.folder, **options)
            options[dtype_option(transformers)] = self.dtype
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                self.folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            missing = sorted(report["missing_keys"])
            if missing:
                raise ValueError(
                    f"{self.folder} lacks {len(missing)} tensors of {type(model).__name__}, first"
                    f" {missing[0]}: it is incomplete, or no vision-language model"
                )
        return processor, model.to(self.device).eval()

    @property
    def identity(self) -> dict[str, object]:
        """Return what determines its captions: the name of the folder, a hash of its config and of
        the sizes of its files, and the settings of the captioner."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(self.folder.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
        return {
            "model": self.folder.resolve().name,
            "weights": digest.hexdigest()[:16],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def __call__(self, pictures: list[Image.Image], prompt: str, seed: int) -> tuple[str, bool]:
        """Return a caption and whether it was cut; see the class."""
        inputs = self._inputs(pictures, prompt).to(self.device, self.dtype)
        choice: dict[str, Any] = {"do_sample": False, "temperature": None}
        if self.temperature:
            choice = {"do_sample": True, "temperature": self.temperature}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_tokens, top_p=None, top_k=None, **choice
            )[0]
        given = inputs["input_ids"][0] if "input_ids" in inputs else tokens[:0]
        if len(given) and torch.equal(tokens[: len(given)], given):  # some repeat their input
            tokens = tokens[len(given) :]
        text = self.processor.batch_decode(tokens[None], skip_special_tokens=True)[0]
        return text, len(tokens) >= self.max_tokens and int(tokens[-1]) not in self._ends()

    def _inputs(self, pictures: list[Image.Image], prompt: str) -> Any:
        """Return the model's inputs: a chat message with all pictures; for a model without a chat
        template, the middle picture and the prompt."""
        if not getattr(self.processor, "chat_template", None):
            middle = pictures[len(pictures) // 2]
            return self.processor(images=middle, text=prompt, return_tensors="pt")
        content: list[dict[str, Any]] = [
            {"type": "image", "image": picture} for picture in pictures
        ]
        message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
        return self.processor.apply_chat_template(
            [message],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _ends(self) -> set[int]:
        """Return the numbers of the tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


@contextlib.contextmanager
def _own_code_refused(folder: Path) -> Iterator[None]:
    """Replace the library's error about a model with code of its own: it advises to run that
    code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{folder} brings code of its own, which is not run: take a model that transformers"
            " itself knows, or run it as a server and give --server"
        ) from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the library's warnings and progress bars during loading."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
