"""The causal video autoencoders of Wan 2.1 (4x8x8, Wan Team 2025, arXiv 2503.20314) and 2.2
(4x16x16), under official names.

A clip is processed in chunks: frame 0 alone, then 4 frames at a time (in decoding, one latent frame
at a time). A `Stream` keeps the last one or two frames that each temporal convolution saw, so that
a clip needs the memory of a few frames and gives the same result as if it were processed whole.

Axes: b sample · c channel · f frame · h row · w column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MULTIPLES = (1, 2, 4, 4)  # of the base width, one for each stage
DOWN_TIME = (False, True, True)  # which stage halves the frames, too
BLOCKS = 2
GROUP = 4  # frames that one latent frame stands for; the first stands for one


@dataclass(frozen=True)
class WanVAESizes:
    """The sizes of a Wan VAE. `residual`: it is 2.2, whose stages have shortcuts and whose pixels
    come in patches of 2x2."""

    encoder_dim: int
    decoder_dim: int
    channels: int
    residual: bool

    @property
    def patch(self) -> int:
        return 2 if self.residual else 1

    @property
    def spatial(self) -> int:
        return 8 * self.patch

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> WanVAESizes:
        """Return the sizes, read off official parameter names and shapes. KeyError if it is not
        this network."""
        residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
        return WanVAESizes(
            encoder_dim=shapes["encoder.conv1.weight"][0],
            decoder_dim=shapes["decoder.conv1.weight"][0] // MULTIPLES[-1],
            channels=shapes["conv2.weight"][0],
            residual=residual,
        )


class Stream:
    """The state of one pass over one batch of clips: the past frames of each convolution."""

    def __init__(self):
        self.first = True  # whether the first chunk is processed
        self.past: dict[nn.Module, Tensor] = {}

    def extend(self, module: nn.Module, x: Tensor, keep: int) -> Tensor:
        """Return `x (b, c, f, h, w)` preceded by the last `keep` frames that `module` saw; before
        the first frame these are zeros."""
        past = self.past.get(module)
        x = F.pad(x, (0, 0, 0, 0, keep, 0)) if past is None else torch.cat([past.to(x.dtype), x], 2)
        self.past[module] = x[:, :, -keep:]
        return x


class CausalConv(nn.Conv3d):
    """A convolution that sees `kernel - 1` frames before the present one, and none after it; rows
    and columns are padded on both sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        keep = self.kernel_size[0] - 1
        return super().forward(stream.extend(self, x, keep) if keep else x)


class ChannelNorm(nn.Module):
    """Root mean square norm over the channels, which are axis 1, with a weight."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Tensor, _stream: Stream | None = None) -> Tensor:
        return F.normalize(x, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class SiLU(nn.Module):
    def forward(self, x: Tensor, _stream: Stream) -> Tensor:
        return F.silu(x)


class NoDropout(nn.Module):
    """Takes the place that dropout has in the official code, so that the modules after it get the
    same numbers as there."""

    def forward(self, x: Tensor, _stream: Stream) -> Tensor:
        return x


class Chain(nn.ModuleList):
    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for module in self:
            x = module(x, stream)
        return x


class Residual(nn.Module):
    """Two convolutions with a shortcut beside them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = Chain(
            [
                ChannelNorm(inputs),
                SiLU(),
                CausalConv(inputs, outputs, 3),
                ChannelNorm(outputs),
                SiLU(),
                NoDropout(),
                CausalConv(outputs, outputs, 3),
            ]
        )
        self.shortcut = CausalConv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, stream)
        return self.residual(x, stream) + shortcut


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `function` to the frames `(b f, c, h, w)` of `x`."""
    frames = function(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=len(x))


class FrameAttention(nn.Module):
    """Attention with one head, within each frame."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width, 2)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, _stream: Stream) -> Tensor:
        return x + per_frame(self._attend, x)

    def _attend(self, frames: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(h, "n 1 (h w) c -> n c h w", h=frames.shape[2]))


