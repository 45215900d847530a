"""Pre-training a tokenizer: pictures, losses, exact resume, export and evaluation."""

import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from vtp.models import VTPModel
from vtp.models.pretrained import write_checkpoint
from vtp.pixels import denormalize, normalize
from vtp.tokenizers import ByteTokenizer

from mmdit.config import ConfigError, decode, encode, load
from mmdit.data import moving_shapes
from mmdit.diagnostics.curves import read_metrics
from mmdit.pixels import to_unit
from mmdit.rng import Draws
from mmdit.scripts.evaluate_vtp import main as evaluate_main
from mmdit.tokenizers.vtp import VTPTokenizer, VTPTokenizerConfig
from mmdit.training.errors import RunError
from mmdit.training.run_folder import ENDED_BY
from mmdit.vtp_training import pretrain_export, pretrain_report, textures, tokenizer_scores
from mmdit.vtp_training.glyphs import letters
from mmdit.vtp_training.images import ImagesConfig, MixConfig, PictureSource, moving_shapes_of
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_learner import TokenizerLearner, noisy_latents
from mmdit.vtp_training.pretrain_loop import pretrain
from mmdit.vtp_training.pretrain_losses import (
    AdversarialConfig,
    contrast_loss,
    discriminator_loss,
    reconstruction_loss,
)
from mmdit.vtp_training.pretrain_report import PretrainReport
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer, windows_after
from mmdit.vtp_training.self_supervision import (
    SelfSupervision,
    SelfSupervisionConfig,
    balanced_assignments,
    random_crops,
    taking_part,
)
from mmdit.vtp_training.tokenizer_scores import psnr
from tests.helpers.thorough import thorough

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
IMAGES = {
    "sizes": [[32, 32, 1.0], [48, 32, 1.0]],
    "patches_per_step": 48,
    "shape_pool": 60,
    "texture_pool": 60,
}
TINY = {
    "vision_embed_dim": 32,
    "vision_depth": 1,
    "vision_num_heads": 1,
    "vision_feature_bottleneck": 16,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 1,
    "text_embed_dim": 16,
    "text_depth": 1,
    "text_num_heads": 1,
}


def configured(folder, semantic=False, **train):
    settings = {"max_steps": 6, "warmup_steps": 1, "lr": 2e-3, "evaluation_samples": 4}
    settings |= {"save_every_steps": 100, "eval_every_steps": 100} | train
    mapping = {"output_dir": str(folder), "model": TINY, "images": IMAGES, "train": settings}
    if semantic:
        mapping |= {
            "contrast": {"weight": 0.1, "pairs": 8},
            "self_supervision": {
                "weight": 0.1,
                "fraction": 0.5,
                "prototypes": 16,
                "local_crops": 1,
            },
            "adversarial": {"weight": 0.05, "start": 0.6},
        }
    return decode(PretrainConfig, mapping)


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────
def test_a_batch_is_a_function_of_seed_and_step():
    config = decode(ImagesConfig, IMAGES)
    source, other = PictureSource(config, 7, CPU), PictureSource(config, 7, CPU)
    other.batch(2)  # what was asked before does not matter
    batch = source.batch(3)
    assert torch.equal(batch.pixels, other.batch(3).pixels)
    assert batch.pixels.min() >= 0 and batch.pixels.max() <= 1
    size = tuple(batch.pixels.shape[:1:-1])
    assert not torch.equal(batch.pixels, source.batch(4, size).pixels)
    assert not torch.equal(batch.pixels, PictureSource(config, 8, CPU).batch(3, size).pixels)
    assert {config.size_at(7, step) for step in range(20)} == {(32, 32), (48, 32)}
    for width, height, _ in config.sizes:
        assert config.batch_size(width, height) * width * height == 48 * 256


def test_textures_are_others_after_some_steps_whichever_step_a_run_begins_with():
    config = decode(ImagesConfig, IMAGES | {"refresh_every": 3})
    source, resumed = PictureSource(config, 7, CPU), PictureSource(config, 7, CPU)
    first, same, later = (source.textures(32, 32, step) for step in (0, 2, 3))
    assert torch.equal(first, same) and not torch.equal(first, later)
    assert torch.equal(later, resumed.textures(32, 32, 5))


