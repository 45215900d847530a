"""A trained model of ours as a pipeline of Diffusers: writing one for `mmdit export --layout
diffusers_pipeline`, and opening it again.

    model_index.json    the classes of the parts, the size that is drawn by default
    pipeline.py         the code that Diffusers runs if it is trusted: it imports this module
    LICENSE             of that code
    transformer/        weights as safetensors, config.json: the network
    text_encoder/       likewise: the captions' encoder
    vae/                likewise: the tokenizer, whose weights are always float32
    scheduler/          scheduler_config.json: objective, solver, guidance

Diffusers asks each part for its code in its own folder, therefore the code lies in all of them.
This module alone needs the package diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from PIL import Image
from torch import Tensor

from mmdit import __version__
from mmdit.config import decode, encode
from mmdit.data.dataset.captions import CaptionsConfig
from mmdit.diffusion import DiffusionConfig, FlowMatchingConfig, SamplerConfig, build_objective
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.files import read_text, refuse_filled_folder, replace_folder
from mmdit.interfaces import Denoiser, LatentSpec, TextEncoder, TextTokens, Tokenizer
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.pixels import to_shown
from mmdit.shipped import shipped_path
from mmdit.text_encoders import TextEncoderConfig, build_text_encoder
from mmdit.tokenizers.vtp import VTPTokenizer, import_vtp
from mmdit.training.learner import Learner
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.weights import check_numbers

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CODE_FILE = "pipeline"
CODE = f'''"""Opens this folder with Diffusers, which runs this file only if it is trusted:

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)

Weights and settings are here; the networks themselves are those of the package mmdit.
"""

try:
    from mmdit.experiment.diffusers_pipeline import (  # noqa: F401
        CaptionEncoder,
        MMDiTPipeline,
        MMDiTScheduler,
        VideoMMDiTModel,
        VTPAutoencoder,
    )
except ImportError as error:
    raise ImportError(
        "this model needs the package mmdit, version {__version__} or later, beside diffusers: in"
        f" a clone of its repository run: pip install -e . ({{error}})"
    ) from error
'''


class VideoMMDiTModel(ModelMixin, Denoiser, ConfigMixin):
    """The denoiser. `model`: the section of the configuration; `latent_channels` and `text_dim`:
    the widths of its inputs."""

    config_name = "config.json"
    _supports_group_offloading = False

    @register_to_config
    def __init__(self, model: dict, latent_channels: int, text_dim: int):
        super().__init__()
        section = decode(VideoMMDiTConfig, model, "model")
        self.network = build_model(section, latent_channels, text_dim)

    def forward(self, x: Tensor, t: Tensor, text: Any, **inputs: Any) -> Tensor:
        return self.network(x, t, text, **inputs)

    def prepare(self, text: TextTokens) -> Any:
        return self.network.prepare(text)

    def can_be_captured(self, training: bool) -> bool:
        return self.network.can_be_captured(training)


class CaptionEncoder(ModelMixin, TextEncoder, ConfigMixin):
    """The text encoder that was trained with the denoiser. `text_encoder`: the section of the
    configuration."""

    config_name = "config.json"
    _supports_group_offloading = False

    @register_to_config
    def __init__(self, text_encoder: dict):
        super().__init__()
        section: Any = decode(TextEncoderConfig, text_encoder, "text_encoder")
        self.network = build_text_encoder(section)
        if not self.network.state_dict():  # else Diffusers writes no file, and then finds none
            self.register_buffer("no_weights", torch.zeros(1, device="cpu"))

    def forward(self, captions: list[str]) -> TextTokens:
        return self.network(captions)


class VTPAutoencoder(ModelMixin, ConfigMixin):
    """The tokenizer. `vtp`: the keys of a `VTPConfig`; `latents`: those of a `LatentSpec`. Like
    everywhere in mmdit, it is moved but never cast: its rotary positions are bfloat16 by design."""

    config_name = "config.json"
    _supports_group_offloading = False

    @register_to_config
    def __init__(self, vtp: dict, latents: dict, fingerprint: str):
        super().__init__()
        code = import_vtp()
        self.network = code.VTPModel(code.VTPConfig(**vtp))
        self.spec = decode(LatentSpec, latents, "latents")
        self.fingerprint = fingerprint

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> VTPAutoencoder:
        kwargs["torch_dtype"] = None
        kwargs.pop("dtype", None)
        return super().from_pretrained(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> VTPAutoencoder:
        """Move the network to a device; types are ignored."""
        places = [arg for arg in args if not isinstance(arg, torch.dtype)]
        kwargs.pop("dtype", None)
        return super().to(*places, **kwargs)

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, on the network's present device."""
        return VTPTokenizer.of_network(self.network, self.spec, self.fingerprint, self.device)

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the raw latents `(B, F, h, w, C)` of `pixels (B, F, 3, H, W)` in [0, 1]."""
        return self.tokenizer.encode(pixels)

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels `(B, F, 3, H, W)` in [0, 1] of raw `latents (B, F, h, w, C)`."""
        return self.tokenizer.decode(latents)


