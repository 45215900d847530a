"""CLIP's picture encoder: the numbers of transformers, both layouts, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit.text_encoders.clip_vision import ClipVision, ClipVisionSizes, load_clip_vision

OFFICIAL = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WIDTH, SIDE, PATCH, BLOCKS = 160, 56, 14, 3  # two heads of 80, as wide as the released ones


def official_tensors(
    width: int = WIDTH, blocks: int = BLOCKS, places: int = 17, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under the names of the official file, with a text tower and the ends that Wan
    does not read."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "visual.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "visual.pos_embedding": (1, places, width),
        "visual.cls_embedding": (1, 1, width),
        "visual.head": (width, 8),
        "textual.model.a.weight": (3, 3),
        "log_scale": (),
    }
    norms = ["visual.pre_norm", "visual.post_norm"]
    for i in range(blocks):
        norms += [f"visual.transformer.{i}.norm{j}" for j in (1, 2)]
        layers = {
            "attn.to_qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.0": (48, width),
            "mlp.2": (width, 48),
        }
        for name, (out, into) in layers.items():
            shapes |= {
                f"visual.transformer.{i}.{name}.weight": (out, into),
                f"visual.transformer.{i}.{name}.bias": (out,),
            }
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def transformers_tensors(
    official: dict[str, torch.Tensor], prefix: str = "vision_model."
) -> dict[str, torch.Tensor]:
    """The same weights as transformers names them, written down independently of the code under
    test."""
    width = official["visual.cls_embedding"].numel()
    result = {
        "embeddings.class_embedding": official["visual.cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": official["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": official["visual.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        result |= {
            f"{new}.{kind}": official[f"visual.{old}.{kind}"]
            for new, old in (("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm"))
        }
        i = 0
        while f"visual.transformer.{i}.norm1.weight" in official:
            old, new = f"visual.transformer.{i}.", f"encoder.layers.{i}."
            for number, part in enumerate("qkv"):
                rows = slice(number * width, (number + 1) * width)
                result[f"{new}self_attn.{part}_proj.{kind}"] = official[f"{old}attn.to_qkv.{kind}"][
                    rows
                ]
            for here, there in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            ):
                result[f"{new}{there}.{kind}"] = official[f"{old}{here}.{kind}"]
            i += 1
    return {prefix + name: value.contiguous() for name, value in result.items()}


def write_encoder(
    folder: Path, layout: str, tensors: dict[str, torch.Tensor], heads: int = 2
) -> None:
    if layout == "official":
        torch.save(tensors, folder / OFFICIAL)
        return
    (folder / "image_encoder").mkdir()
    save_file(transformers_tensors(tensors), folder / "image_encoder/model.safetensors")
    known = {
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "_class_name": "CLIPVisionModel",
    }
    (folder / "image_encoder/config.json").write_text(json.dumps(known))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_transformers_computes_the_same(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    tensors = official_tensors()
    write_encoder(tmp_path, layout, tensors)
    ours = load_clip_vision(tmp_path)
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
        )
    ).eval()
    prefix = (
        "vision_model."
        if any(name.startswith("vision_model.") for name in theirs.state_dict())
        else ""
    )
    theirs.load_state_dict(transformers_tensors(tensors, prefix), strict=False)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    result = ours.states(pixels)
    assert result.shape == (2, 17, WIDTH) and ((result - expected).norm() / expected.norm()) < 2e-6


@torch.no_grad()
def test_pictures_are_squeezed_to_a_square_and_normalised(tmp_path):
    write_encoder(tmp_path, "official", official_tensors())
    model, seen = load_clip_vision(tmp_path), {}
    model.states = lambda x: seen.update(x=x)
    model(torch.tensor([0.5, 0.25, 1.0])[:, None, None].expand(1, 3, 40, 90))
    expected = [
        (0.5 - 0.48145466) / 0.26862954,
        (0.25 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    assert seen["x"].shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(seen["x"][0, :, 3, 5], torch.tensor(expected))


def test_the_released_size():
    with torch.device("meta"):
        model = ClipVision(ClipVisionSizes(1280, 5120, 31, 16, 14, 257))
    block = 4 * (1280 * 1280 + 1280) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    assert sum(p.numel() for p in model.parameters()) == 31 * block + 1280 * (
        3 * 14 * 14 + 1 + 257 + 2
    )


def test_what_is_no_such_encoder_is_refused_in_one_sentence(tmp_path):
    def refused(*words: str, path: Path = tmp_path) -> None:
        with pytest.raises(ValueError) as caught:
            load_clip_vision(path)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), (
            caught.value
        )

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    refused("is no CLIP picture encoder", f"holds neither {OFFICIAL} nor image_encoder")
    tensors = official_tensors()
    torch.save(
        {name: value for name, value in tensors.items() if "1.norm2.bias" not in name},
        tmp_path / OFFICIAL,
    )
    refused("lacks 1 tensors, first transformer.1.norm2.bias")
    torch.save({"textual.a": torch.ones(1)}, tmp_path / OFFICIAL)
    refused("is no CLIP picture encoder", "pos_embedding")
    torch.save({**tensors, "visual.extra.weight": torch.ones(1)}, tmp_path / OFFICIAL)
    refused("1 unknown tensors, first extra.weight")
    (tmp_path / OFFICIAL).unlink()
    write_encoder(tmp_path, "diffusers", tensors, heads=7)
    refused("7 heads", "160")
    (tmp_path / "image_encoder/config.json").write_text('{"hidden_act": "quick_gelu"}')
    refused("quick_gelu", "'gelu'")
