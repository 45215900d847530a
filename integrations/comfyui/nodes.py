"""Two nodes: one loads a file that `mmdit export` wrote, the other draws pictures or clips with it.

Exported files lie in `models/mmdit` of ComfyUI, and beside them folders of VTP tokenizers that do
not ship with mmdit. A workflow is data: it chooses among what lies there, and nothing else.
"""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import folder_paths
import torch
from comfy.model_management import get_torch_device, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from einops import rearrange

try:
    from mmdit.diffusion import Solver
    from mmdit.experiment.load import load_pipeline
    from mmdit.training.memory.sampling_offload import offload_pipeline
    from mmdit.training.pipeline import Pipeline, SampleSettings
except ImportError as error:
    raise ImportError(
        "the nodes of mmdit need the package mmdit in the Python of ComfyUI: in a clone of its"
        f" repository run: pip install -e . ({error})"
    ) from error

FOLDER = "mmdit"
AS_IN_FILE = "as in the file"
AS_TRAINED = "as trained"
BATCH = 64  # samples that are drawn at a time, as in `mmdit sample`

_places, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
_places = list(dict.fromkeys([*_places, str(Path(folder_paths.models_dir) / FOLDER)]))
folder_paths.folder_names_and_paths[FOLDER] = (_places, {".safetensors"})


def tokenizers() -> dict[str, Path]:
    """Return the folders of tokenizers beside the models, by their names."""
    places = map(Path, folder_paths.get_folder_paths(FOLDER))
    return {
        file.parent.name: file.parent for place in places for file in place.glob("*/config.json")
    }


class LoadMMDiT:
    """Loads a model with its text encoder and tokenizer, and puts it where ComfyUI computes."""

    CATEGORY = "mmdit"
    DESCRIPTION = "Loads a .safetensors file that `mmdit export` wrote, from models/mmdit."
    RETURN_TYPES = ("MMDIT_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {"file": (folder_paths.get_filename_list(FOLDER),)},
            "optional": {
                "tokenizer": ([AS_IN_FILE, *sorted(tokenizers())],),
                "offload": (
                    ["none", "model", "sequential"],
                    {"tooltip": "weights wait in CPU memory: whole networks, or block by block"},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file: str, tokenizer: str = AS_IN_FILE, offload: str = "none") -> tuple:
        """Return what changes when another file, or tokenizer, is put in the place of one that was
        loaded."""
        files = [Path(folder_paths.get_full_path_or_raise(FOLDER, file))]
        files += sorted(tokenizers()[tokenizer].iterdir()) if tokenizer != AS_IN_FILE else []
        return tuple((status.st_mtime_ns, status.st_size) for status in map(Path.stat, files))

    def load(self, file: str, tokenizer: str = AS_IN_FILE, offload: str = "none") -> tuple:
        """Return what `MMDiTSampler` draws with: mmdit's pipeline, and the config of the file."""
        overrides = []
        if tokenizer != AS_IN_FILE:
            overrides.append(f"tokenizer.name_or_path={tokenizers()[tokenizer]}")
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        device = str(get_torch_device())
        with torch.inference_mode(False):  # weights that were made inside it cannot be moved
            pipeline, config = load_pipeline(path, device, overrides=overrides, offload=offload)
            offload_pipeline(pipeline, offload)
        return ((pipeline, config),)


class MMDiTSampler:
    """Draws `count` pictures or clips of a prompt: those that `mmdit sample` draws of it."""

    CATEGORY = "mmdit"
    DESCRIPTION = (
        "Draws pictures (frames 1) or clips. 0, of guidance -1, is as the model was trained. The"
        " frames of all clips follow each other in images."
    )
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        text = {"multiline": True, "dynamicPrompts": True}
        side = {"default": 0, "min": 0, "max": 8192, "step": 16}
        return {
            "required": {
                "model": ("MMDIT_MODEL",),
                "prompt": ("STRING", {**text, "default": ""}),
                "negative": ("STRING", {**text, "default": "", "tooltip": "empty: as trained"}),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True},
                ),
                "count": ("INT", {"default": 1, "min": 1, "max": 4096}),
                "width": ("INT", side),
                "height": ("INT", side),
                "frames": ("INT", {"default": 0, "min": 0, "max": 4096}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 10000}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
                "solver": ([AS_TRAINED, *get_args(Solver)],),
            }
        }

    def draw(
        self,
        model: tuple,
        prompt: str,
        negative: str,
        seed: int,
        count: int,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance: float,
        solver: str,
    ) -> tuple:
        """Return images `(count · frames, height, width, 3)` in [0, 1], and frames a second."""
        pipeline, config = model
        settings = SampleSettings.of(config.train)
        sampler = replace(settings.sampler, steps=steps or settings.sampler.steps)
        if solver != AS_TRAINED:
            sampler = replace(sampler, solver=solver)
        settings = replace(settings, sampler=sampler, seed=seed)
        if negative:
            settings = replace(settings, negative_prompt=negative)
        if guidance >= 0:
            settings = replace(settings, cfg_scale=guidance, cfg_scale_low=None)
        usual_width, usual_height, usual_frames, fps = config.sample_size
        size = (width or usual_width, height or usual_height, frames or usual_frames)
        return self.images(pipeline, [prompt] * count, size, settings), float(fps)

    def images(
        self,
        pipeline: Pipeline,
        prompts: list[str],
        size: tuple[int, int, int],
        settings: SampleSettings,
    ) -> torch.Tensor:
        """Return the images of `prompts`, while ComfyUI shows the progress and may interrupt."""
        pipeline.check(*size, settings)
        batches = -(-len(prompts) // BATCH)
        bar = ProgressBar(batches * settings.sampler.steps)

        def after_step(*_) -> None:
            throw_exception_if_processing_interrupted()
            bar.update(1)

        pixels = pipeline(prompts, *size, settings, batch_size=BATCH, callback=after_step)
        return rearrange(pixels, "b f c h w -> (b f) h w c").contiguous()


NODE_CLASS_MAPPINGS = {"LoadMMDiT": LoadMMDiT, "MMDiTSampler": MMDiTSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadMMDiT": "Load mmdit model", "MMDiTSampler": "Sample mmdit model"}