def test_mix_counts_add_up_and_follow_the_weights():
    counts = MixConfig(shapes=1, gradients=0, clouds=1, patterns=1, piles=1, glyphs=0).counts(10)
    assert sum(counts.values()) == 10
    assert counts["gradients"] == counts["glyphs"] == 0
    assert all(2 <= counts[name] <= 3 for name in ("shapes", "clouds", "patterns", "piles"))


def test_frames_of_clips_are_described_without_motion_and_with_their_own_facts():
    texts = []

    def tokenize(captions):
        texts.extend(captions)
        return ByteTokenizer(96)(captions)

    shapes = moving_shapes_of(5, 60, 32, 32, CPU, tokenize)
    assert len(shapes.pixels) == len(shapes.facts) == len(shapes.tokens) == len(texts) == 60
    assert not any(
        word in text for text in texts for word in ("mov", "drift", "slid", "still", "rest")
    )
    found = moving_shapes.oracle(shapes.pixels[-20:, None])  # the stills
    color_and_background = torch.stack([found.color[:, 0], found.background], 1)
    facts = shapes.facts[-20:]
    for i in range(20):
        for j in range(20):
            if facts[i] == facts[j]:
                assert torch.equal(color_and_background[i], color_and_background[j])


def test_pictures_have_the_structure_they_are_named_for():
    draws, flat = Draws.of(0, 0, 32), torch.full((32, 3, 64, 64), 0.5)
    coarse = F.interpolate(
        F.avg_pool2d(clouds := textures.clouds(draws, 64, 64), 8), scale_factor=8, mode="bilinear"
    )
    assert (clouds - coarse).var() < 0.35 * clouds.var((2, 3)).mean(), (
        "most of a cloud is in its low frequencies"
    )
    assert textures.gradients(draws, 64, 64).diff(dim=-1).abs().max() < 0.25, "no hard edges"
    assert textures.patterns(draws, 64, 64).diff(dim=-1).abs().amax((1, 2, 3)).median() > 0.1, (
        "hard edges"
    )
    for covered in (textures.piles(draws, flat, 4), letters(draws, flat)):
        untouched = (covered == flat).all(1).float().mean((1, 2))
        assert 0.2 < untouched.mean() < 0.98, (
            "objects and letters lie on the ground, and leave some of it"
        )
    assert torch.equal(
        textures.piles(draws, flat, 4)[5:7], textures.piles(draws[5:7], flat[5:7], 4)
    ), "each picture is its own"


# ── losses ────────────────────────────────────────────────────────────────────────────────────────
def test_reconstruction_loss_is_zero_only_for_a_copy_and_a_blurred_edge_costs_more_than_an_offset():
    target = torch.zeros(1, 3, 32, 32)
    target[..., 16:] = 1
    blurred = F.avg_pool2d(target, 5, 1, 2, count_include_pad=False)
    offset = target + (blurred - target).abs().mean()
    terms = {"l1": 1.0, "l2": 0.0, "gradient": 1.0, "levels": 3}
    copy, squared = reconstruction_loss(target, target, **terms)
    assert copy == 0 and squared.tolist() == [0.0]
    assert (
        reconstruction_loss(blurred, target, **terms)[0]
        > reconstruction_loss(offset, target, **terms)[0]
    )


def test_edges_are_compared_at_every_level_with_equal_weight():
    """A slope of 0.01 a pixel is one of 0.02 and of 0.04 in the halved pictures."""
    slope = (0.01 * torch.arange(32)).expand(1, 3, 32, 32)
    flat = torch.zeros(1, 3, 32, 32)
    for levels, expected in ((1, 0.01), (2, 0.015), (3, 0.07 / 3)):
        loss, _ = reconstruction_loss(slope, flat, l1=0, l2=0, gradient=1, levels=levels)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_half_of_the_crops_are_mirrored():
    slope = torch.linspace(-1, 1, 32).expand(64, 3, 32, 32)
    crops = random_crops(slope, Draws.of(0, 0, 64), "view", 1.0, 1.0, (32, 32))
    rises = crops.diff(dim=-1).mean((1, 2, 3))
    mirrored = int((rises < 0).sum())
    assert 20 < mirrored < 44 and rises.abs().min() > 0.04
    assert crops.diff(dim=-2).abs().max() < 1e-5  # never upside down


