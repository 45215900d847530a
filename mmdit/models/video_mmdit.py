"""The factorized Video MMDiT: window attention in space, attention in time, attention to text and
an MLP, each modulated.

Axes: b sample · f frame · r row · c column · n window · k place in the window · d width · t text
token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit import rng
from mmdit.config import MOST_BLOCKS, ConfigError, least, most
from mmdit.interfaces import Conditioning, Denoiser, ModelSection, TextTokens
from mmdit.models.routing import TreadConfig, draw_keep, route
from mmdit.nn import kernels
from mmdit.nn.activations import Activations, checkpointing_options, recompute
from mmdit.nn.attention import CrossAttention, SpatialAttention, TemporalAttention
from mmdit.nn.conditioning import (
    CropEmbedding,
    LowResolution,
    PooledText,
    PreparedText,
    TextContext,
    TimeEmbedding,
    repeated_to_batch,
)
from mmdit.nn.context_parallel import Share
from mmdit.nn.feedforward import GELU, SwiGLU
from mmdit.nn.norm import Modulation, add_gated, add_norm, no_change, upcast, working_dtype
from mmdit.nn.position import FourierPosition, FramePosition, JointPosition
from mmdit.nn.products import Float8Linear
from mmdit.nn.tiles import Frames, frame_tables
from mmdit.nn.window import (
    Pattern,
    Places,
    WindowGrid,
    coordinates,
    coordinates_of_tiles,
    place_tables,
)

SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 18),
}  # dim, depth, heads of width 64
MLPS: dict[str, type[SwiGLU] | type[GELU]] = {"swiglu": SwiGLU, "gelu": GELU}
if TYPE_CHECKING:
    Chosen = int
else:
    Chosen = int | None  # null in YAML means the default; a config object holds the number
UNSET: Any = None
SUBLAYERS = 4


@dataclass(frozen=True)
class VideoMMDiTConfig(ModelSection):
    """The factorized Video MMDiT, trained from scratch."""

    # Chooses the Video MMDiT.
    type: Literal["video_mmdit"] = "video_mmdit"
    # A named size: S is 384 wide, 12 blocks deep, with 6 heads; B 768, 12, 12; L 1024, 24, 16; XL
    # 1152, 28, 18.
    size: Literal["S", "B", "L", "XL"] | None = None
    # Width, where no `size` is named; null is that of S.
    dim: Chosen = UNSET
    # Number of blocks, likewise.
    depth: Chosen = UNSET
    # Heads of attention, likewise; must divide `dim`.
    num_heads: Chosen = UNSET
    # The largest side of a window of attention, in latent cells.
    window_size: int = 8
    # What attention in space sees, block by block and then again from the first: `window`,
    # `shifted` (windows moved by half) or the whole `frame`. See docs/speed.md for grids of several
    # windows.
    spatial: tuple[Pattern, ...] = ("window", "shifted", "window", "frame")
    # Width of the MLP as a multiple of `dim`.
    mlp_ratio: float = 4.0
    # The probability with which elements of the outputs of attention and MLP are set to zero in
    # training.
    dropout: float = 0.0
    # The form of the MLP.
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    # Normalise queries and keys, which keeps attention stable.
    qk_norm: bool = True
    # Give the frames positions. False makes them a set: the control that cannot tell left from
    # right motion.
    temporal_position: bool = True
    # Also tell each token its place and its frame together, by products of their features. The sign
    # of a motion is learnt sooner (docs/results.md).
    joint_position: bool = False
    # The distance in time between two frames. Stages that show the same seconds at rising frame
    # rates share one clock with it: 1 where every fifth frame is shown, 0.2 where all are.
    frame_step: float = 1.0
    # Let the mean of the caption's tokens enter the modulation, too.
    pooled_text: bool = True
    # Tell the model which part of its picture each sample shows; in sampling, that is the whole.
    crop: bool = False
    # What the model is given of a whole clip: nothing, or a small version of the clip, which it
    # redraws (`--refine` of `mmdit sample`). Caches must hold that: `tokenizer.low_resolution`.
    conditioning: Conditioning = "none"
    # The highest noise level that the small clip gets in training. The model is told the level, and
    # learns to redraw what such noise hides, mistakes of the small model included.
    augmentation: float = 0.5
    # The type of the residual stream between blocks: float32, or that of autocast, which halves the
    # memory traffic.
    residual: Literal["float32", "autocast"] = "float32"
    # The type of the blocks' matrix products in training: that of `train.precision`, or float8,
    # which takes half the time.
    products: Literal["autocast", "float8"] = "autocast"
    # Freeze the model, and train the text encoder alone.
    freeze: bool = False
    # Recompute blocks in the backward pass: less memory, up to a third more time.
    checkpointing: bool = False
    # With `checkpointing`, recompute every n-th block only: 2 saves half as much.
    checkpoint_every: int = 1
    # Keep the activations that blocks save for the backward pass (with `checkpointing`, their
    # inputs) in the memory of the CPU; they return to the GPU while the block behind computes
    # backward.
    offload_activations: bool = False

    def __post_init__(self):
        for name, standard in zip(("dim", "depth", "num_heads"), SIZES[self.size or "S"]):
            value = getattr(self, name)
            if self.size is not None and value not in (None, standard):
                message = (
                    f"is {value}, but size {self.size} means {standard}; leave out {name} or write"
                    " size: null"
                )
                raise ConfigError(name, message)
            object.__setattr__(self, name, standard if value is None else value)
            if getattr(self, name) < 1:
                raise ConfigError(name, f"is {value}; must be at least 1")
        if self.dim % self.num_heads or self.head_dim % 4:
            message = (
                f"is {self.num_heads}, but dim {self.dim} must split into heads of a width"
                " divisible by 4"
            )
            raise ConfigError("num_heads", f"{message}; change one of the two")
        least(self, 1, "window_size", "checkpoint_every")
        most(self, MOST_BLOCKS, "depth", "mlp_ratio")
        if not self.spatial:
            raise ConfigError(
                "spatial", "is empty; name what attention in space sees: window, shifted or frame"
            )
        if not 0 < self.frame_step < math.inf:
            raise ConfigError(
                "frame_step", f"is {self.frame_step}; must be above 0 and finite; 1 is usual"
            )
        if not self.mlp_ratio > 0:
            raise ConfigError("mlp_ratio", f"is {self.mlp_ratio}; must be above 0")
        if not 0 <= self.augmentation < 1:
            raise ConfigError(
                "augmentation", f"is {self.augmentation}; must be from 0 (none) to below 1"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", f"is {self.dropout}; must be from 0 to below 1")
        hidden = MLPS[self.mlp].hidden(self.dim, self.mlp_ratio)
        if self.products == "float8" and (self.dim % 16 or hidden % 16):
            raise ConfigError(
                "products",
                f"is float8, for which widths must be multiples of 16, but dim is {self.dim} and"
                f" the MLP {hidden} wide; change dim or mlp_ratio, or leave it out",
            )

    @property
    def takes_place(self) -> bool:
        return True

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def lengths(self) -> dict[str, int]:
        hidden = MLPS[self.mlp].hidden(self.dim, self.mlp_ratio)
        return {"dim": self.dim, "dim · mlp_ratio": hidden}

    def without_part(self) -> dict[str, tuple[str, ...]]:
        rows = (
            (self.checkpointing, "model.checkpointing is false", ("checkpoint_every",)),
            (
                self.temporal_position,
                "model.temporal_position is false: frames have no number",
                ("joint_position", "frame_step"),
            ),
            (self.conditioning != "none", "model.conditioning is none", ("augmentation",)),
        )
        return {reason: keys for has_part, reason, keys in rows if not has_part}

    def memory_options(self, frozen: bool) -> list[str]:
        return checkpointing_options(self.checkpointing, self.offload_activations)

    def pattern(self, block: int) -> Pattern:
        """Return what the attention in space of the block number `block` sees."""
        return self.spatial[block % len(self.spatial)]


class Block(nn.Module):
    """Space, time, text, MLP, each behind AdaLN-Zero (Peebles & Xie 2023): with closed gates the
    block is the identity. The modulation is the model's shared one plus this block's table (as in
    PixArt-α, Chen et al. 2023, section 2.3).
    """

    def __init__(self, config: VideoMMDiTConfig):
        super().__init__()
        linear = Float8Linear if config.products == "float8" else nn.Linear
        attention = (config.dim, config.num_heads, config.qk_norm, config.dropout, linear)
        self.spatial = SpatialAttention(*attention)
        self.temporal = TemporalAttention(*attention)
        self.cross = CrossAttention(*attention)
        self.mlp = MLPS[config.mlp](config.dim, config.mlp_ratio, config.dropout, linear)
        self.table = nn.Parameter(torch.zeros(3 * SUBLAYERS, config.dim))

    def forward(
        self,
        x: Tensor,
        change: Tensor | None,
        gate: Tensor | None,
        modulation: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        valid: Tensor,
        places: Places,
        frames: Frames,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream after this block in three parts, `x`, `change` and `gate`,
        whose sum `x + gate · change` is left to the layer that norms it next. The stream comes in
        the same form, or as `x` alone. `x`, `change (b, f, n, k, d)`; `modulation (b, 12, d)`;
        `text (b, t, d)` or its keys and values; `valid (b, t)`."""
        parts = rearrange(modulation + self.table, "b m d -> m b 1 1 1 d").unbind()
        space, motion, caption, mlp = (
            Modulation(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)
        )
        x, seen = add_norm(x, change, gate, space)
        seen = self.spatial(seen, places)
        if x.shape[1] > 1 or frames.share is not None:
            x, seen = add_norm(x, seen, space.gate, motion)
            x, seen = add_norm(x, self.temporal(seen, frames), motion.gate, caption)
        else:
            # A single frame needs no attention along time. The gradients of these weights are then
            # zero rather than missing: DDP would wait for them.
            zero = sum(weight.flatten()[:0].sum() for weight in self.temporal.parameters())
            x, seen = add_norm(x, seen, space.gate + zero, caption)
        x, seen = add_norm(x, self.cross(seen, text, valid), caption.gate, mlp)
        return x, self.mlp(seen), mlp.gate