class MMDiTScheduler(SchedulerMixin, ConfigMixin):
    """Holds the settings that decide a sample besides the networks: the objective that they were
    trained with, the solver and the guidance. To change some: `pipe.scheduler =
    MMDiTScheduler.from_config(pipe.scheduler.config, solver="euler")`."""

    @register_to_config
    def __init__(
        self,
        objective: str = "flow_matching",
        diffusion: dict | None = None,
        flow_matching: dict | None = None,
        solver: str = "ab2",
        steps: int = 50,
        eta: float = 0.0,
        shift: float = 1.0,
        grid: str = "even",
        guidance_scale: float = 3.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        negative_prompt: str = "",
    ):
        sampler = {"solver": solver, "steps": steps, "eta": eta, "shift": shift, "grid": grid}
        values = {
            "sampler": sampler,
            "cfg_scale": guidance_scale,
            "cfg_interval": list(guidance_interval),
            "negative_prompt": negative_prompt,
        }
        self.settings: SampleSettings = decode(SampleSettings, values)
        name: Any = objective
        self.objective = build_objective(
            name,
            decode(DiffusionConfig, diffusion or {}, "diffusion"),
            decode(FlowMatchingConfig, flow_matching or {}, "flow_matching"),
        )

    @classmethod
    def of(cls, config: ExperimentConfig) -> MMDiTScheduler:
        """Return the scheduler of a trained model."""
        settings = SampleSettings.of(config.train)
        return cls(
            config.train.objective,
            encode(config.diffusion),
            encode(config.flow_matching),
            **encode(settings.sampler),
            guidance_scale=settings.cfg_scale,
            guidance_interval=list(settings.cfg_interval),
            negative_prompt=settings.negative_prompt,
        )


@dataclass
class ClipPipelineOutput(BaseOutput):
    """The clips of a call: lists of pictures, or one array or tensor `(B, F, …)`."""

    frames: Any


class Interrupted(Exception):
    """Raised when a call is asked to end early; `latents` are those of its last step."""

    def __init__(self, latents: Tensor):
        super().__init__("the call was interrupted")
        self.latents = latents


