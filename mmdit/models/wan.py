"""The Wan 2.1 / 2.2 diffusion transformer (Wan Team 2025, arXiv 2503.20314), all variants, under
the official names of modules.

How the public weights are used, and where arithmetic is kept in float32, follows the official code.
Where that code wastes work, an exact short cut replaces it: one row of modulation for each distinct
time rather than for each token, and one key for all padding of a text.

Axes: b sample · l token (f, h, w order, w fastest) · t text position · i image token · d width · u
distinct time.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mmdit.interfaces import Denoiser, Picture
from mmdit.models.wan_names import diffusers_name
from mmdit.nn.activations import Activations, recompute
from mmdit.nn.attention import HeadedAttention, attend
from mmdit.nn.context_parallel import Share
from mmdit.nn.norm import upcast, working_dtype

PATCH = (1, 2, 2)
TI2V_CHANNELS = 48  # of the latents of TI2V-5B, which takes a clean first latent frame
Residual = Literal["float32", "autocast"]
ROTARY_BASE = 10_000.0
PRODUCTS = re.compile(
    r"(addmm|mm|bmm|_scaled_mm|_scaled_dot_product_\w+|wait_tensor)"
)  # operators with expensive results; the last one waits for what other processes send


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, named as in the official config.json. `image_dim`: width of CLIP
    states (2.1 I2V), 0 = none; `image_positions`: length of their position table (514 in FLF2V), 0
    = none."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    image_dim: int = 0
    image_positions: int = 0

    @property
    def variant(self) -> str:
        """Return the public name of this architecture. The experts of T2V-A14B and T2V-14B of 2.1
        have the same shapes, and so one name."""
        if self.image_dim:
            return "FLF2V-14B" if self.image_positions else "I2V-14B"
        known = {
            (1536, 16): "T2V-1.3B",
            (3072, 48): "TI2V-5B",
            (5120, 16): "T2V-14B or a T2V-A14B expert",
            (5120, 36): "I2V-A14B expert",
        }
        task = "I2V" if self.in_dim != self.out_dim else "T2V"
        return known.get((self.dim, self.in_dim), f"{task} of width {self.dim}")


class RMSNorm(nn.Module):
    """Norms over the whole width, all heads together, before they are split."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        exact = upcast(x)
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the adjacent pairs `(2i, 2i + 1)` of `x (b, h, l, d)`; tables `(l, d / 2)`."""
    first, second = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        [first * cosine - second * sine, first * sine + second * cosine], -1
    ).flatten(-2)


@lru_cache(maxsize=16)
def rotary_tables(
    frames: int, rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each `(frames · rows · columns, head_dim / 2)` float32. Rows and
    columns turn `head_dim // 6` pairs each, time the rest; every axis has its own frequencies."""
    with torch.inference_mode(False):
        side = 2 * (head_dim // 6)
        angles = []
        for axis, (count, width) in enumerate(
            ((frames, head_dim - 2 * side), (rows, side), (columns, side))
        ):
            ladder = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            shape = [1, 1, 1, len(ladder)]
            shape[axis] = count
            angles.append(
                (torch.arange(count).double()[:, None] * ladder)
                .view(shape)
                .expand(frames, rows, columns, -1)
            )
        turned = torch.cat(angles, -1).flatten(0, 2)
        return turned.cos().float().to(device), turned.sin().float().to(device)


def input_dtype(layers: nn.Sequential) -> torch.dtype:
    """Return the type of the weights of the first linear layer of `layers`."""
    first = next(layer for layer in layers if isinstance(layer, nn.Linear))
    return first.weight.dtype


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Return `(u, width)` float32 for `t (u,)` on 0 … 1000: cosines before sines, computed in
    float64."""
    ladder = 10_000.0 ** (
        -torch.arange(width // 2, dtype=torch.float64, device=t.device) / (width // 2)
    )
    angles = t.double()[:, None] * ladder
    return torch.cat([angles.cos(), angles.sin()], -1).float()


class Attention(HeadedAttention):
    def __init__(self, config: WanConfig, image: bool = False):
        super().__init__()
        dim, self.num_heads = config.dim, config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", h=self.num_heads)

    def joined(self, x: Tensor) -> Tensor:
        return rearrange(x, "b h l d -> b l (h d)")


class SelfAttention(Attention):
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], share: Share | None) -> Tensor:
        """Return attention from all tokens to all, for `x (b, l, d)`. If processes share the clip,
        `x` holds the tokens of this one, which computes some of the heads for all tokens."""
        q, k, v = (
            self.heads(self.norm_q(self.q(x))),
            self.heads(self.norm_k(self.k(x))),
            self.heads(self.v(x)),
        )
        q, k = (rotate_pairs(z, *rotary).to(v.dtype) for z in (q, k))
        if share is None:
            return self.o(self.joined(attend(q, k, v)))
        seen = attend(*share.to_whole(torch.stack([q, k, v]), 3, 2))
        return self.o(self.joined(share.to_part(seen, 2, 1, self.num_heads)))


class CrossAttention(Attention):
    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None, image: Tensor | None) -> Tensor:
        """Return attention to `text (b, t, d)` with `bias (b, 1, 1, t)` on its logits, plus that to
        `image (b, i, d)`."""
        v = self.heads(self.v(text))
        q, k = (
            self.heads(self.norm_q(self.q(x))).to(v.dtype),
            self.heads(self.norm_k(self.k(text))).to(v.dtype),
        )
        result = attend(q, k, v, None if bias is None else bias.to(v.dtype))
        if image is not None:
            keys, values = (
                self.heads(self.norm_k_img(self.k_img(image))),
                self.heads(self.v_img(image)),
            )
            result = result + attend(q, keys.to(values.dtype), values)
        return self.o(self.joined(result))


class Block(nn.Module):
    """Self-attention, cross-attention (not modulated, not gated), MLP. Additions to the residual
    stream are in float32, whatever type it has; norm1 and norm2 have no weights."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = PreciseNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, image=config.image_dim > 0)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU("tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, *arguments) -> Tensor:
        """Compute the block. When compiled for training, it saves only the results of matrix
        products and attention, and recomputes the rest in the backward pass: a third less memory
        than what torch would save."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return checkpoint(
                self.compute, *arguments, use_reentrant=False, context_fn=keep_products
            )
        return self.compute(*arguments)

    def compute(
        self,
        x: Tensor,
        time: Tensor,
        where: Tensor | None,
        rotary,
        text: Tensor,
        bias: Tensor | None,
        image: Tensor | None,
        share: Share | None = None,
    ) -> Tensor:
        """Return the block's output for `x (b, l, d)`, `time (u, 6, d)` and `where (b, l)` (see
        `per_token`)."""
        table = (upcast(self.modulation) + time).unbind(1)
        dtype = working_dtype(text)
        shift, scale, gate = (per_token(part, where) for part in table[:3])
        h = (layer_norm(x, self.eps) * (1 + scale) + shift).to(dtype)
        x = (x + self.self_attn(h, rotary, share) * gate).to(x.dtype)
        x = (x + upcast(self.cross_attn(self.norm3(upcast(x)).to(dtype), text, bias, image))).to(
            x.dtype
        )
        shift, scale, gate = (per_token(part, where) for part in table[3:])
        h = (layer_norm(x, self.eps) * (1 + scale) + shift).to(dtype)
        return (x + self.ffn(h) * gate).to(x.dtype)


def keep_products():
    """Return the contexts with which `checkpoint` saves the results of PRODUCTS. Torch's own list
    of costly operators (of `aggressive_recomputation`) lacks cuDNN's attention."""

    def policy(context, operator, *arguments, **more) -> CheckpointPolicy:
        dear = PRODUCTS.fullmatch(operator.overloadpacket.__name__)
        return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class PreciseNorm(nn.LayerNorm):
    """A layer norm that computes in float32, whatever type its weights have. CUDA's autocast does
    so, a CPU's does not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            upcast(x), self.normalized_shape, upcast(self.weight), upcast(self.bias), self.eps
        )


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(upcast(x), x.shape[-1:], eps=eps)


def per_token(part: Tensor, where: Tensor | None) -> Tensor:
    """Return for each token the row of `part (u, d)` that `where (b, l)` names: `(b, l, d)`.
    Without `where` there is one row a sample, `(b, 1, d)`."""
    return part[:, None] if where is None else part[where]


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(PATCH) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor, where: Tensor | None) -> Tensor:
        shift, scale = (
            per_token(part, where) for part in (upcast(self.modulation) + time[:, None]).unbind(1)
        )
        return self.head((layer_norm(x, self.eps) * (1 + scale) + shift).to(self.head.weight.dtype))


class ImageEmbedding(nn.Module):
    """Turns CLIP states `(b, i, image_dim)` into tokens `(b, i, dim)`. A position table tells two
    pictures apart. The norms have torch's own epsilon, and the GELU is the exact one."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.image_dim
        first, second = nn.Linear(width, width), nn.Linear(width, config.dim)
        self.proj = nn.Sequential(
            PreciseNorm(width), first, nn.GELU(), second, PreciseNorm(config.dim)
        )
        self.emb_pos = (
            nn.Parameter(torch.empty(1, config.image_positions, width))
            if config.image_positions
            else None
        )

    def forward(self, states: Tensor) -> Tensor:
        states = states.to(input_dtype(self.proj))
        if self.emb_pos is not None:
            states = states + self.emb_pos
        before, first, gelu, second, after = self.proj
        # a norm gives float32 whatever the layer behind it is kept in
        return after(second(gelu(first(before(states).to(input_dtype(self.proj))))))


