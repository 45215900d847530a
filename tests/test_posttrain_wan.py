"""GRPO and SRPO on the Wan transformer with adapters on one of two experts. As a command it measures the 1.3 B shape on a GPU:

    PYTHONPATH=VTP:. python tests/test_posttrain_wan.py [--frames 1 17] [--width 832 --height 480]
"""

import argparse
import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from test_posttrain_rewards import clip_folder  # noqa: F401
from tiny import refused
from torch import Tensor, nn
from wan_release import DIT, make_release

from mmdit.adapters import LoRAConfig, adapters, inject
from mmdit.diffusion import FlowMatching, FlowMatchingConfig
from mmdit.experiment import load_experiment_config
from mmdit.interfaces import LatentSpec, TextTokens
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.posttrain.online import online
from mmdit.posttrain.prompts import Prompts
from mmdit.posttrain.rewards import Brightness
from mmdit.posttrain.session import Session
from mmdit.posttrain.settings import PosttrainConfig, RatioConfig, RolloutConfig, SRPOConfig
from mmdit.posttrain.srpo import srpo
from mmdit.scripts import posttrain
from mmdit.training.checkpoint import latest, read_tensors
from mmdit.training.distributed import World
from mmdit.training.ema import EMAConfig
from mmdit.training.learner import Learner
from mmdit.training.settings import TrainConfig
from mmdit.training.trainer import TrainState

BOUNDARY = 0.875
RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs/posttrain").glob("wan_*.yaml"))
TINY = WanConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, text_len=8, freq_dim=16)
FULL = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)  # 1.3 B


class Experts(nn.Module):
    """Two transformers behind our interface; a noise level has one of them, high at the boundary itself."""

    def __init__(self, config: WanConfig, dtype: torch.dtype, device):
        super().__init__()
        with torch.device(device):
            self.low, self.high = WanDiT(config, checkpointing=True), WanDiT(config)
        for name, p in self.named_parameters():
            p.data = p.data.to(WanDiT.stored_dtype(name, dtype))
            if "norm" not in name:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, t: Tensor, text: TextTokens) -> Tensor:
        high = (t >= 1000 * BOUNDARY).tolist()
        assert all(high) or not any(high), "a batch has one noise level, or one side of the boundary"
        words = text.embeddings * text.valid[..., None]
        return rearrange((self.high if high[0] else self.low)(rearrange(x, "b f h w c -> b c f h w"), t, words), "b c f h w -> b f h w c")


