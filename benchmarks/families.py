"""Where the time of a step goes, by family of kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch

FAMILIES = (  # the first pattern found in a kernel's name decides
    ("attention", r"flash|fmha|attention|sdpa|cudnn|_group_kernel|_text_kernel"),
    ("matmul", r"gemm|cutlass|nvjet|cublas|xmma|splitk|wgmma|triton_tem|addmm|::mm|scaled_mm"),
    ("norm/elementwise", r"triton"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("copy", r"memcpy|memset|copy|cat_?array"),
)


def family(kernel: str) -> str:
    """Return the family of a kernel by its name: one of FAMILIES, or norm/elementwise for all
    else."""
    return next(
        (name for name, pattern in FAMILIES if re.search(pattern, kernel.lower())),
        "norm/elementwise",
    )


def by_family(
    work: Callable[[], object], device: torch.device, repeats: int = 3, longest: int = 20
) -> dict:
    """Return `{"ms": {family: milliseconds of one call}, "idle_ms": …, "kernels": the longest}`.

    On a CPU the times are those of the operators themselves."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        for _ in range(repeats):
            work()
        if cuda:
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()  # milliseconds of a call by kernel
    begin, end = float("inf"), 0.0
    for event in profiler.events():
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent[event.name] += (
            (event.time_range.elapsed_us() if cuda else event.self_cpu_time_total) / repeats / 1e3
        )
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    families: Counter[str] = Counter()
    for name, time in spent.items():
        families[family(name)] += time
    busy = sum(families.values())
    return {
        "ms": {name: round(time, 2) for name, time in families.most_common()},
        "idle_ms": round(max(0.0, (end - begin) / repeats / 1e3 - busy), 2),
        "kernels": [[name[:80], round(time, 2)] for name, time in spent.most_common(longest)],
    }