def test_a_crop_of_the_whole_is_the_picture_with_another_contrast_and_tint():
    black, white, pictures = (
        torch.zeros(64, 3, 8, 8),
        torch.ones(64, 3, 8, 8),
        torch.rand(64, 3, 8, 8),
    )
    tint, both, crops = (
        random_crops(pixels, Draws.of(0, 0, 64), "view", 1.0, 1.0, (8, 8))
        for pixels in (black, white, pictures)
    )
    contrast = both - tint
    assert 0.8 <= contrast.min() < 0.83 and 1.17 < contrast.max() <= 1.2
    assert float(tint.std()) == pytest.approx(0.15, rel=0.15)
    back = (crops - tint) / contrast
    mirrored = (back - pictures).abs().amax((1, 2, 3)) > 1e-3
    torch.testing.assert_close(
        torch.where(mirrored[:, None, None, None], back.flip(-1), back), pictures, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 1 / 3, 0.25, 0.1, 0.01])
def test_the_share_that_takes_part_is_the_one_asked_for_and_evenly_spread(share):
    chosen = taking_part(60, share, CPU).tolist()
    assert abs(len(chosen) - 60 * share) < 1 and chosen[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if (1 / share).is_integer():
        assert chosen == list(range(60))[:: int(1 / share)]


def test_contrast_treats_equal_facts_as_positives():
    image = F.normalize(torch.randn(6, 8), dim=-1)
    facts = torch.tensor([0, 1, 2, 0, 1, 2])
    image = image[:3].repeat(2, 1)  # pictures of equal facts have equal features
    aligned = contrast_loss(image, image, torch.tensor(50.0), facts)
    assert aligned < contrast_loss(image, image, torch.tensor(50.0), torch.arange(6)) + 1e-6
    assert aligned == pytest.approx(
        torch.log(torch.tensor(2.0)).item(), abs=0.05
    )  # two equally right answers
    assert contrast_loss(image, image.roll(1, 0), torch.tensor(50.0), facts) > 1


def test_a_step_without_moving_shapes_has_no_contrast():
    """Its mean over no pairs was no number."""
    raw = encode(configured("unused", semantic=True))
    raw["images"]["patches_per_step"] = 4
    config = decode(PretrainConfig, raw)
    batch = PictureSource(config.images, 0, CPU, ByteTokenizer(77)).batch(0)
    draws = Draws.of(0, 0, len(batch.pixels))
    losses = TokenizerLearner(config)(normalize(batch.pixels), batch.tokens, batch.facts, draws)
    assert len(batch.facts) == 0 and "contrast" not in losses.parts
    assert losses.total.isfinite()


def test_assignments_are_distributions_and_balanced():
    logits = torch.randn(64, 8) + torch.tensor(
        [3.0] + [0.0] * 7
    )  # everything leans to the first prototype
    assigned = balanced_assignments(logits, 0.5, rounds=20)
    assert torch.allclose(assigned.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(assigned.sum(0), torch.full((8,), 8.0), rtol=0.05)


def test_latent_noise_is_relative_to_each_channel_and_bounded():
    scale = torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    latents = torch.randn(64, 3, 8, 8) * scale
    noise = noisy_latents(latents, Draws.of(0, 0, 64), 0.2) - latents
    relative = noise.std((2, 3)) / latents.std((0, 2, 3))
    assert relative.max() < 0.2 * 1.4 and relative.mean() == pytest.approx(0.1, abs=0.03)
    assert torch.allclose(relative.mean(0), relative.mean().expand(3), rtol=0.1)
    assert noisy_latents(latents, Draws.of(0, 0, 64), 0.0) is latents


def test_pixels_round_trip_and_psnr_of_a_known_error():
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.allclose(denormalize(normalize(pixels)), pixels, atol=1e-6)
    assert torch.allclose(
        psnr(torch.full_like(pixels, 0.5), torch.full_like(pixels, 0.6)),
        torch.full((2,), 20.0),
        atol=1e-3,
    )


# ── training ──────────────────────────────────────────────────────────────────────────────────────
def test_loss_falls():
    trainer = TokenizerTrainer(configured("unused", max_steps=60), CPU)
    errors = [float(trainer.advance()["squared_error"]) for _ in range(60)]
    assert sum(errors[-10:]) < 0.65 * sum(errors[:10])


def test_resume_is_exact_with_every_loss(tmp_path):
    config = configured(tmp_path / "run", semantic=True)
    whole = TokenizerTrainer(config, CPU)
    for _ in range(6):  # the adversarial stage begins at step 4
        whole.advance()
    first = TokenizerTrainer(config, CPU)
    for _ in range(5):
        first.advance()
    first.save()
    second = TokenizerTrainer(config, CPU)
    second.restore()
    assert second.step == 5
    second.advance()
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, second.learner.state_dict()[name]), name
    assert all(
        torch.equal(value, second.ema.shadow[name]) for name, value in whole.ema.shadow.items()
    )
    other = TokenizerTrainer(replace(config, latent_noise=0.0), CPU)
    with pytest.raises(ValueError, match="latent_noise: 0.2 → 0.0"):
        other.restore()


@pytest.mark.thorough
def test_max_minutes_plans_the_run_from_the_measured_speed(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit.vtp_training.pretrain_trainer.CALIBRATION", {2: 4, 6: 8})
    monkeypatch.setattr("mmdit.vtp_training.pretrain_loop.EXPORT_SECONDS", 0)
    config = configured(tmp_path / "run", max_steps=100_000, max_minutes=0.02)
    monkeypatch.setattr(
        "mmdit.vtp_training.pretrain_loop.export_tokenizer",
        lambda model, source, config, folder, run: steps.append(run["steps"]),
    )
    steps = []
    pretrain(config, CPU)
    assert 4 < steps[0] < 2000
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert "max_minutes, 0.02" in records[-1][ENDED_BY]


def test_max_minutes_are_kept_by_a_run_that_was_killed(tmp_path, monkeypatch):
    """Killed inside the first measurement: the resumed run measures again, and what was spent
    before counts."""
    monkeypatch.setattr("mmdit.vtp_training.pretrain_trainer.CALIBRATION", {2: 6, 10: 14})
    monkeypatch.setattr("mmdit.vtp_training.pretrain_loop.EXPORT_SECONDS", 0)
    steps = []
    monkeypatch.setattr(
        "mmdit.vtp_training.pretrain_loop.export_tokenizer",
        lambda model, source, config, folder, run: steps.append(run["steps"]),
    )
    config = configured(tmp_path / "run", max_steps=100_000, max_minutes=0.02)
    killed = TokenizerTrainer(config, CPU)
    killed.started -= 1.0  # a second was spent
    for _ in range(4):
        killed.advance()
    killed.save()
    resumed = TokenizerTrainer(config, CPU)
    resumed.restore()
    assert resumed.windows == {6: 10, 10: 14} and resumed.started < killed.started + 1e6
    assert time.perf_counter() - resumed.started >= 1.0
    pretrain(config, CPU, resume=True)
    assert 10 < steps[0] < 2000
    assert windows_after(20, anew=False) == {} and windows_after(20, anew=True) == {22: 26}


def test_a_resume_without_max_minutes_plans_all_steps_again(tmp_path):
    """What fitted into the minutes was planned before."""
    limited = configured(tmp_path / "run", max_steps=100_000, max_minutes=0.02)
    trainer = TokenizerTrainer(limited, CPU)
    trainer.planned = 500
    trainer.save()
    for minutes, planned in ((0.02, 500), (None, 100_000)):
        again = configured(tmp_path / "run", max_steps=100_000, max_minutes=minutes)
        resumed = TokenizerTrainer(again, CPU)
        resumed.restore()
        assert resumed.planned == planned


@pytest.mark.thorough
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    configs = [configured(tmp_path / name, max_steps=4) for name in ("straight", "stopped")]
    straight = pretrain(configs[0], CPU)
    advance = TokenizerTrainer.advance

    def asked_in_the_second(trainer):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTrainer, "advance", asked_in_the_second)
        assert pretrain(configs[1], CPU) is None
    assert "stopped on request at step 2; continue with --resume" in capsys.readouterr().out
    assert not (tmp_path / "stopped/export").exists()
    resumed = pretrain(configs[1], CPU, resume=True)
    same, other = (folder / "model.safetensors" for folder in (straight, resumed))
    assert same.read_bytes() == other.read_bytes()


def poisoned(trainer, *steps):
    """Batches of `trainer` whose pictures of these steps hold a number that is none."""
    good = trainer.source.batch

    def batch(step, size=None):
        pictures = good(step, size)
        if step in steps:
            pictures.pixels[0, 0, 0, 0] = float("nan")
        return pictures

    trainer.source.batch = batch


@pytest.mark.thorough
def test_one_bad_batch_costs_one_step_and_nothing_else(tmp_path):
    """In both stages: nothing that is trained, averaged or teaches takes a number that is none."""
    trainer = TokenizerTrainer(configured(tmp_path, semantic=True, max_steps=10), CPU)
    poisoned(trainer, 1, 7)
    skipped = [float(trainer.advance()["skipped"]) for _ in range(10)]
    assert skipped == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    for name, value in {**trainer.learner.state_dict(), **trainer.ema.shadow}.items():
        assert value.isfinite().all(), name
    for optimizer in (trainer.optimizer, trainer.critic_optimizer):
        assert all(
            value.isfinite().all() for state in optimizer.state.values() for value in state.values()
        )


@pytest.mark.parametrize(
    "bad, ends", [((2, 3, 4, 5), True), ((2, 3, 5, 6), False), *thorough(((5,), False))]
)
def test_too_many_bad_steps_in_a_row_end_the_run_and_one_does_not(tmp_path, monkeypatch, bad, ends):
    config = configured(tmp_path / "run", max_steps=8, log_every_steps=3, max_skipped_steps=3)
    made = TokenizerTrainer.__init__

    def init(self, *arguments):
        made(self, *arguments)
        poisoned(self, *bad)

    monkeypatch.setattr(TokenizerTrainer, "__init__", init)
    monkeypatch.setattr(
        "mmdit.vtp_training.pretrain_loop.export_tokenizer", lambda *arguments: None
    )
    if ends:
        with pytest.raises(
            RunError,
            match="training stopped: 4 steps in a row up to step 6 .*max_skipped_steps = 3",
        ):
            pretrain(config, CPU)
    else:
        pretrain(config, CPU)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        sum(record.get("skipped", 0) for record in records)
        == sum(step < 6 if ends else True for step in bad) - ends * 3
    )


