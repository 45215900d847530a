"""Post-training of Wan: an update of one of two experts, and the shipped recipes on small releases.
As a command it measures updates of the 1.3 B shape with random weights, made on the GPU (T2V-1.3B
twice, its VAE, adapters of rank 32), as JSON lines:

    PYTHONPATH=VTP:. python tests/test_posttrain_wan.py [--frames 1 17] [--width 832 --height 480]
"""

import argparse
import gc
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit.adapters import LoRAConfig, adapters, inject
from mmdit.diffusion import FlowMatching, FlowMatchingConfig
from mmdit.experiment.experiment_config import load_experiment_config
from mmdit.interfaces import Boundary, LatentSpec, TextEncoder, TextTokens
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.nn.experts import Experts
from mmdit.posttrain import stop_rules
from mmdit.posttrain.loop import post_train
from mmdit.posttrain.posttrain_config import PosttrainConfig, RatioConfig, RolloutConfig, SRPOConfig
from mmdit.posttrain.prompt_lists import Prompts
from mmdit.posttrain.rewards import Brightness
from mmdit.posttrain.session import Session
from mmdit.rng import Draws
from mmdit.scripts import posttrain
from mmdit.tokenizers.wan_vae_network import WanVAE, WanVAESizes
from mmdit.training.checkpoint import latest, read_tensors
from mmdit.training.distributed import World
from mmdit.training.ema import EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from tests.helpers.thorough import thorough, thorough_unless
from tests.helpers.tiny import refused
from tests.helpers.wan_release import DIT, make_release
from tests.test_posttrain_rewards import clip_folder  # noqa: F401

BOUNDARY = 0.875
RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs/posttrain").glob("wan_*.yaml"))
TINY = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, text_len=8, freq_dim=16
)
FULL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)  # 1.3 B


def random_expert(
    config: WanConfig, dtype: torch.dtype, device, checkpointing: bool
) -> WanDenoiser:
    with torch.device(device):
        model = WanDenoiser(config, checkpointing=checkpointing)
    for name, p in model.named_parameters():
        p.data = p.data.to(WanDiT.stored_dtype(name, dtype))
        if "norm" not in name:
            nn.init.normal_(p, std=0.02)
    return model


