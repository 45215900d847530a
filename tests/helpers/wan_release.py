"""Releases of Wan so small that a test can make them: transformers, VAE, UMT5 and its tokenizer, in
a folder as published."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmdit.interop.wan_weights import save_dit
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.text_encoders.umt5 import transformers_name
from mmdit.tokenizers.wan_vae_network import WanVAE, WanVAESizes
from tests.test_clip_vision import official_tensors, write_encoder
from tests.test_umt5 import write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
DIT = WanConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_dim=4,
    out_dim=4,
    freq_dim=16,
    text_dim=24,
    text_len=32,
)
TI2V, I2V = replace(DIT, in_dim=48, out_dim=48), replace(DIT, in_dim=12)
I2V_21 = replace(I2V, image_dim=80)
FLF2V = replace(I2V_21, image_positions=514)


def random_dit(config: WanConfig, seed: int = 0) -> WanDiT:
    torch.manual_seed(seed)
    model = WanDiT(config)
    with torch.no_grad():
        for _name, weight in model.named_parameters():
            weight.normal_(std=0.1 if weight.ndim < 2 else 1 / math.sqrt(weight[0].numel()))
    return model.eval()


def make_release(folder: Path, config: WanConfig = DIT, pair: bool = False) -> Path:
    for seed, expert in enumerate(("high_noise_model", "low_noise_model") if pair else ("aside",)):
        save_dit(random_dit(config, seed), folder / expert)
    if not pair:
        for file in (folder / "aside").iterdir():
            file.rename(folder / file.name)
        (folder / "aside").rmdir()
    if config.out_dim in (16, 48):
        torch.manual_seed(5)
        large = config.out_dim == 48
        vae, name = (
            WanVAE(WanVAESizes(2, 2, config.out_dim, large)).state_dict(),
            f"Wan2.{1 + large}_VAE.pth",
        )
    else:
        vae, name = load_file(GOLDEN / "wan_vae21_tiny/official.safetensors"), "Wan2.1_VAE.pth"
        known = json.loads((GOLDEN / "wan_vae21_tiny/meta.json").read_text())["diffusers_config"]
        own = (
            json.loads((folder / "config.json").read_text())
            if (folder / "config.json").exists()
            else {}
        )
        (folder / "config.json").write_text(
            json.dumps(own | {key: known[key] for key in ("latents_mean", "latents_std")})
        )
    torch.save(vae, folder / name)
    if config.image_dim:
        write_encoder(folder, "official", official_tensors(config.image_dim, places=257))
    torch.save(
        load_file(GOLDEN / "umt5_tiny/official.safetensors"),
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def make_diffusers_release(folder: Path, config: WanConfig = DIT, pair: bool = True) -> Path:
    """The same weights as those of `make_release`, laid out as Diffusers has them."""
    for seed, name in enumerate(("transformer", "transformer_2")[: 1 + pair]):
        save_dit(random_dit(config, seed), folder / name, "diffusers")
        stored = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(
            json.dumps(stored | {"text_len": config.text_len})
        )
    meta = json.loads((GOLDEN / "wan_vae21_tiny/meta.json").read_text())
    vae, text = (
        load_file(GOLDEN / "wan_vae21_tiny/official.safetensors"),
        load_file(GOLDEN / "umt5_tiny/official.safetensors"),
    )
    for part, tensors, file in (
        (
            "vae",
            {meta["key_map_official_to_diffusers"][name]: value for name, value in vae.items()},
            "diffusion_pytorch_model",
        ),
        ("text_encoder", {transformers_name(name): value for name, value in text.items()}, "model"),
    ):
        (folder / part).mkdir()
        save_file(tensors, folder / part / f"{file}.safetensors")
    if config.image_dim:
        write_encoder(folder, "diffusers", official_tensors(config.image_dim, places=257), heads=1)
    (folder / "vae/config.json").write_text(json.dumps(meta["diffusers_config"]))
    (folder / "model_index.json").write_text("{}")
    write_tokenizer(folder / "tokenizer")
    return folder


def config_text(release: Path, folder: Path, spatial: int = 8, channels: int = 4) -> str:
    return f"""\
experiment_name: wan
output_dir: {folder}/runs
num_workers: 0
video: {{width: 64, height: 32, num_frames: 9}}
tokenizer: {{type: wan_vae, name_or_path: {release}, latent_f: {spatial}, latent_d: {channels}}}
text_encoder: {{type: umt5, name_or_path: {release}, dtype: float32}}
model: {{type: wan, name_or_path: {release}}}
flow_matching: {{shift: 5.0}}
train:
  precision: fp32
  batch_size: 2
  lr: 1.0e-3
  warmup_steps: 0
  max_steps: 3
  log_every_steps: 1
  save_every_steps: 2
  sample_num_steps: 2
  sample_solver: unipc
  sample_grid: wan
ema: {{decay: 0.5}}
"""
