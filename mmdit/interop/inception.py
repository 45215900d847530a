"""Inception V3 (Szegedy et al. 2015, 1512.00567), whose pooled features the Frechet inception
distance compares, in two variants that their weight files reveal:

fid          1008 classes: the network of Heusel et al. 2017, as TensorFlow released it in 2015. Its
             average pools leave the border out, and the pool of its last block is a maximum.
torchvision  1000 classes: torchvision's network. Distances in its features have another scale.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Variant = Literal["fid", "torchvision"]
Pool = Literal["average", "whole_average", "maximum", "stride"]
CLASSES: dict[int, Variant] = {1008: "fid", 1000: "torchvision"}
SIZE = 299
ACROSS, DOWN = (1, 7), (7, 1)

# A step of a branch: name, channels, kernel. Two steps in a tuple read the same input, and their
# outputs are concatenated.
Step = tuple[str, int, int | tuple[int, int]]
Branch = list[Step | tuple[Step, Step]]


class Convolution(nn.Module):
    """A convolution without bias, followed by batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block: branches that read the same input, whose outputs are concatenated, followed by the
    pooled input. With the pool `stride`, the block halves rows and columns: the last step of each
    branch has a stride of 2."""

    def __init__(self, inputs: int, branches: list[Branch], pool: Pool, pooled: int = 0):
        super().__init__()
        self.branches, self.pool = branches, pool
        self.outputs = pooled or inputs
        for branch in branches:
            width = inputs
            for step in branch:
                parts = step if isinstance(step[0], tuple) else (step,)
                for name, outputs, kernel in parts:
                    options = {"padding": _around(kernel)}
                    if pool == "stride" and step is branch[-1]:
                        options = {"stride": 2}
                    self.add_module(name, Convolution(width, outputs, kernel, **options))
                width = sum(outputs for _, outputs, _ in parts)
            self.outputs += width
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self.branches:
            y = x
            for step in branch:
                parts = step if isinstance(step[0], tuple) else (step,)
                y = torch.cat([self.get_submodule(name)(y) for name, _, _ in parts], 1)
            results.append(y)
        return torch.cat([*results, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "stride":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "maximum":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        border = self.pool == "whole_average"  # whether padding counts in the mean
        return self.branch_pool(F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=border))


def _around(kernel: int | tuple[int, int]) -> int | tuple[int, int]:
    """Return the padding that keeps the size of the input."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


BRANCHES_OF_35: list[Branch] = [
    [("branch1x1", 64, 1)],
    [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
]


def _branches_of_17(inner: int) -> list[Branch]:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, ACROSS), ("branch7x7_3", 192, DOWN)],
        [
            ("branch7x7dbl_1", inner, 1),
            ("branch7x7dbl_2", inner, DOWN),
            ("branch7x7dbl_3", inner, ACROSS),
            ("branch7x7dbl_4", inner, DOWN),
            ("branch7x7dbl_5", 192, ACROSS),
        ],
    ]


HALVE_35: list[Branch] = [
    [("branch3x3", 384, 3)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
]
HALVE_17: list[Branch] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, ACROSS),
        ("branch7x7x3_3", 192, DOWN),
        ("branch7x7x3_4", 192, 3),
    ],
]
BRANCHES_OF_8: list[Branch] = [
    [("branch1x1", 320, 1)],
    [
        ("branch3x3_1", 384, 1),
        (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
    ],
    [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ],
]


class InceptionV3(nn.Module):
    """`network(pixels (N, 3, 299, 299) in [-1, 1])` returns `(N, 2048)`: the input of the
    classifier. Parts have the names of the files of pytorch-fid, torch-fidelity and torchvision."""

    def __init__(self, variant: Variant):
        super().__init__()
        average: Pool = "average" if variant == "fid" else "whole_average"
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        width = 192
        for name, branches, pool, pooled in (
            ("5b", BRANCHES_OF_35, average, 32),
            ("5c", BRANCHES_OF_35, average, 64),
            ("5d", BRANCHES_OF_35, average, 64),
            ("6a", HALVE_35, "stride", 0),
            ("6b", _branches_of_17(128), average, 192),
            ("6c", _branches_of_17(160), average, 192),
            ("6d", _branches_of_17(160), average, 192),
            ("6e", _branches_of_17(192), average, 192),
            ("7a", HALVE_17, "stride", 0),
            ("7b", BRANCHES_OF_8, average, 192),
            ("7c", BRANCHES_OF_8, "maximum" if variant == "fid" else average, 192),
        ):
            block = Mixed(width, branches, pool, pooled)
            self.add_module(f"Mixed_{name}", block)
            width = block.outputs

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))