class Words(nn.Module):
    """Stands for embeddings that were extracted before."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.dim = config.text_dim

    def forward(self, captions: list[str]) -> TextTokens:
        generator = torch.Generator().manual_seed(len(captions))
        return TextTokens(torch.randn(len(captions), 6, self.dim, generator=generator), torch.ones(len(captions), 6, dtype=torch.bool))


class Decoder:
    spec, fingerprint = LatentSpec(channels=16, spatial=8), "stand-in"

    def decode(self, latents: Tensor) -> Tensor:
        pixels = F.interpolate(rearrange(latents[..., :3], "b f h w c -> (b f) c h w"), scale_factor=8.0, mode="bilinear")
        return rearrange(pixels.sigmoid(), "(b f) c h w -> b f c h w", b=len(latents))


def digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        sha.update(tensor.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()


def one_update(algorithm: str, config: WanConfig, width: int, height: int, frames: int, device="cpu", dtype=torch.float32, group: int = 4) -> dict:
    """Build, adapt the low-noise expert, make one update; what it cost and what it touched."""
    world = World(device=torch.device(device))
    torch.manual_seed(0)
    model = Experts(config, dtype, device)
    inject(model, LoRAConfig(enabled=True, rank=32, alpha=32, target_modules=("low.blocks.*.cross_attn.[kv]", "low.blocks.*.self_attn.q")))
    learner = Learner(model, Words(config), FlowMatching(FlowMatchingConfig()), Decoder.spec).to(world.device)
    before = digest(learner.model.high)
    # noise levels of 4 steps at shift 3: 1, 0.9, 0.75, 0.5, 0; steps 2 and 3 are the low expert's
    settings = PosttrainConfig(algorithm=algorithm, prompts_per_epoch=2, group_size=group, micro_batch=2, rewards=(Brightness(),),
                               eval_rewards=(Brightness(),), rollout=RolloutConfig(steps=4, shift=3.0, sde_steps=(2,)),
                               ratio=RatioConfig(replay_tolerance=0.0), srpo=SRPOConfig(sigma_window=(0.8, 0.5)))  # fmt: skip
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    train = TrainConfig(precision=precision, lr=1e-3, warmup_steps=0, max_steps=1, sample_num_steps=2, sample_cfg_scale=1.0, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Prompts(["a cat", "a dog"])
        session = Session(settings, train, 0, TrainState.create(learner, train, EMAConfig(enabled=False)), Decoder(), prompts,
                          {"seen": prompts.at([0])}, width, height, frames, Path(folder), lambda session: None, world)  # fmt: skip
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        assert {"srpo": srpo}.get(algorithm, online)(session)
        last = session.log.last
    moved = sum(layer.lora_B.abs().sum().item() for layer in adapters(learner.model.low).values())
    return {"algorithm": algorithm, "latents": [frames, height // 8, width // 8], "seconds": round(last["seconds"], 2), "replay": last.get("replay", 0.0),
            "loss_or_score": last.get("loss", last.get("score_denoise")), "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else None,
            "high_untouched": digest(learner.model.high) == before, "adapters_moved": moved, "trained": sum(map(torch.Tensor.numel, session.reference.values()))}  # fmt: skip


def test_one_update_moves_the_adapters_of_one_expert_alone():
    for algorithm in ("grpo", "srpo"):
        for frames in (1, 3):
            report = one_update(algorithm, TINY, 32, 32, frames)
            assert report["high_untouched"] and report["adapters_moved"] > 0 and report["replay"] == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_tell_their_plan_and_make_an_update_on_a_small_release(path, tmp_path, clip_folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(path.parents[2])
    shipped = load_experiment_config(path)
    expert, settings = shipped.model.expert, shipped.posttrain
    release = make_release(tmp_path / "release", replace(DIT, in_dim=16, out_dim=16), pair=expert is not None)
    judge = f"[{{type: pickscore, path: {clip_folder}}}]"
    words = [f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")]
    words += [f"output_dir={tmp_path}", f"text_encoder.cache_dir={tmp_path}/text", "video.width=64", "video.height=32", "train.sample_num_steps=2",
              f"posttrain.rewards={judge}", f"posttrain.eval_rewards={judge}", f"posttrain.srpo.scorer={judge[1:-1]}", "posttrain.eval_prompts=2",
              "posttrain.prompts_per_epoch=2", "posttrain.group_size=2", "posttrain.micro_batch=2", "posttrain.dpo.collect=2", "posttrain.dpo.batch=1",
              f"train.max_steps={settings.updates_per_epoch}"]  # fmt: skip
    given = ["--config", str(path), "--device", "cpu", *words]
    assert posttrain.main([*given, "--dry-run"]) == 0
    told = capsys.readouterr().out
    frames = shipped.video.num_frames
    latents = [(frames - 1) // 4 + 1, 4, 8, 16]
    assert f"64 × 32, {frames} frames" in told and f"latents {latents}" in told and "trained noise levels" in told and "bytes a sample" in told
    assert (f"{expert} is trained" in told) == (expert is not None)
    if settings.algorithm in ("grpo", "guard"):  # bf16 states, and the means in float32
        picked = told.split("trained noise levels: ")[1].splitlines()[0].count("→")
        assert picked == settings.rollout.sde_pick and "2 prompts × 2 = 4 samples" in told
    assert posttrain.main(given) == 0
    run = load_experiment_config(path, words).run_dir
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == settings.updates_per_epoch and last["grad_norm"] > 0 and last.get("replay", 0) == 0 and "held_out_pickscore" in last
    weights = read_tensors(latest(run) / "lora.safetensors")
    assert sum(value.abs().sum() for name, value in weights.items() if "lora_B" in name) > 0


def test_an_expert_is_trained_on_its_own_noise_levels_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(RECIPES[0].parents[2])
    release = make_release(tmp_path / "release", replace(DIT, in_dim=16, out_dim=16), pair=True)
    for recipe, word, key in (("guard", "model.expert=low", "rollout.sde_steps"), ("guard", "posttrain.rollout.sde_steps=[0, 15]", "rollout.sde_steps"),
                              ("srpo", "model.expert=high", "srpo.sigma_window"), ("srpo", "posttrain.srpo.sigma_window=[0.9, 0.5]", "srpo.sigma_window")):  # fmt: skip
        words = [f"{section}.name_or_path={release}" for section in ("tokenizer", "text_encoder", "model")]
        words += ["video.width=64", "video.height=32", "posttrain.rewards=[{type: brightness}]", "posttrain.eval_rewards=[{type: brightness}]",
                  "posttrain.srpo.scorer={type: color_words}", "text_encoder.cache_dir=''", f"output_dir={tmp_path}"]  # fmt: skip
        refused(capsys, posttrain.main, ["--config", f"configs/posttrain/wan_{recipe}.yaml", "--device", "cpu", "--dry-run", *words, word], key)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 17])
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    args = parser.parse_args()
    for frame_count in args.frames:
        for name in ("grpo", "srpo"):
            latent_frames = (frame_count - 1) // 4 + 1
            print(json.dumps(one_update(name, FULL, args.width, args.height, latent_frames, "cuda", torch.bfloat16)), flush=True)
            torch.cuda.empty_cache()