def test_the_critic_tells_real_from_made_and_the_decoder_is_praised_for_what_passes(tmp_path):
    assert discriminator_loss(torch.full((2,), 2.0), torch.full((2,), -2.0)) == 0
    assert discriminator_loss(torch.full((2,), -2.0), torch.full((2,), 2.0)) == 3
    learner = TokenizerLearner(configured(tmp_path, semantic=True))
    batch = PictureSource(learner.config.images, 0, CPU, ByteTokenizer(77)).batch(0)
    given, draws = normalize(batch.pixels), Draws.of(0, 0, len(batch.pixels))
    losses = learner(given, batch.tokens, batch.facts, draws, adversarial=True)
    decoded, _ = losses.pictures
    score = learner.discriminator(decoded).mean()
    torch.testing.assert_close(
        losses.total - losses.parts["reconstruction"], -0.05 * score, rtol=1e-3, atol=1e-5
    )
    del learner.discriminator
    learner.discriminator = lambda pixels: torch.tensor([5.0 if pixels is given else -5.0])
    assert learner.discriminator_loss(losses) == 0


class Told(torch.nn.Module):
    """A trunk that answers what it was told: `classes (2B, K)`, `patches (2B, N, K)`."""

    embed_dim, patch_size = 8, 16

    def __init__(self, classes, patches):
        super().__init__()
        self.classes, self.patches, self.masks = classes, patches, None

    def forward(self, views, masks=None, **options):
        self.masks = masks
        return {"x_norm_clstoken": self.classes, "x_norm_patchtokens": self.patches}