class VideoMMDiT(Denoiser):
    """`model(x, t, text) → like x`; images are clips of one frame. The initial output is exactly
    zero, and a model trained on single frames only gives the same output for each frame of a clip:
    its temporal gates are still exactly zero.
    """

    def __init__(
        self,
        config: VideoMMDiTConfig,
        latent_channels: int,
        text_dim: int,
        tread: TreadConfig | None = None,
    ):
        super().__init__()
        self.config, self.latent_channels, self.text_dim = config, latent_channels, text_dim
        self.tread = tread if tread is not None and tread.enabled else None
        self.span = self.tread.span(config.depth) if self.tread else None
        dim = config.dim
        self.input = nn.Linear(latent_channels, dim)
        self.position = FourierPosition(dim)
        self.frame = FramePosition(dim)
        self.joint_position = JointPosition(dim) if config.joint_position else None
        self.time = TimeEmbedding(dim)
        self.text = TextContext(text_dim, dim)
        self.pooled = PooledText(dim) if config.pooled_text else None
        self.crop = CropEmbedding(dim) if config.crop else None
        self.conditioning = config.conditioning
        self.low_resolution = (
            LowResolution(latent_channels, dim) if config.conditioning == "low_resolution" else None
        )
        self.modulation = nn.Linear(dim, 3 * SUBLAYERS * dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, latent_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw matrices by uniform Xavier, and set to zero what must have no effect at the start:
        modulation (and so the gates), frame numbers, crop, small clip and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, (TextContext, PooledText)):
                nn.init.normal_(module.null, std=0.02)
        for module in (self.modulation, self.final_modulation, self.output):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.frame.embed.weight)
        if self.joint_position is not None:
            nn.init.zeros_(self.joint_position.embed.weight)
        for part in (self.crop, self.low_resolution):
            if part is not None:
                part.init_weights()

    @torch.no_grad()
    def number_frames(self, seed: int) -> None:
        """Draw the weights of the frame numbers, which are zero until the first training on clips
        (pictures have no use for them, and must leave every frame of a clip alike). If they started
        at zero then, or if there were attention along time alone, training would soon find the axis
        of a motion, but its sign would stay a coin flip for thousands of steps: it depends on text,
        frame and place only together (tests/test_motion.py)."""
        self.frame.draw(rng.generator(seed, "frame numbers"))
        if self.joint_position is not None:
            self.joint_position.draw(rng.generator(seed, "joint position"))

    def undecayed(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".table")}

    def can_be_captured(self, training: bool) -> bool:
        if self.context is not None:  # a replay would not wait for the other processes
            return False
        return not training or not (self.config.offload_activations or self.config.dropout)

    def _share(self, frames: int, grid: WindowGrid, keep: Tensor | None) -> Share | None:
        """Return this process's share of a clip. None: it computes the whole clip, which it also
        does if a process would be left without a frame or a place (pictures)."""
        places = math.prod(grid.counts) * (grid.places if keep is None else len(keep))
        if self.context is None or min(frames, places) < self.context.size:
            return None
        return Share(self.context, frames)

    def windows(self, rows: int, columns: int) -> WindowGrid:
        return WindowGrid.fit(rows, columns, self.config.window_size)

    def draw_keep(self, rows: int, columns: int, seed: int, step: int) -> Tensor | None:
        if self.tread is None or not self.training:
            return None
        grid = self.windows(rows, columns)
        return draw_keep(self.tread, (grid.height, grid.width), seed, step)

    def prepare(self, text: TextTokens) -> PreparedText:
        """Return all that depends on `text` alone, under the autocast of the calls that will use
        it. Keys and values are `2 · depth · b · t · d` numbers."""
        read = self._read(text)
        context = [
            block.cross.keys_values(tokens)
            for block, tokens in zip(self.blocks, read.context, strict=True)
        ]
        return replace(read, context=context)

    def _read(self, text: TextTokens) -> PreparedText:
        if text.embeddings.shape[-1] != self.text_dim:
            raise ValueError(
                f"text tokens are {text.embeddings.shape[-1]} wide, the model was made for"
                f" {self.text_dim}; use the text encoder it was trained with"
            )
        tokens, valid = self.text(text)
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = self.pooled(tokens[:, 1:], valid[:, 1:]) if self.pooled is not None else 0
        return PreparedText([tokens] * len(self.blocks), valid, pooled)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: TextTokens | PreparedText,
        keep: Tensor | None = None,
        crop: Tensor | None = None,
        small: Tensor | None = None,
        small_t: Tensor | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, shaped like `x (b, f, r, c, latent_channels)`. `t (b,)`: times in
        0…1000; `text`: captions, `prepare`d or not; `keep`: from `draw_keep`. `crop (b, 4)`: for
        `model.crop`, see `CropEmbedding`; None is a whole picture. `small`, shaped like `x`, and
        `small_t (b,)` in 0…1000: for `model.conditioning`, the small clip's latents, enlarged and
        noised to that time. `place (b, 5)`: where in its clip each sample lies, see
        `diffusion.tiling`; None is a whole clip. `small`, `small_t` and `place` may have fewer rows
        than `x`, which are repeated. ValueError if shapes do not belong together."""
        self._check(x, t, len(text.valid))
        self._check_condition(x, small, small_t)
        grid = self.windows(*x.shape[2:4])
        exact = torch.promote_types(self.input.weight.dtype, torch.float32)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # few vectors, which steer all tokens: in full precision
            time = self.time(t)
            if self.crop is not None:
                whole = nn.functional.pad(t.new_zeros(1, 2), (0, 2), value=1.0)
                time = time + self.crop(whole if crop is None else crop)
            elif crop is not None:
                raise ValueError(
                    "crop is given, but the model was built without; set model.crop: true"
                )
            if self.low_resolution is not None and small_t is not None:
                time = time + repeated_to_batch(self.low_resolution.level(small_t), x)
            where = self._where(x, grid, place, exact)
        read = text if isinstance(text, PreparedText) else self._read(text)
        with torch.autocast(x.device.type, enabled=False):
            condition = nn.functional.silu(time + read.pooled)
            modulation = rearrange(
                upcast(self.modulation(condition)), "b (m d) -> b m d", m=3 * SUBLAYERS
            )
            last = rearrange(
                upcast(self.final_modulation(condition)), "b (m d) -> m b 1 1 1 d", m=2
            )
        dtype, share = x.dtype, self._share(x.shape[1], grid, keep)
        if share is not None:
            x, where = share.cut(x, 1), share.cut(where, -4)
            small = None if small is None else share.cut(small, 1)
        h = self.input(grid.partition(x.to(self.input.weight.dtype))) + where
        if self.low_resolution is not None and small is not None:
            clip = self.low_resolution.clip(grid.partition(small.to(self.input.weight.dtype)))
            h = h + repeated_to_batch(clip, x)
        h = h.to(working_dtype(h)) if self.config.residual == "autocast" else h
        _, seen = add_norm(
            *self._run_blocks(h, grid, exact, keep, modulation, read, share),
            Modulation(last[0], last[1], last[1]),
        )
        prediction = grid.merge(self.output(seen)).to(dtype)
        return prediction if share is None else share.gather(prediction, 1)

    def _where(
        self, x: Tensor, grid: WindowGrid, place: Tensor | None, exact: torch.dtype
    ) -> Tensor:
        """Return the embedding of the places and frames of the tokens of `x (b, f, r, c, …)`: `(f
        or 1, n, k, d)`, or `(b, f or 1, n, k, d)` for samples at `place`."""
        frames, step, first = x.shape[1], self.config.frame_step, None
        at = coordinates(grid, x.device, exact)
        if place is not None:
            at, first = coordinates_of_tiles(grid, place, exact), place[:, 0]
        if not self.config.temporal_position:
            frames, first = 1, None
        where = self.position(at).unsqueeze(-4)
        where = where + self.frame(frames, step, first)[..., None, None, :]
        if self.joint_position is not None:
            where = where + self.joint_position(at, frames, step, first)
        return where if place is None else repeated_to_batch(where, x)

    def _run_blocks(
        self,
        x: Tensor,
        grid: WindowGrid,
        exact: torch.dtype,
        keep: Tensor | None,
        modulation: Tensor,
        text: PreparedText,
        share: Share | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the residual stream after all blocks, in the three parts of `Block.forward`; with
        `share`, for the frames of this process."""
        if self.config.products == "float8" and self.training:
            kernels.warn_without_codes(x.device)
        table = (self.config.head_dim, x.device, exact)
        layouts = {pattern: place_tables(grid, pattern, *table) for pattern in self.config.spatial}

        activations = Activations(self.config)

        def run(x: Tensor, first: int, end: int, layouts: dict[Pattern, Places]):
            step = self.config.frame_step if self.config.temporal_position else None
            count, places = x.shape[1], x.shape[2] * x.shape[3]
            if share is not None:  # along time: all frames, at a part of the places
                count, places = share.length, share.part_of(places)
            frames = frame_tables(count, places, step, *table)._replace(share=share)
            change = gate = None
            if first < end and torch.is_grad_enabled() and not self.config.checkpointing:
                change, gate = no_change(x, modulation)
            for index in range(first, end):
                block = self.blocks[index]
                rest = (
                    modulation,
                    text.context[index],
                    text.valid,
                    layouts[self.config.pattern(index)],
                    frames,
                )
                with activations.of_block(block, x):
                    if activations.recomputed(index):
                        x = add_gated(x, change, gate)
                        x, change, gate = recompute(block, x, None, None, *rest)
                    else:
                        x, change, gate = block(x, change, gate, *rest)
            return x, change, gate

        if keep is None:
            return run(x, 0, len(self.blocks), layouts)
        if self.tread is None or self.span is None:
            raise ValueError(
                "keep is given, but the model was built without routing; set tread.enabled: true"
            )
        first, end = self.span
        keep = keep.to(x.device)
        kept = {pattern: layout.keep(keep) for pattern, layout in layouts.items()}
        x = add_gated(*run(x, 0, first, layouts))
        x = route(
            x, keep, lambda inner: add_gated(*run(inner, first, end, kept)), self.tread.rescale
        )
        return run(x, end, len(self.blocks), layouts)

    def train_flops(
        self, grid: tuple[int, int, int], text_tokens: int, kept: int | None = None
    ) -> int:
        def weights(
            module: nn.Module, backward: bool = True
        ) -> int:  # multiplications a token: forward, gradients of input and weights
            two_d = [weight for weight in module.parameters() if weight.ndim == 2]
            passes = 2 if backward else 1
            return sum(weight.numel() * (passes + weight.requires_grad) for weight in two_d)

        frames, dim, text = grid[0], self.config.dim, 1 + text_tokens
        layout = self.windows(*grid[1:])
        windows, places = layout.counts[0] * layout.counts[1], layout.height * layout.width
        tokens = frames * windows * places
        total = tokens * (weights(self.input, False) + weights(self.output)) + text * weights(
            self.text, False
        )
        once = [self.time, self.modulation, self.final_modulation, self.pooled, self.crop]
        if self.low_resolution is not None:
            total += tokens * weights(self.low_resolution.clip, False)
            once.append(self.low_resolution.level)
        total += sum(weights(part) for part in once if part is not None)
        for index, block in enumerate(self.blocks):
            inside = places
            if kept is not None and self.span is not None and index in range(*self.span):
                inside = kept
            seen = frames * windows * inside
            total += seen * sum(
                weights(part)
                for part in (block.spatial, block.mlp, block.cross.q, block.cross.proj)
            )
            total += text * (weights(block.cross.k) + weights(block.cross.v))
            whole = self.config.pattern(index) == "frame"
            total += 6 * seen * dim * ((windows * inside if whole else inside) + text)
            if frames > 1:
                total += seen * (weights(block.temporal) + 6 * dim * frames)
        return 2 * total

    def _check_condition(self, x: Tensor, small: Tensor | None, small_t: Tensor | None) -> None:
        if self.low_resolution is None:
            if small is not None or small_t is not None:
                raise ValueError(
                    "a small clip is given, but the model was built without; set"
                    " model.conditioning: low_resolution"
                )
        elif small is None or small_t is None:
            raise ValueError(
                "this model redraws small clips (model.conditioning: low_resolution), but is given"
                " none: name it with --refine, beside a --checkpoint that draws them"
            )
        elif small.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"the small clip's latents are {tuple(small.shape)} for latents {tuple(x.shape)};"
                " enlarge it to the same size"
            )

    def _check(self, x: Tensor, t: Tensor, captions: int) -> None:
        if x.ndim != 5 or x.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents are {tuple(x.shape)}, must be (batch, frames, rows, columns,"
                f" {self.latent_channels}); the model belongs to another tokenizer, or an axis is"
                " missing"
            )
        if not len(x) == len(t) == captions:
            raise ValueError(
                f"{len(x)} latents, {len(t)} times and {captions} captions; each sample needs one"
                " of each"
            )
