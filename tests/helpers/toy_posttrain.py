"""A model that post-trains in a second: four patterns of 3x4x4 "pixels", an MLP that was trained to
draw them."""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.diffusion import FlowMatching, FlowMatchingConfig
from mmdit.interfaces import Denoiser, LatentSpec, TextEncoder, TextTokens
from mmdit.posttrain.loop import post_train
from mmdit.posttrain.posttrain_config import PosttrainConfig, RolloutConfig
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import Reward, Samples
from mmdit.posttrain.session import Session
from mmdit.rng import Draws
from mmdit.training.checkpoint import Meta, save
from mmdit.training.ema import EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState

PATTERNS = torch.randn(4, 1, 4, 4, 3, generator=torch.Generator().manual_seed(1)) * 0.5


class Words(TextEncoder):
    """`class k …` to one token, one-hot."""

    dim = 4

    def forward(self, captions: list[str]) -> TextTokens:
        which = torch.tensor([int(c.split()[1]) for c in captions])
        return TextTokens(
            nn.functional.one_hot(which, 4).float()[:, None],
            torch.ones(len(captions), 1, dtype=torch.bool),
        )


class Net(Denoiser):
    def __init__(self, width: int = 192):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(48 + 4 + 5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 48),
        )

    def forward(self, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        t = t[:, None] / 1000
        time = torch.cat([t, t * t, torch.cos(3 * t), torch.sin(6 * t), 1 / (0.2 + t)], 1)
        return self.layers(torch.cat([x.flatten(1), text.embeddings[:, 0], time], 1)).reshape(
            x.shape
        )


class Glass:
    """A tokenizer that changes nothing."""

    spec, fingerprint = LatentSpec(channels=3, spatial=1), "glass"

    def encode(self, pixels: Tensor) -> Tensor:
        return rearrange(pixels, "b f c h w -> b f h w c")

    def decode(self, latents: Tensor) -> Tensor:
        return rearrange(latents, "b f h w c -> b f c h w")


@dataclass(frozen=True)
class Bright(Reward):
    limits: ClassVar[tuple[float, float]] = (-1e3, 1e3)
    type: Literal["bright"] = "bright"

    def call(self, samples: Samples) -> Tensor:
        return -(samples.pixels.flatten(1).mean(1) - 0.6).abs()


@dataclass(frozen=True)
class Colour(Reward):
    limits: ClassVar[tuple[float, float]] = (-1e3, 0.0)
    type: Literal["colour"] = "colour"

    def call(self, samples: Samples) -> Tensor:
        return -(samples.pixels.mean((1, 3, 4)) - torch.tensor([0.1, -0.05, 0.0])).square().sum(1)


@dataclass(frozen=True)
class Keep(Reward):
    """Cosine of a sample, offset removed, with the pattern of its class: what over-optimisation
    destroys."""

    limits: ClassVar[tuple[float, float]] = (-1.01, 1.01)
    type: Literal["keep"] = "keep"

    def call(self, samples: Samples) -> Tensor:
        own = PATTERNS[[int(c.split()[1]) for c in samples.captions]]
        off = lambda x: x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
        return nn.functional.cosine_similarity(off(Glass().encode(samples.pixels)), off(own), dim=1)


@dataclass(frozen=True)
class RedOverBlue:
    """A bounded scorer: half the cosine of the mean colour, off grey, with the word's direction,
    red - blue or its opposite."""

    type: Literal["toy"] = "toy"

    def prepare(self, device) -> None:
        pass

    def __call__(self, pixels: Tensor, texts: list[str]) -> Tensor:
        sign = torch.tensor([1.0 if text.startswith("red") else -1.0 for text in texts])
        off = pixels.mean((1, 3, 4)) - pixels.mean((1, 2, 3, 4))[:, None]
        unit = nn.functional.normalize(
            torch.cat([off, torch.full_like(off[:, :1], 0.1)], 1), dim=1
        )  # grey has no direction
        return (unit[:, 0] - unit[:, 2]) * 0.5**1.5 * sign


def draw(draws: Draws, which: Tensor) -> Tensor:
    return (
        PATTERNS[which]
        + 0.15 * draws.normal("data", 1, 4, 4, 3)
        + 0.25 * draws.normal("offset", 1, 1, 1, 1)
    )


@lru_cache
def pretrained(steps: int = 600) -> Learner:
    torch.manual_seed(0)
    objective = FlowMatching(FlowMatchingConfig())
    learner = Learner(Net(), Words(), objective, Glass.spec)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    which = torch.arange(256) % 4
    text = learner.text_encoder([f"class {k}" for k in which.tolist()])
    for step in range(steps):
        draws = Draws.of(0, step, 256)
        learner.objective.loss(
            learner.model, draw(draws, which), text, draws
        ).per_sample.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return learner


def session(
    run_dir,
    epochs: int = 60,
    lr: float = 3e-4,
    ema: float | None = None,
    model=None,
    train: dict | None = None,
    seed: int = 0,
    frames: int = 1,
    evaluated: int = 512,
    **changes,
) -> Session:
    rollout = {"steps": 10, "shift": 3.0} | changes.pop("rollout", {})
    settings = {
        "prompts_per_epoch": 16,
        "group_size": 16,
        "micro_batch": 256,
        "rewards": (Bright(),),
        "eval_rewards": (Bright(), Keep()),
        "async_rewards": False,
        "eval_every_epochs": 10**6,
        "rollout": RolloutConfig(**rollout),
    }
    config = PosttrainConfig(**(settings | changes))
    learner = copy.deepcopy(model or pretrained())
    options = {
        "precision": "fp32",
        "lr": lr,
        "max_steps": epochs * config.updates_per_epoch,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "sample_num_steps": 20,
        "sample_solver": "euler",
        "sample_cfg_scale": 1.0,
        "save_every_steps": 10**6,
    }
    options = TrainConfig(**(options | (train or {})))
    state = TrainState.create(
        learner, options, EMAConfig(enabled=ema is not None, decay=ema or 0.9)
    )

    def store(files: dict, best: bool) -> None:
        meta = Meta(state.step, {}, Glass.spec, "glass")
        save(run_dir / "best" if best else run_dir, meta, files, int(best))

    prompts = Prompts([f"class {i % 4} number {i}" for i in range(64)])
    seen = {"seen": Prompts([f"class {i % 4}" for i in range(evaluated)])}
    return Session(
        config=config,
        train=options,
        seed=seed,
        state=state,
        tokenizer=Glass(),
        prompts=prompts,
        evaluated=seen,
        width=4,
        height=4,
        frames=frames,
        run_dir=run_dir,
        save=store,
    )


def run(session: Session) -> dict[str, float]:
    """Train; evaluation rewards at the end, and the last record."""
    assert post_train(session)
    return session.log.last