def test_a_view_is_taught_by_the_other_one_and_hidden_patches_by_what_the_teacher_sees():
    """4 pictures, 2 views of each, 4 patches a view; who is right has no loss."""
    config = SelfSupervisionConfig(weight=1.0, prototypes=8, local_crops=0, mask_ratio=(0.25, 0.5))
    classes, patches = 10 * torch.eye(8), 10 * torch.eye(8)[torch.arange(32).reshape(8, 4) % 8]
    images, draws = torch.rand(4, 3, 32, 32), Draws.of(0, 0, 4)

    def loss(student_classes, student_patches):
        student, teacher = Told(student_classes, student_patches), Told(classes, patches)
        taught = SelfSupervision(config, teacher)
        taught.head, taught.teacher_head, taught.teacher_trunk = (
            torch.nn.Identity(),
            torch.nn.Identity(),
            teacher,
        )
        result = taught.loss(student, images, draws)
        assert teacher.masks is None, "the teacher sees everything"
        return *map(float, result), student.masks

    class_loss, patch_loss, masks = loss(classes.roll(4, 0), patches)
    assert class_loss < 1e-3 and patch_loss < 1e-3
    assert ((masks.float().mean(1) >= 0.25) & (masks.float().mean(1) <= 0.5)).all()
    class_loss, patch_loss, masks = loss(
        classes, torch.where(masks[..., None], patches, patches.roll(1, -1))
    )
    assert (
        class_loss > 10 and patch_loss < 1e-3
    )  # its own answer is wrong; patches that it saw do not count
    _, patch_loss, _ = loss(classes, torch.where(masks[..., None], patches.roll(1, -1), patches))
    assert patch_loss > 10