class MMDiTPipeline(DiffusionPipeline):
    """Draws pictures and clips from prompts, the same as `mmdit sample` with the same seed, through
    the interface of Diffusers."""

    transformer: VideoMMDiTModel
    text_encoder: CaptionEncoder
    vae: VTPAutoencoder
    scheduler: MMDiTScheduler
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: VideoMMDiTModel,
        text_encoder: CaptionEncoder,
        vae: VTPAutoencoder,
        scheduler: MMDiTScheduler,
        width: int = 256,
        height: int = 256,
        num_frames: int = 1,
        fps: int = 16,
        captions: dict | None = None,
        tile: Sequence[int] | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            width=width,
            height=height,
            num_frames=num_frames,
            fps=fps,
            captions=captions or {},
            tile=tile,
        )
        self._interrupt = False

    @classmethod
    def of(cls, pipeline: Pipeline, config: ExperimentConfig, source: object) -> MMDiTPipeline:
        """Return the pipeline for a model that `load_pipeline` loaded from `source`, on the CPU
        with its adapters merged. ValueError for a model that cannot be such a pipeline."""
        learner, tokenizer = pipeline.learner, pipeline.tokenizer
        reason = no_pipeline(config)
        if reason:
            raise ValueError(f"--layout diffusers_pipeline cannot write {source}: {reason}")
        assert isinstance(tokenizer, VTPTokenizer), "no_pipeline names other tokenizers"
        widths = learner.spec.channels, learner.text_encoder.dim
        with torch.device("meta"):
            transformer = VideoMMDiTModel(encode(config.model), *widths)
            text_encoder = CaptionEncoder(encode(config.text_encoder))
            vae = VTPAutoencoder(
                tokenizer.network.config.to_dict(), encode(learner.spec), tokenizer.fingerprint
            )
        transformer.network, text_encoder.network = learner.model, learner.text_encoder
        vae.network = tokenizer.network
        parts = transformer.eval(), text_encoder.eval(), vae.eval(), MMDiTScheduler.of(config)
        width, height, frames, fps = config.sample_size
        tile = list(pipeline.tile) if pipeline.tile else None
        words = encode(pipeline.captions)
        # the other keys only matter in training
        captions = {name: words[name] for name in ("trigger", "separator")}
        return cls(*parts, width, height, frames, fps, captions, tile)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the folder, including the code that opens it again; see `DiffusionPipeline`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        index = folder / self.config_name
        rows = json.loads(read_text(index))
        rows["_class_name"] = [CODE_FILE, type(self).__name__]
        for name, part in self.components.items():
            rows[name] = [CODE_FILE, type(part).__name__]
            (folder / name / f"{CODE_FILE}.py").write_text(CODE, encoding="utf-8")
        index.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        for weights in folder.rglob("*.safetensors"):  # safetensors hides them from others
            weights.chmod(index.stat().st_mode)
        (folder / f"{CODE_FILE}.py").write_text(CODE, encoding="utf-8")
        licence = shipped_path("LICENSE")
        assert licence is not None, "it ships with the package"
        (folder / "LICENSE").write_bytes(licence.read_bytes())

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: the networks use weights outside the modules that hold
        them."""
        raise NotImplementedError(
            "use enable_model_cpu_offload; mmdit sample --offload sequential goes by blocks"
        )

    @property
    def interrupt(self) -> bool:
        """Return whether the current call should end after its present step."""
        return self._interrupt

    def size(
        self, width: int | None, height: int | None, num_frames: int | None
    ) -> tuple[int, int, int]:
        """Return width, height and frames: the given values, or the defaults."""
        asked = {"width": width, "height": height, "num_frames": num_frames}
        sides = [self.config[name] if side is None else side for name, side in asked.items()]
        if min(sides) < 1:
            raise ValueError(f"width, height and num_frames are {sides}; each must be at least 1")
        return sides[0], sides[1], sides[2]

    def drawing(self) -> Pipeline:
        """Return mmdit's pipeline, made from the present parts."""
        spec, captions = self.vae.spec, decode(CaptionsConfig, self.config.captions, "captions")
        learner = Learner(self.transformer, self.text_encoder, self.scheduler.objective, spec)
        tile = self.config.tile and tuple(self.config.tile)
        kept_as: Any = self.transformer.dtype
        precision = PRECISIONS.get(kept_as, "bf16")
        pipeline = Pipeline(learner, self.vae, precision, captions, tile=tile)
        if any(hasattr(part, "_hf_hook") for part in learner.children()):
            pipeline.execution_device = self._execution_device
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw `num_images_per_prompt` samples of each prompt.

        Arguments that are left out are as the model was trained: size, frames, steps, guidance, and
        the negative prompt. A fresh `torch.Generator().manual_seed(S)` draws the same as `mmdit
        sample --seed S` for these prompts; a generator that was used before draws something new; a
        list has one for each sample. `output_type`: pil, np `(B, F, H, W, 3)`, pt `(B, F, 3, H,
        W)`, both in [0, 1], or latent, raw latents for `pipe.vae.decode`. For one frame the result
        has `images` (without the axis F), otherwise `frames`. `callback_on_step_end(pipe, step,
        timestep, {"latents": …})` may return other latents, and can end the call early by
        `pipe._interrupt = True`. ValueError for a size that the model cannot draw, or lists of
        wrong lengths.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; must be pil, np, pt or latent")
        if tuple(callback_on_step_end_tensor_inputs) not in ((), ("latents",)):
            raise ValueError(
                "callback_on_step_end_tensor_inputs is"
                f" {list(callback_on_step_end_tensor_inputs)}; only latents can be looked at"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not (
            isinstance(prompts, list | tuple) and all(isinstance(text, str) for text in prompts)
        ):
            raise ValueError(f"prompt is {prompt!r:.200}; must be a text or a list of texts")
        captions = [text for text in prompts for _ in range(num_images_per_prompt)]
        if not captions:
            raise ValueError("there is nothing to draw: give a prompt, and at least one image each")
        size = self.size(width, height, num_frames)
        seed, seeds = seeds_of(generator, len(captions))
        asked = {
            "steps": num_inference_steps,
            "cfg_scale": guidance_scale,
            "negative_prompt": one_negative(negative_prompt),
        }
        settings = changed_settings(self.scheduler.settings, seed, asked)
        drawing = self.drawing()
        drawing.check(*size, settings)
        self._interrupt = False
        with self.progress_bar(total=settings.sampler.steps) as bar:

            def after_step(done: int, t: float, x: Tensor, clean: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is not None:
                    timestep = self.scheduler.objective.network_time(t)
                    given = {"latents": x}
                    changed = callback_on_step_end(self, done - 1, timestep, given) or {}
                    x = changed.get("latents", x)
                if self._interrupt:
                    raise Interrupted(x)
                return x

            try:
                latents = drawing.latents(
                    captions, *size, settings, seeds=seeds, callback=after_step
                )
            except Interrupted as stopped:
                latents = self.vae.spec.denormalize(stopped.latents)
        result = latents
        if output_type != "latent":
            pixels = drawing.pixels(latents, range(len(captions)), settings)
            result = converted(pixels, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (result,)
        if size[2] == 1 and output_type != "latent":
            return ImagePipelineOutput(images=result)
        return ClipPipelineOutput(frames=result)


# ── what a call is given, and gives ───────────────────────────────────────────────────────────────
def seeds_of(
    generator: torch.Generator | list[torch.Generator] | None, count: int
) -> tuple[int, list[int | None] | None]:
    """Return the seed for a call on `count` samples and, if each has a generator of its own, the
    seed of each."""
    if not isinstance(generator, list | tuple):
        return seed_of(generator), None
    if len(generator) != count:
        raise ValueError(
            f"there are {len(generator)} generators for {count} samples; give one, or one for each"
        )
    return 0, [seed_of(one) for one in generator]


def seed_of(generator: torch.Generator | None) -> int:
    """Return the seed that a generator was made with, if nothing has been drawn from it; later, a
    number drawn from it. Without a generator, return a number from torch's global one. The
    generator has advanced afterwards."""
    if generator is None:
        return int(torch.randint(2**62, ()).item())
    first = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    fresh = torch.equal(generator.get_state(), first.get_state())
    drawn = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    return generator.initial_seed() if fresh else int(drawn)


def one_negative(negative: str | list[str] | None) -> str | None:
    """Return the negative prompt, one for all samples. ValueError if there are several different
    ones."""
    if negative is None or isinstance(negative, str):
        return negative
    if len(set(negative)) != 1:
        raise ValueError(
            f"negative_prompt has {len(set(negative))} different texts; a call takes one for all"
            " prompts: call once for each"
        )
    return negative[0]


def changed_settings(settings: SampleSettings, seed: int, asked: dict[str, Any]) -> SampleSettings:
    """Return the settings with a seed, and with those values in `asked` that are not None."""
    values = {name: value for name, value in asked.items() if value is not None}
    steps = values.pop("steps", settings.sampler.steps)
    sampler: SamplerConfig = replace(settings.sampler, steps=steps)
    return replace(settings, sampler=sampler, seed=seed, **values)


def converted(pixels: Tensor, output_type: str) -> Any:
    """Return `pixels (B, F, 3, H, W)` as pil, np or pt; for single frames without the axis F."""
    shape = "b 1 c h w -> b c h w" if pixels.shape[1] == 1 else "b f c h w -> b f c h w"
    pixels = rearrange(pixels, shape)
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return rearrange(pixels, "... c h w -> ... h w c").numpy()
    shown = rearrange(to_shown(pixels), "... c h w -> ... h w c").numpy()
    if shown.ndim == 4:
        return [Image.fromarray(picture) for picture in shown]
    return [list(map(Image.fromarray, clip)) for clip in shown]


# ── writing ───────────────────────────────────────────────────────────────────────────────────────
def no_pipeline(config: ExperimentConfig) -> str:
    """Return why a model cannot be a pipeline of Diffusers, or ""."""
    if config.model.released:
        return (
            "its weights come from a release of Wan, for which Diffusers has a pipeline; write the"
            " transformer with --layout diffusers"
        )
    if config.experts.enabled:
        return "it is a pair of experts, and a pipeline holds one network; sample it with mmdit"
    if config.model.conditioning != "none":
        return (
            f"it redraws small clips (model.conditioning: {config.model.conditioning}) and draws"
            " none itself; use it with mmdit sample --refine"
        )
    if config.tokenizer.type != "vtp" or config.tokenizer.repo_path is not None:
        return "its tokenizer is not a VTP tokenizer of mmdit's own code; sample it with mmdit"
    if config.text_encoder.released:
        return (
            f"its text encoder ({config.text_encoder.type}) is one of another program, whose files"
            " it does not hold; sample it with mmdit"
        )
    return ""


def save_pipeline(
    pipeline: Pipeline,
    config: ExperimentConfig,
    folder: str | Path,
    dtype: torch.dtype | None,
    source: object,
) -> None:
    """Write a model that was loaded from `source` on the CPU, with adapters merged, as a folder for
    Diffusers; it appears when it is complete. `dtype`: the type of the denoiser and the text
    encoder. ValueError if the folder exists and is not empty, if the model cannot be such a
    pipeline, or if a weight is not finite in this type."""
    refuse_filled_folder(folder)
    whole = MMDiTPipeline.of(pipeline, config, source)
    for part in (whole.transformer, whole.text_encoder):
        part.to(dtype)
        for name, weight in part.named_parameters():
            check_numbers(name, weight, f"{source} as {dtype}" if dtype else source)
    with replace_folder(folder) as unfinished:
        whole.save_pretrained(unfinished)