class Words(TextEncoder):
    """Stands for embeddings that were extracted before."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.dim = config.text_dim
        self.register_buffer("place", torch.zeros(()))

    def forward(self, captions: list[str]) -> TextTokens:
        generator = torch.Generator().manual_seed(len(captions))
        words = torch.randn(len(captions), 6, self.dim, generator=generator)
        return TextTokens(words, torch.ones(len(captions), 6, dtype=torch.bool)).to(
            self.place.device
        )


class Decoder:
    """The VAE of Wan 2.1 with random weights, its pixels squashed."""

    spec, fingerprint = LatentSpec(channels=16, spatial=8, temporal=4), "random"

    def __init__(self, dim: int, device):
        with torch.device(device):
            self.network = WanVAE(WanVAESizes(dim, dim, 16, False)).requires_grad_(False).eval()

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            pixels = self.network.decode(rearrange(latents, "b f h w c -> b c f h w"))
        return rearrange(pixels.sigmoid(), "b c f h w -> b f c h w")


def digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        sha.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def updates(
    algorithm: str,
    config: WanConfig,
    width: int,
    height: int,
    frames: int,
    device="cpu",
    dtype=torch.float32,
    vae: int = 96,
) -> dict:
    """Build, adapt the low-noise expert, make two updates; what they cost and what they touched."""
    begin, cuda = time.perf_counter(), device != "cpu"
    torch.manual_seed(0)
    low, high = (
        random_expert(config, dtype, device, checkpointing) for checkpointing in (True, False)
    )
    inject(
        low,
        LoRAConfig(
            enabled=True,
            rank=32,
            alpha=32,
            target_modules=("blocks.*.cross_attn.[kv]", "blocks.*.self_attn.q"),
        ),
    )
    learner = Learner(low, Words(config), FlowMatching(FlowMatchingConfig()), Decoder.spec).to(
        device
    )
    before, base = (
        digest(high),
        {
            name: p.detach().clone()
            for name, p in low.named_parameters()
            if name.startswith("blocks.0.") and not p.requires_grad
        },
    )
    # noise levels of 4 steps at shift 3: 1, 0.9, 0.75, 0.5, 0; steps 2 and 3 are the low expert's
    settings = PosttrainConfig(
        algorithm=algorithm,
        prompts_per_epoch=2,
        group_size=4,
        micro_batch=2 if algorithm == "grpo" else 1,
        rewards=(Brightness(),),
        eval_rewards=(Brightness(),),
        rollout=RolloutConfig(steps=4, shift=3.0, sde_steps=(2,)),
        ratio=RatioConfig(replay_tolerance=float(cuda)),  # told, on a GPU
        srpo=SRPOConfig(sigma_window=(0.8, 0.5)),
        reward_frames=(0, 4) if frames > 1 else (),
    )
    train = TrainConfig(
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        lr=1e-3,
        warmup_steps=0,
        max_steps=2,
        sample_num_steps=2,
        sample_cfg_scale=1.0,
        weight_decay=0.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        prompts = Prompts(["a cat", "a dog"])
        session = Session(
            config=settings,
            train=train,
            seed=0,
            state=TrainState.create(learner, train, EMAConfig(enabled=False)),
            tokenizer=Decoder(vae, device),
            prompts=prompts,
            evaluated={"seen": prompts.at([0])},
            width=width,
            height=height,
            frames=frames,
            run_dir=Path(folder),
            save=lambda *_: None,
            world=World(device=torch.device(device)),
            model=Experts(high.requires_grad_(False).eval(), low, Boundary(BOUNDARY, 1000.0)),
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        assert post_train(session)
        first, last = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ][1:]
    stored = (
        session.rollouts.storage(session.rollouts.noisy_steps(0)).bytes(
            torch.Size(session.shape).numel()
        )
        if algorithm == "grpo"
        else None
    )
    return {
        "algorithm": algorithm,
        "frames": frames,
        "latents": list(session.shape),
        "samples": settings.prompts_per_epoch * (4 if algorithm == "grpo" else 1),
        "first_seconds": round(first["seconds"], 2),
        "step_seconds": round(last["seconds"], 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "stored_bytes_a_sample": stored,
        "replay_before_first_update": first.get("replay"),
        "high_expert_untouched": digest(high) == before,
        "low_base_untouched": all(
            torch.equal(low.get_parameter(name), p) for name, p in base.items()
        ),
        "adapters_moved": sum(layer.lora_B.abs().sum().item() for layer in adapters(low).values()),
        "trained": sum(map(torch.Tensor.numel, session.policy.reference.values())),
        "loss_or_score": last.get("loss", last.get("score_denoise")),
        "grad_norm": last["grad_norm"],
        "drift": last["drift"],
        "whole_seconds": round(time.perf_counter() - begin, 1),
    }


def test_rewards_see_chosen_frames_as_the_whole_clip_has_them_and_each_expert_its_levels(tmp_path):
    class Seen(WanDenoiser):
        def forward(self, x, t, text):
            levels.append(t[0].item())
            return torch.zeros_like(x)

    levels: list[float] = []
    asked: list[int] = []
    learner = Learner(
        random_expert(TINY, torch.float32, "cpu", False),
        Words(TINY),
        FlowMatching(FlowMatchingConfig()),
        Decoder.spec,
    )
    train, prompts = (
        TrainConfig(precision="fp32", sample_num_steps=2, sample_cfg_scale=1.0),
        Prompts(["a cat", "a dog"]),
    )
    for trained, of_other in (
        ("low", [1000.0, 900.0]),
        ("high", [750.0, 500.0]),
    ):  # a level at the boundary is the high expert's
        settings = PosttrainConfig(
            algorithm="nft",
            prompts_per_epoch=2,
            micro_batch=2,
            group_size=2,
            rewards=(Brightness(),),
            eval_rewards=(Brightness(),),
            rollout=RolloutConfig(steps=4, shift=3.0),
            reward_frames=(0, -5),
        )
        model, other = learner.model, Seen(TINY)
        high, low = (other, model) if trained == "low" else (model, other)
        session = Session(
            config=settings,
            train=train,
            seed=0,
            state=TrainState.create(learner, train, EMAConfig(enabled=False)),
            tokenizer=Decoder(4, "cpu"),
            prompts=prompts,
            evaluated={},
            width=32,
            height=32,
            frames=9,
            run_dir=tmp_path,
            save=lambda *_: None,
            model=Experts(high, low, Boundary(0.9, 1000.0)),
        )
        levels.clear()
        velocity = session.policy.velocity(session.text)
        clean = session.rollouts.sample(velocity, Draws.of(0, 0, 2)).clean
        assert levels == pytest.approx(of_other)
        with pytest.raises(ValueError, match="both sides"):
            velocity(clean, torch.tensor([0.95, 0.2]))
        whole, decode = session.tokenizer.decode(clean), session.tokenizer.decode
        asked.clear()

        def counted(latents, decode=decode):
            asked.append(latents.shape[1])
            return decode(latents)

        session.tokenizer.decode = counted
        torch.testing.assert_close(session.rollouts.decode(clean), whole[:, [0, 4]])
        assert asked == [2], "of three latent frames no more than the second is needed"


@pytest.mark.parametrize(
    "frames, algorithm", [(1, "grpo"), *thorough((1, "srpo"), (5, "grpo"), (5, "srpo"))]
)
def test_an_update_moves_the_adapters_of_one_expert_alone(algorithm, frames):
    report = updates(algorithm, TINY, 32, 32, frames, vae=4)
    assert (
        report["high_expert_untouched"]
        and report["low_base_untouched"]
        and report["adapters_moved"] > 0
        and report["grad_norm"] > 0
    )
    assert (
        report["replay_before_first_update"] == (0 if algorithm == "grpo" else None)
        and report["drift"] > 0
    )


@pytest.mark.parametrize(
    "path",
    thorough_unless(lambda path: path.stem == "wan_srpo", RECIPES),
    ids=lambda path: path.stem,
)
def test_shipped_recipes_tell_their_plan_and_make_an_update_on_a_small_release(
    path,
    tmp_path,
    clip_folder,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(path.parents[2])
    monkeypatch.setattr(stop_rules, "PROBES", 2)
    shipped = load_experiment_config(path)
    expert, settings = shipped.model.expert, shipped.posttrain
    release = make_release(
        tmp_path / "release", replace(DIT, in_dim=16, out_dim=16), pair=expert is not None
    )
    judge = f"[{{type: pickscore, path: {clip_folder}}}]"
    words = [
        f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")
    ]
    words += [
        f"output_dir={tmp_path}",
        f"text_encoder.cache_dir={tmp_path}/text",
        "video.width=64",
        "video.height=32",
        "train.sample_num_steps=2",
        f"posttrain.eval_rewards={judge}",
        "posttrain.eval_prompts=2",
        "posttrain.prompts_per_epoch=2",
        "posttrain.micro_batch=2",
        f"train.max_steps={settings.updates_per_epoch}",
    ]
    if settings.algorithm == "srpo":
        words.append(f"posttrain.srpo.scorer={judge[1:-1]}")
    else:
        words += [f"posttrain.rewards={judge}", "posttrain.group_size=2"]
    if settings.algorithm == "dpo":
        words += ["posttrain.dpo.collect=2", "posttrain.dpo.batch=1"]
    if not settings.rollout.sde_steps:  # those of a recipe that names them must be there
        words.append("posttrain.rollout.steps=4")
    given = ["--config", str(path), "--device", "cpu", *words]
    assert posttrain.main([*given, "--dry-run"]) == 0
    told = capsys.readouterr().out
    frames = shipped.video.num_frames
    latents = [(frames - 1) // 4 + 1, 4, 8, 16]
    assert (
        f"64 × 32, {frames} frames" in told
        and f"latents {latents}" in told
        and "trained noise levels" in told
        and "bytes a sample" in told
    )
    assert (f"{expert} is trained" in told) == (expert is not None)
    if settings.algorithm in ("grpo", "guard"):  # bf16 states, and the means in float32
        picked = told.split("trained noise levels: ")[1].splitlines()[0].count("→")
        assert picked == settings.rollout.sde_pick and "2 prompts × 2 = 4 samples" in told
    assert posttrain.main(given) == 0
    run = load_experiment_config(path, words).run_dir
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        last["step"] == settings.updates_per_epoch
        and last["grad_norm"] > 0
        and last.get("replay", 0) == 0
        and "held_out_pickscore" in last
    )
    weights = read_tensors(latest(run) / "lora.safetensors")
    assert sum(value.abs().sum() for name, value in weights.items() if "lora_B" in name) > 0


def test_an_expert_is_trained_on_its_own_noise_levels_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(RECIPES[0].parents[2])
    release = make_release(tmp_path / "release", replace(DIT, in_dim=16, out_dim=16), pair=True)
    for recipe, word, key in (
        ("guard", "model.expert=low", "rollout.sde_steps"),
        ("guard", "posttrain.rollout.sde_steps=[0, 15]", "rollout.sde_steps"),
        ("srpo", "model.expert=high", "srpo.sigma_window"),
        ("srpo", "posttrain.srpo.sigma_window=[0.9, 0.5]", "srpo.sigma_window"),
    ):
        words = [
            f"{section}.name_or_path={release}"
            for section in ("tokenizer", "text_encoder", "model")
        ]
        words += [
            "video.width=64",
            "video.height=32",
            "posttrain.srpo.scorer={type: color_words}"
            if recipe == "srpo"
            else "posttrain.rewards=[{type: brightness}]",
            "posttrain.eval_rewards=[{type: brightness}]",
            "text_encoder.cache_dir=''",
            f"output_dir={tmp_path}",
        ]
        refused(
            capsys,
            posttrain.main,
            [
                "--config",
                f"configs/posttrain/wan_{recipe}.yaml",
                "--device",
                "cpu",
                "--dry-run",
                *words,
                word,
            ],
            key,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 17])
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    args = parser.parse_args()
    for frame_count in args.frames:
        for name in ("grpo", "srpo"):
            shape = (
                (TINY, 32, 32, frame_count, "cpu", torch.float32, 4)
                if args.tiny
                else (FULL, args.width, args.height, frame_count, "cuda", torch.bfloat16)
            )
            print(json.dumps(updates(name, *shape)), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
