"""What is trained: denoiser and text encoder under one objective. This is the module that DDP
wraps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmdit.diffusion.experts import ExpertPlan
from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws
from mmdit.training.graphs.training_graphs import Replays, suits

TEXT_STEP = 16  # compiled blocks see 16, 32, 48 … text tokens, the model's null token among them
# kinds of compiled blocks: plain or shifted, pictures or clips, each bucket, each text length
GRAPHS = 64


def beyond_graphs(table: list[dict], compiles: bool | str) -> str:
    """Return a line for a run that has more sizes (rows of `BatchPlan.table`) than its blocks are
    compiled
    for; empty if it has not. Each size takes a graph with plain and one with shifted windows."""
    kinds = {(*row["grid"], row["steps"]) for row in table}
    if compiles is False or 2 * len(kinds) <= GRAPHS:
        return ""
    return (
        f"\n{len(kinds)} sizes: where blocks are compiled, those of the first {GRAPHS // 2} are, "
        "the others "
        "run as they are, more slowly; a list of bucketing.buckets has fewer"
    )


class Learner(nn.Module):
    """`forward` gives the per-sample losses of one micro-batch; everything random in it comes from
    `draws`."""

    def __init__(
        self,
        model: nn.Module,
        text_encoder: nn.Module,
        objective,
        spec: LatentSpec,
        caption_dropout: float = 0.0,
        experts: ExpertPlan | None = None,
    ):
        super().__init__()
        self.model, self.text_encoder = model, text_encoder
        self.objective, self.spec, self.caption_dropout = objective, spec, caption_dropout
        self.experts = experts  # then `model` is an `nn.experts.Experts`
        self.conditions: Callable[[Tensor], tuple[Tensor, dict]] | None = (
            None  # cached latents → the clips', further inputs
        )
        self.compiled, self.replays = False, None
        self.text_tokens = 0  # of the longest caption of the last batch
        self._flops: dict[tuple, int] = {}

    def compile_model(self, backend: str | Callable = "inductor", replays: bool = False) -> None:
        """Compile the blocks (one graph serves all of a kind), for training: sampling asks for
        eager, as its shapes vary. Without a working compiler torch warns once and the blocks run as
        they are. `replays`: on CUDA, of steps of small networks.
        """
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = (
            GRAPHS  # beyond it blocks would silently run as they are
        )
        self.compiled, self.replays = (
            True,
            Replays(self.model) if replays and suits(self.model) else None,
        )
        for block in self.model.blocks:
            if isinstance(
                block, FSDPModule
            ):  # its hooks gather and free weights around what is compiled
                block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
            else:
                block.compile(dynamic=False, backend=backend)

    def parts(self) -> dict[str, nn.Module]:
        """The experts that are trained, by name, or the one denoiser as ""."""
        return (
            {name: self.model.get_submodule(name) for name in self.experts.trained}
            if self.experts
            else {"": self.model}
        )

    def resting(self, expert: str) -> tuple[str, ...]:
        """How the names of the parameters begin that a step of `expert` leaves alone."""
        return tuple(f"model.{name}." for name in self.parts() if name != expert)

    def is_stored(self, name: str) -> bool:
        """Whether a checkpoint holds this entry of the state: frozen foreign weights stay where
        they were loaded from."""
        part, _, inner = name.partition(".")
        elsewhere = getattr(self.get_submodule(part), "stored_elsewhere", False)
        return not (elsewhere(inner) if callable(elsewhere) else elsewhere)

    def stored_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if self.is_stored(name)}

    def forward(
        self,
        latents: Tensor,
        captions: list[str],
        draws: Draws,
        keep: Tensor | None = None,
        crops: Tensor | None = None,
        expert: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`latents (b, F, H, W, C)` raw, `keep` as `models.routing` draws it, `crops (b, 4)` for a
        model with `model.crop`, `expert`: draw its times alone. Returns `(losses (b,), t (b,))`,
        float32."""
        text = self.text_encoder(captions)
        self.text_tokens = text.valid.shape[1]
        if self.compiled:  # few lengths, few graphs; padding changes nothing
            text = text.pad(math.ceil((1 + text.valid.shape[1]) / TEXT_STEP) * TEXT_STEP - 1)
        if self.caption_dropout and self.training:
            text = text.drop(draws.uniform("caption_dropout") < self.caption_dropout)
        given = (
            self.model.given_frames(latents.shape[1], draws)
            if hasattr(self.model, "given_frames")
            else 0
        )
        inputs = {"keep": keep} if crops is None else {"keep": keep, "crop": crops}
        if self.conditions:
            latents, more = self.conditions(latents)
            inputs |= more
        if expert is not None:
            draws, inputs["expert"] = self.experts.draws(draws, expert, latents.shape[1]), expert
        model, clean = self.replays or self.model, self.spec.normalize(latents)
        parts = self.objective.loss(model, clean, text, draws, given=given, **inputs)
        return parts.per_sample, parts.t

    def train_flops(self, grid: tuple[int, int, int], keep: Tensor | None) -> int:
        """Of the denoiser, forward and backward, for one sample of `grid` (frames, rows, columns)
        with captions as in the last batch; the recomputation of checkpointing is not counted."""
        shape = (grid, self.text_tokens, None if keep is None else len(keep))
        if shape not in self._flops:
            self._flops[shape] = self.model.train_flops(*shape)
        return self._flops[shape]
