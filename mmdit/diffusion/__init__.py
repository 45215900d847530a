"""Paths between data and noise, training objectives, samplers and guidance. No networks here."""

from mmdit.diffusion.guidance import guided, guided_by_expert
from mmdit.diffusion.objective import (
    Denoise,
    DiffusionConfig,
    FlowMatching,
    FlowMatchingConfig,
    Objective,
    build_objective,
)
from mmdit.diffusion.path import (
    CosinePath,
    LinearPath,
    Path,
    Time,
    ddpm_path,
    shift_time,
)
from mmdit.diffusion.samplers import Callback, Grid, SamplerConfig, Solver, sample, sampling_times

__all__ = [
    "Callback",
    "CosinePath",
    "Denoise",
    "DiffusionConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "Grid",
    "LinearPath",
    "Objective",
    "Path",
    "SamplerConfig",
    "Solver",
    "Time",
    "build_objective",
    "ddpm_path",
    "guided",
    "guided_by_expert",
    "sample",
    "sampling_times",
    "shift_time",
]