def test_a_hidden_patch_is_not_seen_and_the_teacher_slows_down():
    torch.manual_seed(0)
    learner = TokenizerLearner(configured("unused", semantic=True))
    trunk, taught = learner.model.trunk, learner.self_supervision
    views, masks = torch.randn(2, 3, 32, 32), torch.zeros(2, 4, dtype=torch.bool)
    masks[:, 1] = True  # the upper right one
    other = views.clone()
    other[:, :, :16, 16:] += 1

    def see(pixels):
        seen = trunk(pixels, is_training=True, use_bottleneck=False, masks=masks)
        return seen["x_norm_patchtokens"]

    torch.testing.assert_close(see(other), see(views))
    with torch.no_grad():
        for parameter in taught.teacher_head.parameters():
            parameter.add_(1.0)
    student, teacher = (
        next(part.parameters()).detach().clone() for part in (taught.head, taught.teacher_head)
    )
    shares = []
    for progress in (0.0, 0.5, 1.0):
        next(taught.teacher_head.parameters()).data.copy_(teacher)
        taught.update_teacher(trunk, progress)
        moved = (teacher - next(taught.teacher_head.parameters())) / (teacher - student)
        shares.append(float(moved.mean()))
    assert shares == pytest.approx([0.004, 0.002, 0.0], abs=1e-5)


def test_adversarial_stage_trains_the_decoder_alone(tmp_path):
    trainer = TokenizerTrainer(configured(tmp_path, semantic=True, max_steps=4), CPU)
    while trainer.step < 3:
        trainer.advance()
    before = {name: value.clone() for name, value in trainer.learner.state_dict().items()}
    assert "discriminator" in trainer.advance()
    after = trainer.learner.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    changed = {name.split(".")[1] for name in moved if name.startswith("model.")}
    assert changed == {"pixel_decoder"}