class WanDiT(Denoiser):
    """`model(x, t, text, y=None, clip=None)` → velocity (noise - data).
    `interop.wan_weights.load_dit` fills in the weights.

    `collapse_padding`: attend to one key with a logit bias of log n in place of n equal keys of
    text padding (exact). `checkpointing`: recompute blocks in the backward pass, every
    `checkpoint_every`-th of them. `residual`: the type of the residual stream between blocks,
    float32 as in the official code, or autocast's as in Diffusers (half the memory traffic). The
    attribute `offload_activations`: keep the activations that blocks save for the backward pass in
    the memory of the CPU.
    """

    exact_parts = (
        "time_embedding",
        "time_projection",
        "head",
        "norm",
        "modulation",
        "img_emb",
        "patch_embedding",
    )

    patch = PATCH[1]
    lora_targets = (
        "cross_attn.k",
        "cross_attn.v",
    )  # the default of adapters: how text is read, and no more
    lora_only_if_named = ("self_attn",)  # adapters in these change every picture as a whole

    def __init__(
        self,
        config: WanConfig,
        collapse_padding: bool = True,
        checkpointing: bool = False,
        checkpoint_every: int = 1,
        residual: Residual = "float32",
    ):
        super().__init__()
        self.config, self.collapse_padding, self.residual = config, collapse_padding, residual
        self.checkpointing, self.checkpoint_every = checkpointing, checkpoint_every
        self.offload_activations = False
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_emb = ImageEmbedding(config) if config.image_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def variant(self) -> str:
        return self.config.variant

    @property
    def picture(self) -> Picture:
        if self.config.in_dim == self.config.out_dim:
            return "none"
        return "first_last" if self.config.image_positions else "first"

    @property
    def takes_first_frame(self) -> bool:
        return self.config.in_dim == self.config.out_dim == TI2V_CHANNELS

    def undecayed(self) -> set[str]:
        offsets = ("modulation", "emb_pos")
        return {name for name, _ in self.named_parameters() if name.endswith(offsets)}

    def diffusers_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for ours, _ in chain(self.named_modules(), self.named_parameters()):
            with suppress(KeyError):  # a container: no tensor bears its name
                names[ours] = diffusers_name(ours)
        return names

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        frames, rows, columns = grid
        tokens, keys = frames * rows * columns // math.prod(PATCH), text_tokens + 1

        def weights(*parts: nn.Module) -> int:
            two_d: list[Tensor] = []
            for layer in chain(*(part.modules() for part in parts)):
                if isinstance(layer, nn.Linear):  # its weight may be made from other parameters
                    beside = layer.named_parameters(recurse=False)
                    two_d += [w for name, w in beside if w.ndim == 2 and name != "weight"]
                    two_d.append(layer.weight)
            return sum(w.numel() * (2 + w.requires_grad) for w in two_d)

        total = tokens * weights(self.head.head) + keys * weights(self.text_embedding)
        for block in self.blocks:
            cross = block.cross_attn
            total += tokens * weights(block.self_attn, block.ffn, cross.q, cross.o)
            total += keys * weights(cross.k, cross.v)
            total += 6 * tokens * self.config.dim * (tokens + keys)
        return 2 * total

    @classmethod
    def stored_dtype(cls, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which the parameter `name` is stored when a model is asked for in
        `dtype`: what the official code keeps in float32 stays so."""
        exact = any(part in name for part in cls.exact_parts)
        return torch.promote_types(dtype, torch.float32) if exact else dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        y: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity `(b, out_dim, f, h, w)`, in the type of `x`. `x (b, c, f, h, w)`:
        latents; `t (b,)`, or one per token `(b, l)`: times on 0 … 1000; `text (b, t, text_dim)`:
        zero after each prompt's end, and shorter than `text_len` means padded to it; `y (b, 20, f,
        h, w)`: mask and picture latents of I2V; `clip`: states of its picture, `(b, 257, 1280)`, or
        `(b, 514, 1280)` for FLF2V. ValueError if shapes do not belong together or to this
        variant."""
        config = self.config
        inputs = x if y is None else torch.cat([x, y.to(x)], 1)
        self._check(x, inputs, t, text, y, clip)
        device = x.device.type
        with torch.autocast(device, enabled=False):
            tokens = self.patch_embedding(inputs.to(self.patch_embedding.weight.dtype))
            grid = tokens.shape[2:]
            # Contiguous, since sums with a transposed stream would be transposed, too.
            tokens = upcast(rearrange(tokens, "b d f h w -> b (f h w) d").contiguous())
            values, where = (t, None) if t.ndim == 1 else torch.unique(t, return_inverse=True)
            embedded = self.time_embedding(
                sinusoid(values, config.freq_dim).to(input_dtype(self.time_embedding))
            )
            time = self.time_projection(embedded).unflatten(-1, (6, config.dim))
            image = None if clip is None or self.img_emb is None else self.img_emb(clip)
        text, bias = self.text_keys(text)
        text = self.text_embedding(text.to(input_dtype(self.text_embedding)))
        image = None if image is None else image.to(text.dtype)
        cosine, sine = rotary_tables(*grid, config.dim // config.num_heads, x.device)
        share = self._share(tokens.shape[1])
        if share is not None:
            tokens, where = share.cut(tokens, 1), None if where is None else share.cut(where, 1)
            cosine, sine = share.cut(cosine, 0), share.cut(sine, 0)
        tokens = tokens.to(working_dtype(text)) if self.residual == "autocast" else tokens
        activations = Activations(self)
        for index, block in enumerate(self.blocks):
            arguments = (tokens, time, where, (cosine, sine), text, bias, image, share)
            with activations.of_block(block, tokens):
                again = activations.recomputed(index)
                tokens = recompute(block, *arguments) if again else block(*arguments)
        with torch.autocast(device, enabled=False):
            tokens = self.head(tokens, embedded, where)
        tokens = tokens if share is None else share.gather(tokens, 1)
        p, q, r = PATCH
        size = dict(zip("fhw", grid, strict=True))
        return rearrange(
            tokens, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", p=p, q=q, r=r, **size
        ).to(x.dtype)

    def _share(self, tokens: int) -> Share | None:
        """Return this process's share of a clip. None: it computes the whole clip, which it also
        does if a process would be left without a token or a head."""
        if self.context is None or min(tokens, self.config.num_heads) < self.context.size:
            return None
        return Share(self.context, tokens)

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows of `text (b, t, c)` to attend to and a bias `(b, 1, 1, t')` on their
        logits: each prompt's rows, and one zero row that stands for all its padding up to
        `text_len`. Without collapsing: padded to `text_len`, no bias.
        """
        length = self.config.text_len
        if not self.collapse_padding:
            return F.pad(text, (0, 0, 0, length - text.shape[1])), None
        positions = torch.arange(1, text.shape[1] + 1, device=text.device)
        lengths = (
            (text.ne(0).any(-1) * positions).amax(1)
            if text.shape[1]
            else positions.new_zeros(len(text))
        )
        longest = (
            text.shape[1] if self.training else int(lengths.max())
        )  # in training, do not wait for the device, and keep shapes few
        keys = F.pad(text[:, :longest], (0, 0, 0, 1))
        count = upcast(text.new_zeros(len(text))) + (length - lengths)
        coarse = count.log().bfloat16().to(count.dtype)  # no padding: log 0, nothing attends to it
        rest = torch.where(
            count > 0, coarse - count.log(), 0
        )  # the words take what rounding to bfloat16 took from the logarithm
        bias = rest[:, None].repeat(1, longest + 1)
        bias.masked_fill_(
            torch.arange(longest + 1, device=text.device) >= lengths[:, None], -math.inf
        )
        bias[:, -1] = coarse
        return keys, bias[:, None, None]

    def _check(
        self,
        x: Tensor,
        inputs: Tensor,
        t: Tensor,
        text: Tensor,
        y: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[-1] % PATCH[2] or x.shape[-2] % PATCH[1]:
            raise ValueError(
                f"latents are {tuple(x.shape)}; must be (batch, channels, frames, height, width),"
                " those two even: patches are 2 by 2"
            )
        if inputs.shape[1] != config.in_dim:
            given = f"{x.shape[1]} channels"
            if y is not None:
                given += f" and y of {y.shape[1]}"
            raise ValueError(
                f"latents have {given}, this model ({config.variant}) takes {config.in_dim}: an I2V"
                " model needs y (4 mask channels, 16 of the picture), a T2V model none; latents"
                " must come from the model's VAE"
            )
        tokens = math.prod(x.shape[2:]) // math.prod(PATCH)
        if t.shape not in {(len(x),), (len(x), tokens)}:
            raise ValueError(
                f"t is {tuple(t.shape)}; must be one per sample ({len(x)},) or per token ({len(x)},"
                f" {tokens})"
            )
        if (
            text.ndim != 3
            or len(text) != len(x)
            or text.shape[1] > config.text_len
            or text.shape[2] != config.text_dim
        ):
            raise ValueError(
                f"text is {tuple(text.shape)}; must be ({len(x)}, at most {config.text_len},"
                f" {config.text_dim})"
            )
        tokens = config.image_positions or 257
        if (
            clip is not None
            and self.img_emb is not None
            and clip.shape != (len(x), tokens, config.image_dim)
        ):
            raise ValueError(
                f"clip is {tuple(clip.shape)}; must be ({len(x)}, {tokens}, {config.image_dim})"
            )
        if (clip is not None) != (self.img_emb is not None):
            verb = "needs CLIP states" if self.img_emb is not None else "takes no CLIP states"
            raise ValueError(
                f"{config.variant} {verb}: only I2V and FLF2V of Wan 2.1 have an image embedding"
            )
