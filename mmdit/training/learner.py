"""Denoiser, text encoder and objective as one module: this is what is trained, and what DDP
wraps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmdit.diffusion import Objective
from mmdit.diffusion.expert_schedule import ExpertSchedule
from mmdit.interfaces import Denoiser, LatentSpec, TextEncoder
from mmdit.rng import Draws
from mmdit.training.graphs.training_graphs import Replays, suits
from mmdit.training.memory.shards import gathers_weights

# Texts are padded to 32, 64, 96 … tokens for compiled blocks, with the model's null token among
# them, so that few graphs are compiled; for replayed steps, whose graphs are made in a second, to
# 16, 32, 48 ….
COMPILED_STEP, REPLAYED_STEP = 32, 16
# Compiled variants of a block: windows or whole frames, pictures or clips, each bucket, each length
# of text.
GRAPHS = 64


def beyond_graphs(table: list[dict], compiles: bool | str) -> str:
    """Return a line for a run that has more sizes (rows of `BatchPlan.table`) than blocks are
    compiled for; "" if it has not. Each size takes two graphs, one with windows and one with whole
    frames."""
    sizes = {(*row["grid"], row["steps"]) for row in table}
    if compiles is False or 2 * len(sizes) <= GRAPHS:
        return ""
    return (
        f"\n{len(sizes)} sizes: where blocks are compiled, those of the first {GRAPHS // 2} are, "
        "the others run as they are, more slowly; a list of bucketing.buckets has fewer"
    )


class Learner(nn.Module):
    """Denoiser and text encoder under one objective. `forward` gives the per-sample losses of one
    micro-batch; everything random in it comes from `draws`."""

    def __init__(
        self,
        model: Denoiser,
        text_encoder: TextEncoder,
        objective: Objective,
        spec: LatentSpec,
        caption_dropout: float = 0.0,
        experts: ExpertSchedule | None = None,
    ):
        super().__init__()
        self.model, self.text_encoder = model, text_encoder
        self.objective, self.spec, self.caption_dropout = objective, spec, caption_dropout
        self.experts = experts  # then `model` is an `nn.experts.Experts`
        # (cached latents, draws) → latents of the clips, further inputs
        self.conditions: Callable[[Tensor, Draws], tuple[Tensor, dict]] | None = None
        self.compiled = False
        self.replays: Replays | None = None
        self.text_tokens = 0  # of the longest caption of the last batch
        self._flops: dict[tuple, int] = {}

    def compile_model(self, backend: str | Callable = "inductor") -> None:
        """Compile the blocks for training; all blocks of one structure share a graph. (Sampling
        runs in `eager`, since its shapes vary.) Without a working compiler torch warns once, and
        the blocks run uncompiled."""
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = (
            GRAPHS  # beyond it, blocks would silently run uncompiled
        )
        self.compiled = True
        for block in self.model.blocks:
            if gathers_weights(block):
                # its hooks, which gather and free weights, must run around the compiled part
                whole: Any = block
                whole.forward = torch.compile(whole.forward, dynamic=False, backend=backend)
            else:
                block.compile(dynamic=False, backend=backend)

    def eager(self) -> AbstractContextManager:
        """Return a context in which compiled blocks run uncompiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def replay_model(self) -> None:
        """Replay the steps of a small network as CUDA graphs from now on, on CUDA."""
        self.replays = Replays(self.model) if suits(self.model) else None

    @property
    def sharded(self) -> bool:
        """Return whether the denoiser is sharded, so that all processes must make every call
        together."""
        return gathers_weights(self.model)

    def parts(self) -> dict[str, Denoiser]:
        """Return the trained networks by the name of the expert; a single one has the name ""."""
        networks = self.model.networks()
        return {name: networks[name] for name in self.experts.trained} if self.experts else networks

    def resting(self, step: int, count: int, last: str) -> tuple[str, ...]:
        """Return prefixes of the parameter names that the `count` steps before `step` do not
        change; `last`: the expert that the last one trains."""
        moved = self.experts.trained_lately(step, count, last) if self.experts else {last}
        return tuple(f"model.{name}." for name in self.parts() if name not in moved)

    def is_stored(self, name: str) -> bool:
        """Return whether a checkpoint holds this entry of the state; frozen foreign weights are
        read again from where they came."""
        part, _, inner = name.partition(".")
        network = self.model if part == "model" else self.text_encoder
        return network.is_stored(inner)

    def stored_state(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint holds."""
        return {name: value for name, value in self.state_dict().items() if self.is_stored(name)}

    def forward(
        self,
        latents: Tensor,
        captions: list[str],
        draws: Draws,
        keep: Tensor | None = None,
        crops: Tensor | None = None,
        places: Tensor | None = None,
        expert: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `(losses (b,), t (b,))`, float32, for raw `latents (b, F, H, W, C)`. `keep`: from
        `Denoiser.draw_keep`; `crops (b, 4)`: for a model with `model.crop`; `places (b, 5)`: where
        tiles lie; `expert`: the expert to train, at times of its own."""
        text = self.text_encoder(captions)
        self.text_tokens = text.valid.shape[1]
        if self.compiled or self.replays:  # few lengths, so few graphs; padding changes nothing
            step = COMPILED_STEP if self.compiled else REPLAYED_STEP
            text = text.pad(math.ceil((1 + text.valid.shape[1]) / step) * step - 1)
        if self.caption_dropout and self.training:
            dropped = draws.uniform("caption_dropout") < self.caption_dropout
            text = text.drop(dropped.to(latents.device, non_blocking=True))
        given = self.model.given_frames(latents.shape[1], draws)
        inputs: dict[str, Any] = {} if keep is None else {"keep": keep}
        if crops is not None:
            inputs["crop"] = crops
        if places is not None:
            inputs["place"] = places
        if self.conditions:
            latents, more = self.conditions(latents, draws)
            inputs |= more
        if self.experts and expert is not None:
            draws = self.experts.draws(draws, expert, latents.shape[1])
            inputs["expert"] = expert
        clean = self.spec.normalize(latents)
        model: Callable[..., Tensor] = self.replays or self.model
        parts = self.objective.loss(model, clean, text, draws, given=given, **inputs)
        return parts.per_sample, parts.t

    def train_flops(self, grid: tuple[int, int, int], keep: Tensor | None) -> int:
        """Return the number of operations of the denoiser for one sample of `grid` (frames, rows,
        columns) with captions as long as in the last batch; see `Denoiser.train_flops`."""
        shape = (grid, self.text_tokens, None if keep is None else len(keep))
        if shape not in self._flops:
            self._flops[shape] = self.model.train_flops(*shape)
        return self._flops[shape]