def test_a_frozen_encoder_keeps_latents_and_statistics_and_so_caches_and_models(tmp_path):
    config = configured(tmp_path / "first", max_steps=2)
    first = pretrain(config, CPU)
    second = pretrain(
        replace(
            config,
            output_dir=str(tmp_path / "second"),
            init_from=str(first),
            freeze_encoder=True,
            seed=5,
        ),
        CPU,
    )
    fingerprints = {
        VTPTokenizer(VTPTokenizerConfig(name_or_path=str(folder), latent_d=16)).fingerprint
        for folder in (first, second)
    }
    assert len(fingerprints) == 1
    assert (first / "latent_stats.json").read_bytes() == (second / "latent_stats.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"pixel_decoder"}


def test_a_further_stage_begins_with_a_teacher_that_knows_what_the_student_knows(tmp_path):
    config = configured(tmp_path / "b", semantic=True)
    start = VTPModel(configured(tmp_path).network())
    write_checkpoint(tmp_path / "a", start.config.to_dict(), start.state_dict())
    learner = TokenizerTrainer(replace(config, init_from=str(tmp_path / "a")), CPU).learner
    teacher = learner.self_supervision.teacher_trunk.state_dict()
    for name, value in start.trunk.state_dict().items():
        assert torch.equal(teacher[name], value)
        assert torch.equal(learner.model.trunk.state_dict()[name], value)


def test_unused_losses_are_not_built():
    learner = TokenizerLearner(configured("unused"))
    assert learner.self_supervision is None and learner.discriminator is None
    assert {name.split(".")[0] for name in learner.model.state_dict()} == {"trunk", "pixel_decoder"}


def test_a_run_exports_a_checkpoint_that_loads_and_is_scored(tmp_path):
    config = configured(tmp_path / "tiny", semantic=True, max_steps=3, log_every_steps=1)
    folder = pretrain(config, CPU)
    names = {
        "config.json",
        "model.safetensors",
        "latent_stats.json",
        "training.json",
        "scores.json",
        "README.md",
    }
    assert {path.name for path in folder.iterdir()} == names
    stored = load_file(folder / "model.safetensors")
    assert stored["trunk.cls_token"].dtype == torch.float16
    assert {name.split(".")[0] for name in stored} == {
        "trunk",
        "pixel_decoder",
    }, "the text tower is for training only"
    model = VTPModel.from_pretrained(folder)
    assert model.dtype == torch.float32
    statistics = json.loads((folder / "latent_stats.json").read_text())
    pixels = PictureSource(config.images, config.seed, CPU).pool(32, 32).pixels
    latents = model.get_reconstruction_latents(normalize(to_unit(pixels)))
    assert torch.allclose(
        latents.mean((0, 2, 3)), torch.tensor(statistics["mean"]), atol=0.3 * latents.std().item()
    )
    assert len(statistics["std"]) == 16 and min(statistics["std"]) > 0
    before = json.loads((folder / "scores.json").read_text())["moving_shapes_psnr"]
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"not a picture")
    evaluate_main(
        [
            "--checkpoint",
            str(folder),
            "--count",
            "4",
            "--device",
            "cpu",
            "--images",
            str(tmp_path / "photos"),
        ]
    )
    after = json.loads((folder / "scores.json").read_text())
    assert after["moving_shapes_psnr"] == before
    assert (
        after["images"]["pictures"] == 1
        and f"{after['images']['psnr']:.2f} dB" in (folder / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="--resume, or choose another output_dir"):
        pretrain(config, CPU)


def test_a_wrong_folder_of_pictures_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_scores, "shapes_psnr", lambda *_: pytest.fail("was measured"))
    model = VTPModel(configured(tmp_path).network())
    with pytest.raises(ValueError, match="photos is no folder of pictures"):
        tokenizer_scores.tokenizer_scores(model, 4, tmp_path / "photos")
    with torch.no_grad():
        model.trunk.cls_token.fill_(float("nan"))
    with pytest.raises(ValueError, match="weight trunk.cls_token holds nan"):
        tokenizer_scores.tokenizer_scores(model, 4)


def test_weights_beyond_float16_are_stored_whole_and_cost_nothing(tmp_path):
    """What float16 would cost is no number then, which no JSON holds; nor is it what was stored."""
    config = configured(tmp_path)
    model = VTPModel(config.network()).eval()
    for factor, dtype in ((1.0, torch.float16), (1e6, torch.float32)):
        with torch.no_grad():
            model.trunk.cls_token.fill_(factor)
        stored, record = pretrain_export._stored(model, config)
        assert stored["trunk.cls_token"].dtype == dtype
        assert record["stored_as"] == str(dtype).removeprefix("torch.")
        assert record["cost_of_storage_db"] <= (0.01 if factor == 1 else 0)


