"""The causal video autoencoders of Wan 2.1 (4x8x8, Wan Team 2025, arXiv 2503.20314) and 2.2
(4x16x16), under official names.

Everything streams: frame 0 alone, then groups of 4 (decoding: one latent frame each). A `Stream`
carries the last two frames that each convolution saw, so a clip costs the memory of a few frames
and gives what it would give as a whole.

Axes: b sample · c channel · f frame · h row · w column.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MULTIPLES = (1, 2, 4, 4)  # of the base width, by stage
DOWN_TIME = (False, True, True)  # which stage halves the frames, too
BLOCKS = 2
GROUP = 4  # frames of a latent frame, but the first


@dataclass(frozen=True)
class WanVAESizes:
    """`residual`: 2.2, whose stages have shortcuts and whose pixels come in patches of 2x2."""

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
        """From official names and shapes. KeyError: not this network."""
        residual = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
        decoder = shapes["decoder.conv1.weight"][0] // MULTIPLES[-1]
        return WanVAESizes(
            shapes["encoder.conv1.weight"][0], decoder, shapes["conv2.weight"][0], residual
        )


class Stream:
    """The past of one pass over one batch of clips."""

    def __init__(self):
        self.first = True  # chunk
        self.past: dict[nn.Module, Tensor] = {}

    def extend(self, module: nn.Module, x: Tensor, keep: int) -> Tensor:
        """`x (b, c, f, h, w)` behind the last `keep` frames that `module` saw, zeros before the
        first."""
        past = self.past.get(module)
        x = F.pad(x, (0, 0, 0, 0, keep, 0)) if past is None else torch.cat([past.to(x.dtype), x], 2)
        self.past[module] = x[:, :, -keep:]
        return x


class CausalConv(nn.Conv3d):
    """Sees `kernel - 1` frames before its own; rows and columns are padded evenly."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        keep = self.kernel_size[0] - 1
        return super().forward(stream.extend(self, x, keep) if keep else x)


class ChannelNorm(nn.Module):
    """Root mean square norm over channels, axis 1, with a weight."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Tensor, _stream: Stream | None = None) -> Tensor:
        return F.normalize(x, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class Quiet(nn.Module):
    """SiLU, or nothing where the official code has dropout; keeps the places of its sequence."""

    def __init__(self, active: bool = True):
        super().__init__()
        self.active = active

    def forward(self, x: Tensor, _stream: Stream) -> Tensor:
        return F.silu(x) if self.active else x


class Chain(nn.ModuleList):
    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for module in self:
            x = module(x, stream)
        return x


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = Chain(
            [
                ChannelNorm(inputs),
                Quiet(),
                CausalConv(inputs, outputs, 3),
                ChannelNorm(outputs),
                Quiet(),
                Quiet(False),
                CausalConv(outputs, outputs, 3),
            ]
        )
        self.shortcut = CausalConv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.residual(x, stream) + (x if self.shortcut is None else self.shortcut(x, stream))


class FrameAttention(nn.Module):
    """One head within each frame."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width, 2)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, _stream: Stream) -> Tensor:
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        seen = F.scaled_dot_product_attention(q, k, v)
        seen = self.proj(rearrange(seen, "n 1 (h w) c -> n c h w", h=x.shape[3]))
        return x + rearrange(seen, "(b f) c h w -> b c f h w", b=len(x))