class Down(nn.Module):
    """Halves rows and columns, and with `time` also the number of frames after the first."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(width, width, 3, stride=2)])
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = per_frame(lambda frames: self.resample[1](F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x
        extended = stream.extend(self.time_conv, x, 1)
        return x if stream.first else self.time_conv(extended)


class Up(nn.Module):
    """Doubles rows and columns, and with `time` also the number of frames after the first, which
    takes no part in that."""

    def __init__(self, inputs: int, outputs: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(inputs, outputs, 3, padding=1)])
        self.time_conv = CausalConv(inputs, 2 * inputs, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.first:
            x = rearrange(self.time_conv(x, stream), "b (s c) f h w -> b c (f s) h w", s=2)
        return per_frame(self._enlarge, x)

    def _enlarge(self, frames: Tensor) -> Tensor:
        large = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
        return self.resample[1](large)


def residuals(count: int, inputs: int, outputs: int) -> list[nn.Module]:
    """Return a list of `count` residual blocks, of which the first changes the width."""
    return [Residual(inputs if i == 0 else outputs, outputs) for i in range(count)]


class DownStage(nn.Module):
    """A stage of 2.2: blocks, then `resample`. The shortcut beside them averages groups of the
    inputs that each output covers."""

    def __init__(self, inputs: int, outputs: int, resample: Down | None, time: bool):
        super().__init__()
        blocks = residuals(BLOCKS, inputs, outputs)
        self.downsamples = Chain(blocks if resample is None else [*blocks, resample])
        self.outputs = outputs
        self.time, self.space = 2 if time else 1, 1 if resample is None else 2

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        near = rearrange(
            padded,
            "b c (f t) (h p) (w q) -> b (c t p q) f h w",
            t=self.time,
            p=self.space,
            q=self.space,
        )
        return self.downsamples(x, stream) + near.unflatten(1, (self.outputs, -1)).mean(2)


class UpStage(nn.Module):
    """A stage of 2.2: blocks, then `resample`. The shortcut beside them repeats the inputs."""

    def __init__(self, inputs: int, outputs: int, resample: Up | None, time: bool):
        super().__init__()
        blocks = residuals(BLOCKS + 1, inputs, outputs)
        self.upsamples = Chain(blocks if resample is None else [*blocks, resample])
        self.outputs, self.time, self.last = outputs, 2 if time else 1, resample is None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.last:
            return self.upsamples(x, stream)
        repeats = self.outputs * self.time * 4 // x.shape[1]
        near = rearrange(
            x.repeat_interleave(repeats, 1),
            "b (c t p q) f h w -> b c (f t) (h p) (w q)",
            t=self.time,
            p=2,
            q=2,
        )
        return self.upsamples(x, stream) + near[:, :, self.time - 1 if stream.first else 0 :]


class Coder(nn.Module):
    """The parts that encoder and decoder share: the middle, the head, and the pass through all
    parts."""

    def __init__(self, width: int, last_width: int, outputs: int):
        super().__init__()
        self.middle = Chain([Residual(width, width), FrameAttention(width), Residual(width, width)])
        self.head = Chain([ChannelNorm(last_width), SiLU(), CausalConv(last_width, outputs, 3)])

    @staticmethod
    def through(x: Tensor, stream: Stream, *parts: nn.Module) -> Tensor:
        for part in parts:
            x = part(x, stream)
        return x


class Encoder(Coder):
    def __init__(self, sizes: WanVAESizes):
        widths = [sizes.encoder_dim * multiple for multiple in (1, *MULTIPLES)]
        super().__init__(widths[-1], widths[-1], 2 * sizes.channels)
        self.conv1 = CausalConv(3 * sizes.patch**2, widths[0], 3)
        stages: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            last = i == len(DOWN_TIME)
            time = not last and DOWN_TIME[i]
            if sizes.residual:
                down = None if last else Down(outputs, time)
                stages.append(DownStage(inputs, outputs, down, time))
            else:
                stages += residuals(BLOCKS, inputs, outputs)
                stages += [] if last else [Down(outputs, time)]
        self.downsamples = Chain(stages)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.through(x, stream, self.conv1, self.downsamples, self.middle, self.head)


class Decoder(Coder):
    def __init__(self, sizes: WanVAESizes):
        widths = [
            sizes.decoder_dim * multiple for multiple in (MULTIPLES[-1], *reversed(MULTIPLES))
        ]
        super().__init__(widths[0], widths[-1], 3 * sizes.patch**2)
        self.conv1 = CausalConv(sizes.channels, widths[0], 3)
        stages: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            last = i == len(DOWN_TIME)
            time = not last and DOWN_TIME[::-1][i]
            if sizes.residual:
                up = None if last else Up(outputs, outputs, time)
                stages.append(UpStage(inputs, outputs, up, time))
            else:  # 2.1 halves the channels where it enlarges
                stages += residuals(BLOCKS + 1, inputs if i == 0 else inputs // 2, outputs)
                stages += [] if last else [Up(outputs, outputs // 2, time)]
        self.upsamples = Chain(stages)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.through(x, stream, self.conv1, self.middle, self.upsamples, self.head)


class WanVAE(nn.Module):
    """The network. `encode` maps pixels `(b, 3, f, h, w)` in [-1, 1], f = 4n + 1, to means `(b, C,
    n + 1, h', w')`; `decode` maps these back to pixels, which are not clamped."""

    def __init__(self, sizes: WanVAESizes):
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.conv1 = CausalConv(2 * sizes.channels, 2 * sizes.channels, 1)
        self.conv2 = CausalConv(sizes.channels, sizes.channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        p = self.sizes.patch
        pixels = rearrange(pixels, "b c f (h q) (w r) -> b (c r q) f h w", q=p, r=p)
        chunks = [pixels[:, :, :1]]
        if pixels.shape[2] > 1:
            chunks += pixels[:, :, 1:].split(GROUP, 2)
        return self.conv1(streamed(self.encoder, chunks), Stream())[:, : self.sizes.channels]

    def decode(self, latents: Tensor) -> Tensor:
        p = self.sizes.patch
        pixels = streamed(self.decoder, self.conv2(latents, Stream()).split(1, 2))
        return rearrange(pixels, "b (c r q) f h w -> b c f (h q) (w r)", q=p, r=p)

    @cached_property
    def diffusers_names(self) -> dict[str, str]:
        """Return the name that each parameter has in Diffusers' AutoencoderKLWan, by its official
        name."""
        return {name: _diffusers_name(name, self.sizes.residual) for name in self.state_dict()}


def streamed(network: nn.Module, chunks: Sequence[Tensor]) -> Tensor:
    """Run `network` over the chunks of a clip in order, and return its outputs joined along
    time."""
    stream, parts = Stream(), []
    for chunk in chunks:
        parts.append(network(chunk, stream))
        stream.first = False
    return torch.cat(parts, 2)


_INSIDE = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
}


def _diffusers_name(name: str, residual: bool) -> str:
    if name.startswith("conv1."):
        return f"quant_{name.replace('conv1', 'conv')}"
    if name.startswith("conv2."):
        return f"post_quant_{name.replace('conv2', 'conv')}"
    name = name.replace("coder.conv1.", "coder.conv_in.")
    if residual:
        name = re.sub(r"(down|up)samples\.(\d+)\.\1samples\.(\d+)", _stage_of_22, name)
    else:
        name = name.replace("downsamples.", "down_blocks.")
        name = re.sub(r"upsamples\.(\d+)", _up_block_of_21, name)
    for ours, theirs in _INSIDE.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _stage_of_22(match: re.Match) -> str:
    way, stage, part = match[1], match[2], int(match[3])
    blocks = BLOCKS if way == "down" else BLOCKS + 1
    place = f"resnets.{part}" if part < blocks else f"{way}sampler"
    return f"{way}_blocks.{stage}.{place}"


def _up_block_of_21(match: re.Match) -> str:
    stage, part = divmod(int(match[1]), BLOCKS + 2)
    place = f"resnets.{part}" if part < BLOCKS + 1 else "upsamplers.0"
    return f"up_blocks.{stage}.{place}"