# ── configuration ─────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("section", "value", "path"),
    [
        ("images", {"sizes": [[60, 64, 1.0]]}, "images.sizes"),
        ("images", {"mix": {"shapes": -1.0}}, "images.mix"),
        ("model", {"vision_embed_dim": 190}, "model.vision_embed_dim"),
        ("train", {"max_steps": 10, "warmup_steps": 10}, "train.warmup_steps"),
        ("reconstruction", {"weight": 0.0}, "reconstruction.weight"),
        ("adversarial", {"start": 1.5}, "adversarial.start"),
        ("ema", {"enabled": False}, "ema.enabled"),
        ("latent_noise", -0.1, "latent_noise"),
        ("train", {"final_lr": -3.0}, "train.final_lr"),
        ("train", {"beta2": 1.5}, "train.beta2"),
        ("train", {"weight_decay": -1.0}, "train.weight_decay"),
        ("adversarial", {"lr": -1.0}, "adversarial.lr"),
        ("model", {"vision_depth": 0}, "model.vision_depth"),
        ("model", {"text_context_length": 1}, "model.text_context_length"),
        ("model", {"decoder_depth": 10**6}, "model.decoder_depth"),
        ("self_supervision", {"teacher_temperature": 0.0}, "self_supervision.teacher_temperature"),
        ("self_supervision", {"momentum": 1.5}, "self_supervision.momentum"),
        ("ema", {"start_step": -5}, "ema.start_step"),
        ("freeze_encoder", True, "freeze_encoder"),
    ],
)
def test_mistakes_are_named(section, value, path):
    with pytest.raises(ConfigError) as caught:
        decode(PretrainConfig, {section: value})
    assert caught.value.path == path


@pytest.mark.parametrize(
    "name",
    [
        "vtp_tiny_f16d64",
        "vtp_tiny_f16d64_stage1",
        "vtp_tiny_f16d64_decoder",
        "vtp_tiny_f16d64_semantic",
    ],
)
def test_shipped_configs_decode_and_fit_the_size_limit(name):
    config = load(PretrainConfig, ROOT / "VTP" / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        model = VTPModel(config.network())
    exported = sum(
        p.numel()
        for key, p in model.named_parameters()
        if key.startswith(("trunk", "pixel_decoder"))
    )
    assert 2 * exported < 16e6
    assert Path(config.output_dir).name == name


def test_a_finished_run_that_is_resumed_is_exported_again_and_nothing_else(tmp_path, capsys):
    """Resume one whose config lost a key that nothing reads, and that an earlier version took."""
    config = configured(tmp_path / "run", max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainConfig, "without_part", lambda _: ())
        older = replace(config, adversarial=AdversarialConfig(start=0.5))
        export = pretrain(older, CPU)
    metrics, weights = tmp_path / "run/metrics.jsonl", export / "model.safetensors"
    before = metrics.read_bytes(), weights.read_bytes()
    weights.unlink()
    pretrain(config, CPU, resume=True)
    assert (metrics.read_bytes(), weights.read_bytes()) == before
    assert "nothing left to do but the export" in capsys.readouterr().out


def test_steps_that_are_done_again_after_a_kill_are_reported_once(tmp_path, monkeypatch):
    """And a line that the kill has torn ends no report: it would be one with the next."""
    config = configured(tmp_path, max_steps=4, log_every_steps=1, save_every_steps=2)
    path, original, seen = tmp_path / "metrics.jsonl", PretrainReport.progress, []

    def killed(report, scalars):
        original(report, scalars)
        seen.append(report.trainer.step)
        if seen == [1, 2, 3]:
            with path.open("a") as file:
                file.write('{"step": 3, "held_out')
            raise KeyboardInterrupt

    monkeypatch.setattr(PretrainReport, "progress", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, CPU)
    pretrain(config, CPU, resume=True)
    assert seen == [1, 2, 3, 3, 4]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]
    assert len(path.read_text().splitlines()) == 5


def test_a_disk_that_is_full_is_named_when_metrics_cannot_be_written(tmp_path, monkeypatch):
    config = configured(tmp_path, max_steps=2, log_every_steps=1)

    class Full(type(tmp_path)):
        def open(self, *_, **__):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain_report, "refuse_link", Full)
    with pytest.raises(RunError, match="could not write .*metrics.jsonl: .*No space left"):
        pretrain(config, CPU)


@pytest.mark.thorough
def test_a_decoder_of_an_encoder_without_statistics_is_exported_without(tmp_path):
    """Latents are normalised as before; the file was missed only when the training was done."""
    start = pretrain(configured(tmp_path / "a", max_steps=2), CPU)
    (start / "latent_stats.json").unlink()
    config = configured(tmp_path / "b", max_steps=2)
    export = pretrain(replace(config, init_from=str(start), freeze_encoder=True), CPU)
    assert not (export / "latent_stats.json").exists()
    assert VTPTokenizer(VTPTokenizerConfig(name_or_path=str(export), latent_d=16)).spec.mean == ()