def per_frame(function, x: Tensor) -> Tensor:
    return rearrange(
        function(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=len(x)
    )


class Down(nn.Module):
    """Half the rows and columns; with `time` half the frames but the very first."""

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
    """Twice the rows and columns; with `time` twice the frames but the very first, which the
    doubling never sees."""

    def __init__(self, inputs: int, outputs: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(inputs, outputs, 3, padding=1)])
        self.time_conv = CausalConv(inputs, 2 * inputs, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.first:
            x = rearrange(self.time_conv(x, stream), "b (s c) f h w -> b c (f s) h w", s=2)
        return per_frame(
            lambda frames: self.resample[1](
                F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
            ),
            x,
        )


class DownStage(nn.Module):
    """A stage of 2.2: what it computes, and the mean of the groups of inputs that its outputs
    cover."""

    def __init__(self, inputs: int, outputs: int, resample: Down | None, time: bool):
        super().__init__()
        blocks = [Residual(inputs if i == 0 else outputs, outputs) for i in range(BLOCKS)]
        self.downsamples = Chain(blocks + ([resample] if resample else []))
        self.outputs, self.time, self.space = outputs, 1 + time, 1 + (resample is not None)

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
    def __init__(self, inputs: int, outputs: int, resample: Up | None, time: bool):
        super().__init__()
        blocks = [Residual(inputs if i == 0 else outputs, outputs) for i in range(BLOCKS + 1)]
        self.upsamples = Chain(blocks + ([resample] if resample else []))
        self.outputs, self.time, self.last = outputs, 1 + time, resample is None

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


def middle(width: int) -> Chain:
    return Chain([Residual(width, width), FrameAttention(width), Residual(width, width)])


class Encoder(nn.Module):
    def __init__(self, sizes: WanVAESizes):
        super().__init__()
        widths = [sizes.encoder_dim * multiple for multiple in (1, *MULTIPLES)]
        self.conv1 = CausalConv(3 * sizes.patch**2, widths[0], 3)
        stages = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            time = i < len(DOWN_TIME) and DOWN_TIME[i]
            down = Down(outputs, time) if i < len(DOWN_TIME) else None
            if sizes.residual:
                stages.append(DownStage(inputs, outputs, down, time))
            else:
                stages += [
                    Residual(inputs if j == 0 else outputs, outputs) for j in range(BLOCKS)
                ] + ([down] if down else [])
        self.downsamples, self.middle = Chain(stages), middle(widths[-1])
        self.head = Chain(
            [ChannelNorm(widths[-1]), Quiet(), CausalConv(widths[-1], 2 * sizes.channels, 3)]
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.head(
            self.middle(self.downsamples(self.conv1(x, stream), stream), stream), stream
        )


class Decoder(nn.Module):
    def __init__(self, sizes: WanVAESizes):
        super().__init__()
        widths = [
            sizes.decoder_dim * multiple for multiple in (MULTIPLES[-1], *reversed(MULTIPLES))
        ]
        self.conv1, self.middle = CausalConv(sizes.channels, widths[0], 3), middle(widths[0])
        stages = []
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            last, time = i == len(DOWN_TIME), i < len(DOWN_TIME) and DOWN_TIME[::-1][i]
            if sizes.residual:
                stages.append(
                    UpStage(inputs, outputs, None if last else Up(outputs, outputs, time), time)
                )
            else:
                inputs = (
                    inputs if i == 0 else inputs // 2
                )  # 2.1 halves its channels where it enlarges
                stages += [
                    Residual(inputs if j == 0 else outputs, outputs) for j in range(BLOCKS + 1)
                ]
                stages += [] if last else [Up(outputs, outputs // 2, time)]
        self.upsamples = Chain(stages)
        self.head = Chain(
            [ChannelNorm(widths[-1]), Quiet(), CausalConv(widths[-1], 3 * sizes.patch**2, 3)]
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x, stream), stream), stream), stream)


class WanVAE(nn.Module):
    """`encode`: pixels `(b, 3, f, h, w)` in [-1, 1], f = 4n + 1, to means `(b, C, n + 1, h', w')`;
    `decode`: back, not clamped."""

    def __init__(self, sizes: WanVAESizes):
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.conv1 = CausalConv(2 * sizes.channels, 2 * sizes.channels, 1)
        self.conv2 = CausalConv(sizes.channels, sizes.channels, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        p = self.sizes.patch
        pixels = rearrange(pixels, "b c f (h q) (w r) -> b (c r q) f h w", q=p, r=p)
        chunks = [
            pixels[:, :, :1],
            *(pixels[:, :, 1:].split(GROUP, 2) if pixels.shape[2] > 1 else ()),
        ]
        return self.conv1(streamed(self.encoder, chunks), Stream())[:, : self.sizes.channels]

    def decode(self, latents: Tensor) -> Tensor:
        p = self.sizes.patch
        pixels = streamed(self.decoder, self.conv2(latents, Stream()).split(1, 2))
        return rearrange(pixels, "b (c r q) f h w -> b c f (h q) (w r)", q=p, r=p)

    @cached_property
    def diffusers_names(self) -> dict[str, str]:
        """Official name of every parameter → that of Diffusers' AutoencoderKLWan."""
        return {name: _diffusers_name(name, self.sizes.residual) for name in self.state_dict()}


def streamed(network: nn.Module, chunks: list[Tensor]) -> Tensor:
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
    if match := re.match(r"conv([12])\.", name):
        return ("" if match[1] == "1" else "post_") + "quant_conv." + name[6:]
    name = name.replace("coder.conv1.", "coder.conv_in.")
    if residual:
        last = {"down": BLOCKS, "up": BLOCKS + 1}
        place = lambda m: f"resnets.{m[3]}" if int(m[3]) < last[m[1]] else f"{m[1]}sampler"  # noqa: E731
        name = re.sub(
            r"(down|up)samples\.(\d+)\.\1samples\.(\d+)",
            lambda m: f"{m[1]}_blocks.{m[2]}.{place(m)}",
            name,
        )
    else:
        name = name.replace("downsamples.", "down_blocks.")
        place = lambda k: f"resnets.{k % 4}" if k % 4 < 3 else "upsamplers.0"  # noqa: E731
        name = re.sub(
            r"upsamples\.(\d+)", lambda m: f"up_blocks.{int(m[1]) // 4}.{place(int(m[1]))}", name
        )
    for ours, theirs in _INSIDE.items():
        name = re.sub(rf"\.{re.escape(ours)}\.", f".{theirs}.", name)
    return name
