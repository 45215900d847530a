"""Report what this machine offers: versions, GPUs, which fast paths are on and why others are off,
memory and disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

import mmdit
from mmdit.data.dataset.workers import cores
from mmdit.nn import kernels
from mmdit.shipped import shipped_path
from mmdit.training.media import h264
from mmdit.training.step_report import bfloat16_slowdown

GB = 1e9
# For each optional package: what needs it, and the extra of `pip install "mmdit[…]"` that installs
# it.
OPTIONAL = {
    "transformers": ("hf", "text encoders of Hugging Face: T5, UMT5, CLIP"),
    "tokenizers": ("hf", "words as tokens, for UMT5 and the like"),
    "sentencepiece": ("wan", "UMT5 whose folder has no tokenizer.json"),
    "ftfy": ("wan", "captions cleaned as Wan cleans them"),
    "accelerate": ("wan", "releases larger than the GPU"),
    "av": ("video", "videos as sources, and MP4 files as samples"),
    "torchvision": ("jpeg", "JPEG files decoded on the GPU while caching"),
    "timm": ("hf", "feature encoders for metrics and rewards"),
    "pyarrow": ("hf", "parquet files"),
    "huggingface_hub": ("hf", "models of the hub, by push and pull"),
    "diffusers": ("diffusers", "models of ours as pipelines, by export --layout"),
    "starlette": ("ui", "runs and jobs in a browser, by mmdit ui"),
    "tensorboard": ("track", "curves in TensorBoard"),
    "wandb": ("track", "runs in Weights & Biases, by track.type: wandb"),
    "trackio": ("track", "runs in Trackio, by track.type: trackio"),
    "matplotlib": ("track", "curves of runs, by plot-run, report and model cards"),
}
SHIPPED = (
    "assets/moving_shapes_64.safetensors",
    "assets/moving_shapes_448x256.safetensors",
    "configs/quickstart.yaml",
    "VTP/checkpoints/vtp_tiny_f16d64/model.safetensors",
)


def report(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield pairs (subject, finding) for everything that decides what runs here, and how fast."""
    yield "mmdit", f"{mmdit.__version__} in {Path(mmdit.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield from _gpus()
    yield from _fast_paths(device)
    yield "float32 products", _float32_products()
    yield (
        "CPU",
        f"{cores()} cores for this process, {torch.get_num_threads()} threads of torch; bfloat16"
        f" takes {bfloat16_slowdown():.1f} times as long as float32",
    )
    yield "memory", _host_memory()
    yield from _disks()
    missing = [name for name in SHIPPED if shipped_path(name) is None]
    yield "shipped files", f"missing: {', '.join(missing)}" if missing else "all there"
    for package, (extra, purpose) in OPTIONAL.items():
        yield package, _package(package, extra, purpose)


def _gpus() -> Iterator[tuple[str, str]]:
    """Yield a pair for each GPU, or one that says why there is none."""
    if not torch.cuda.is_available():
        reason = "torch sees no GPU" if torch.version.cuda else "this torch is built for CPUs"
        yield "GPU", f"none: {reason}; everything runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{free / GB:.1f} of {total / GB:.1f} GB free"
        yield f"GPU {index}", f"{properties.name}, compute capability {capability}, {memory}"


def _fast_paths(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield, for each fast path, whether it is used on `device`, and if not, why not."""
    if device.type != "cuda":
        off = "off: needs a CUDA GPU; the plain path computes the same"
        yield "fused kernels", off
        yield "compiled blocks", "off by default on a CPU; train.compile: true turns them on"
        yield "CUDA graphs", off
        yield "float8 products", off
        return
    capability = torch.cuda.get_device_capability(device)
    triton = importlib.util.find_spec("triton") is not None
    yield "fused kernels", _needs(kernels.CAPABILITY, capability, triton)
    yield "compiled blocks", "on" if triton else "off: Triton is not installed"
    yield "CUDA graphs", "on for small networks (train.replays), and when sampling"
    yield "float8 products", _needs(kernels.CODES, capability, triton)


def _float32_products() -> str:
    """Return whether torch multiplies float32 matrices in float32: in NVIDIA's images, an
    environment variable makes it use TF32."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        return "in float32"
    return (
        f"in fewer bits: torch's float32_matmul_precision is {precision}, so train.precision fp32"
        " has about three digits on a GPU; unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for all seven"
    )


def _needs(least: tuple[int, int], capability: tuple[int, int], triton: bool) -> str:
    """Return "on", or why a path is off that needs Triton and a compute capability of at least
    `least`."""
    if not triton:
        return "off: Triton is not installed"
    if capability < least:
        return (
            f"off: compute capability {capability[0]}.{capability[1]}, needs {least[0]}.{least[1]}"
        )
    return "on"


def _host_memory() -> str:
    """Return the free and total memory of this machine, as Linux reports them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "unknown on this system"
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    return f"{free / GB:.1f} of {total / GB:.1f} GB free"


def _disks() -> Iterator[tuple[str, str]]:
    """Yield the free space of the current folder, and of the shared memory of data loaders."""
    usage = shutil.disk_usage(".")
    yield "disk", f"{usage.free / GB:.1f} of {usage.total / GB:.1f} GB free in {Path.cwd()}"
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "" if free > 1e9 else "; small: docker run --shm-size=8g gives loaders more"
        yield "shared memory", f"{free / GB:.1f} GB free{advice}"


def _package(name: str, extra: str, purpose: str) -> str:
    """Return the version of an optional package, or what does not work without it."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f'not installed: pip install "mmdit[{extra}]" brings it ({purpose})'
    if name == "av" and not h264():
        return f"{version}, without an H.264 encoder: clips are written as animated PNG"
    return version
