"""Left and right: a small model learns the sign of a motion, and why frame numbers are drawn at
random before it does."""

import pytest
import torch

from mmdit.diffusion import FlowMatchingConfig, SamplerConfig, build_objective, guided, sample
from mmdit.interfaces import LatentSpec
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.rng import Draws
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.training.ema import EMA, EMAConfig
from mmdit.training.learner import Learner

FRAMES, COLUMNS, CHANNELS, BATCH = 6, 4, 6, 64
COLORS, MOTIONS = ("red", "green", "blue"), ("left", "right", "still")
PICTURE_STEPS, CLIP_STEPS = 100, 400


def blobs(step: int) -> tuple[torch.Tensor, list[str]]:
    """Latents `(b, f, 1, columns, channels)` of a blob that drifts over 1.6 of 3 columns, and their
    captions."""
    draws = Draws.of(1, step, BATCH)
    motion, color = (draws.uniform(name).mul(3).long() for name in ("motion", "color"))
    travelled = torch.linspace(0, 1.6, FRAMES)
    start = draws.uniform("start")[:, None]
    place = torch.stack(
        [1.4 * start + 1.6 - travelled, 1.4 * start + travelled, (3 * start).expand(-1, FRAMES)], 1
    )
    place = place[torch.arange(BATCH), motion]
    blob = torch.exp(-((torch.arange(COLUMNS) - place[..., None]) ** 2))
    colors = 2.5 * torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(0))
    latents = blob[:, :, None, :, None] * colors[color][:, None, None, None]
    return latents, [
        f"a {COLORS[c]} blob moves {MOTIONS[m]}"
        for c, m in zip(color.tolist(), motion.tolist(), strict=True)
    ]


def signs(learner: Learner, count: int = 120) -> float:
    """Return what share of sampled clips that should move go the way they were told."""
    text = learner.text_encoder(
        [f"a {COLORS[i % 3]} blob moves {MOTIONS[i % 2]}" for i in range(count)]
    )
    noise = Draws.of(0, 0, count).normal("noise", FRAMES, 1, COLUMNS, CHANNELS)
    clips = sample(
        guided(learner.objective, learner.model, text, 2.0),
        noise,
        learner.objective,
        SamplerConfig("ab2", 16, shift=2.0),
    )
    energy = clips.square().sum(-1).square()[:, :, 0]
    place = (energy * torch.arange(COLUMNS)).sum(-1) / energy.sum(-1)
    moved = place[:, -1] - place[:, 0]
    return ((moved > 0) == (torch.arange(count) % 2 == 1)).float().mean().item()


def trained(numbered: bool, joint: bool, steps: int, seed: int = 0) -> float:
    """Train on pictures, then on clips for `steps`, and return how many signs are right."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(ByteLevelConfig(dim=32, depth=1, num_heads=2))
    config = VideoMMDiTConfig(dim=64, depth=4, num_heads=2, joint_position=joint)
    model = build_model(config, CHANNELS, 32)
    objective = build_objective(
        "flow_matching", flow_matching=FlowMatchingConfig(time="logit_normal", shift=3.0)
    )
    learner = Learner(model, encoder, objective, LatentSpec(CHANNELS), 0.1)
    optimizer = torch.optim.AdamW(learner.parameters(), betas=(0.9, 0.95))
    ema = EMA(EMAConfig(decay=0.99 if steps > 200 else 0.97), learner)
    for step in range(PICTURE_STEPS + steps):
        if step == PICTURE_STEPS and numbered:
            model.number_frames(seed)
        latents, captions = blobs(step)
        latents = latents[:, step % FRAMES][:, None] if step < PICTURE_STEPS else latents
        loss = learner(latents, captions, Draws.of(seed, step, BATCH))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50)
        optimizer.step()
        ema.update(step + 1)
    with ema.applied(), torch.no_grad():
        return signs(learner.eval())


@pytest.mark.slow
def test_numbered_frames_learn_left_from_right_where_numbers_from_zero_do_not():
    results = {numbered: trained(numbered, False, CLIP_STEPS) for numbered in (True, False)}
    print(results)
    assert results[True] > 0.95 and 0.3 < results[False] < 0.75, results


@pytest.mark.slow
def test_place_and_frame_together_learn_it_sooner():
    results = {joint: trained(True, joint, 150) for joint in (True, False)}
    print(results)
    assert results[True] > 0.95 and results[False] < 0.8, results
