"""I3D (Carreira & Zisserman 2017, 1705.07750) on RGB: Inception V1, inflated in time, with
TensorFlow's padding. The Frechet video distance (Unterthiner et al. 2018, 1812.01717) compares its
class scores on Kinetics-400."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, WIDTH, FEWEST_FRAMES = 224, 400, 9
# The channels of the branches 1x1x1, 3x3x3 (before, after), 3x3x3 (before, after), pool; for a
# pooling layer its kernel and stride.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return `(N, C, T, H, W)` padded with zeros so that windows of `kernel` at `stride` give ⌈side
    / stride⌉ places along each axis. An odd zero goes to the end, as in TensorFlow."""
    pads: list[int] = []
    for side, width, step in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-side // step) - 1) * step + width - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """A convolution over frames, rows and columns, followed by batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(x)))


class Pool(nn.Module):
    """Max pooling with zero padding, which changes no maximum: the inputs come from a ReLU."""

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(padded(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Four branches that read the same input; their outputs are concatenated."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(inputs, channels[0])
        self.b1a, self.b1b = Unit(inputs, channels[1]), Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = Unit(inputs, channels[3]), Unit(channels[3], channels[4], 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(inputs, channels[5])
        self.outputs = channels[0] + channels[2] + channels[4] + channels[5]

    def forward(self, x: Tensor) -> Tensor:
        pairs = (self.b1a, self.b1b), (self.b2a, self.b2b), (self.b3a, self.b3b)
        return torch.cat([self.b0(x), *(second(first(x)) for first, second in pairs)], 1)


class I3D(nn.Module):
    """`network(pixels (N, F, 3, 224, 224) in [-1, 1])` returns `(N, 400)`: class scores before the
    softmax, averaged over time; F is at least 9. Parts have the names of `rgb_imagenet.pt` of
    pytorch-i3d."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        width = 192
        for name, values in BLOCKS.items():
            if name.startswith("MaxPool"):
                self.add_module(name, Pool(*values))
                continue
            block = Mixed(width, values)
            self.add_module(name, block)
            width = block.outputs
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(width, WIDTH, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.transpose(1, 2)
        for name, part in self.named_children():
            if name != "logits":
                x = part(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits.conv3d(x).mean((2, 3, 4))
