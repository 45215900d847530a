"""Rewards that look at pictures: analytic ones, the oracle on true pictures, and CLIP-like networks
from local weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.config import ConfigError
from mmdit.data.moving_shapes.render import render
from mmdit.data.moving_shapes.sentences import prompts
from mmdit.interop.clip_similarity import from_open_clip
from mmdit.pixels import to_unit
from mmdit.posttrain.clip_like import HPS, ClipReward, PickScore
from mmdit.posttrain.rewards import (
    Brightness,
    BrightnessRank,
    ColorMatch,
    Motion,
    Reward,
    RewardPool,
    Samples,
    Sharpness,
)
from mmdit.posttrain.shapes import ColorWords, PromptAccuracy
from mmdit.rng import Draws


def samples(pixels, captions=None, facts=None) -> Samples:
    count = len(pixels)
    return Samples(
        captions=captions or ["x"] * count,
        latents=torch.zeros(count, 1),
        groups=torch.arange(count),
        draws=Draws.of(0, 0, count),
        pixels=pixels,
        facts=facts,
    )


def test_analytic_rewards_rank_pictures_as_an_eye_would():
    flat, bright, noisy = (
        torch.full((1, 4, 3, 16, 16), 0.2),
        torch.full((1, 4, 3, 16, 16), 0.9),
        torch.rand(1, 4, 3, 16, 16),
    )
    red = torch.zeros(1, 4, 3, 16, 16)
    red[:, :, 0] = 1
    pixels = torch.cat([flat, bright, noisy, red])
    value = RewardPool((Brightness(), ColorMatch(), Sharpness(), Motion()), 0).score(
        samples(pixels)
    )
    assert value["brightness"].argmax() == 1 and value["brightness"][0] == pytest.approx(0.2)
    assert value["color_match"].argmax() == 3 and value["color_match"][3] == pytest.approx(
        0, abs=1e-6
    )
    assert (
        value["sharpness"].argmax() == value["motion"].argmax() == 2
        and value["motion"][0] == value["sharpness"][0] == 0
    )
    assert Motion().call(samples(pixels[:, :1])).abs().sum() == 0
    for reward in (Brightness(), ColorMatch(), Sharpness(), Motion()):
        x = torch.rand(2, 2, 3, 8, 8, requires_grad=True)
        reward.call(samples(x)).sum().backward()
        assert x.grad.abs().sum() > 0


@dataclass(frozen=True)
class Saved(Reward):
    """Looks at pictures as files have them, some at a time."""

    needs: ClassVar[tuple[str, ...]] = ("images", "latents")
    type: str = "saved"

    def call(self, samples):
        assert samples.images.dtype == torch.uint8 and len(samples.images) == len(
            samples.captions
        ) <= (self.batch or 5)
        seen.append(samples.latents.device.type)
        return samples.images[:, 0, 0, 0].float().mean(1) / 255


seen: list[str] = []


def test_a_reward_may_ask_for_images_in_batches_on_its_own_device():
    pixels, facts = torch.rand(5, 2, 3, 4, 6), [object()] * 5
    given = samples(pixels, [f"c{i}" for i in range(5)], facts)
    assert (
        given.images.shape == (5, 2, 4, 6, 3)
        and (given.images[..., 1] / 255 - pixels[:, :, 1]).abs().max() <= 0.5 / 255 + 1e-6
    )
    values = RewardPool(
        (
            Saved(name="two", batch=2),
            Saved(name="all"),
            Brightness(batch=3),
            Brightness(name="whole"),
        ),
        0,
    ).score(given)
    assert torch.equal(values["two"], values["all"]) and torch.equal(
        values["brightness"], values["whole"]
    )
    moved = given.to("meta")
    assert (
        moved.pixels.is_meta
        and moved.draws.indices.is_meta
        and moved.facts is facts
        and not given.pixels.is_meta
    )
    seen.clear()
    with pytest.raises(NotImplementedError):  # a meta tensor has no values to give
        RewardPool((Saved(device="meta"),), 0).score(given)
    assert seen == ["meta"] or not seen
    for bad in (lambda: Brightness(batch=-1), lambda: BrightnessRank(batch=2)):
        with pytest.raises(ConfigError, match="batch"):
            bad()


def test_the_oracle_rewards_true_pictures_of_their_own_prompt():
    some = prompts("seen", False)[:8]
    facts = [p.facts for p in some]
    pixels = to_unit(render(facts, 64, 64, 1))
    for partial in (0.0, 0.5, 1.0):
        reward = PromptAccuracy(partial=partial)
        right, wrong = (
            reward.call(samples(pixels, facts=f)) for f in (facts, facts[1:] + facts[:1])
        )
        assert right.mean() > 0.99 > wrong.mean() and (wrong.mean() > 0) == (partial > 0)


def test_the_words_of_colours_know_their_direction():
    red = torch.zeros(2, 1, 3, 4, 4)
    red[:, :, 0] = 1
    score = ColorWords()(red, ["red. a circle", "Blue. a circle"])
    assert 0.3 < score[0] < 1 and score[1] < 0
    assert ColorWords()(red, ["a circle"] * 2).abs().sum() == 0 and ColorWords()(
        torch.full((1, 1, 3, 2, 2), 0.5), ["red"]
    ).item() == pytest.approx(0)


def make_clip(folder: Path) -> Path:
    """A CLIP of two narrow layers with its tokenizer in `folder`, as the library saves it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config=sizes
        | {
            "vocab_size": 12,
            "max_position_embeddings": 8,
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {
        word: i
        for i, word in enumerate(
            ["<pad>", "<bos>", "<eos>", "a", "red", "blue", "circle", "star", "<unk>"]
        )
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def test_a_clip_from_a_folder_scores_as_transformers_does_and_has_a_gradient(clip_folder):
    from transformers import CLIPModel

    pixels, texts = (
        torch.rand(3, 2, 3, 16, 16, requires_grad=True),
        ["a red star", "a circle", "a red star"],
    )
    for reward in (ClipReward(path=str(clip_folder)), PickScore(path=str(clip_folder))):
        reward.prepare(torch.device("cpu"))
        score = reward(pixels, texts)
        assert score.shape == (3,) and score.detach().abs().max() <= 1
    torch.testing.assert_close(
        RewardPool((reward,), 1).submit(samples(pixels.detach(), texts)).result()["pickscore"],
        score.detach(),
    )
    score.sum().backward()
    assert pixels.grad.abs().sum() > 0 and all(
        p.grad is None for p in reward.similarity.parameters()
    )
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = torch.tensor([[1, 3, 4, 7, 2], [1, 3, 6, 2, 0]])
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None],
        torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None],
    )
    with torch.no_grad():
        both = clip(tokens, (pixels[:, 0] - mean) / std, attention_mask=(tokens > 0).long())
    known = (both.logits_per_image / clip.logit_scale.exp())[[0, 1, 2], [0, 1, 0]]
    torch.testing.assert_close(reward(pixels[:, :1], texts), known, atol=1e-5, rtol=0)


def open_clip_tensors(own: dict, scale: float = 1.0) -> dict:
    """The tensors of a CLIP of transformers, times `scale`, under the names of OpenCLIP."""
    theirs = {}
    for name, value in own.items():
        tower, _, rest = name.partition(".")
        where = "visual." if tower == "vision_model" else ""
        rest = (
            rest.replace("encoder.layers", "transformer.resblocks").replace("layer_norm", "ln_")
            if "layers" in rest
            else rest
        )
        for old, new in (
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn", "attn"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("final_layer_norm", "ln_final"),
            ("embeddings.patch_embedding.weight", "conv1.weight"),
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            rest = rest.replace(old, new)
        if "projection" in name:
            theirs["visual.proj" if "visual" in name else "text_projection"] = value.T * scale
        elif "position_ids" not in name:
            theirs["logit_scale" if name == "logit_scale" else where + rest] = value * scale
    for name in [
        name for name in theirs if name.endswith("q_proj.weight") or name.endswith("q_proj.bias")
    ]:
        stem, kind = (
            name.replace("q_proj.weight", "").replace("q_proj.bias", ""),
            name.rpartition(".")[2],
        )
        parts = [theirs.pop(f"{stem}{letter}_proj.{kind}") for letter in "qkv"]
        theirs[f"{stem}in_proj_{kind}"] = torch.cat(parts)
    return {name: value.contiguous() for name, value in theirs.items()}


def test_a_clip_that_is_incomplete_or_of_half_precision(clip_folder, tmp_path):
    """What is missing would be drawn anew at each start; half precision is for storing alone."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip/model.safetensors"
    whole = load_file(file)
    pixels, scores = torch.rand(1, 1, 3, 16, 16), {}
    config = tmp_path / "clip/config.json"
    stored = json.loads(config.read_text())
    for kind in ("half", "float32"):
        named = "float16" if kind == "half" else "float32"
        config.write_text(json.dumps(stored | {"dtype": named, "torch_dtype": named}))
        tensors = {n: v.half() if v.is_floating_point() else v for n, v in whole.items()}
        if kind == "float32":
            tensors = {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}
        save_file(tensors, file, {"format": "pt"})
        reward = ClipReward(path=str(tmp_path / "clip"))
        reward.prepare(torch.device("cpu"))
        scores[kind] = reward(pixels, ["a red star"])
    torch.testing.assert_close(scores["half"], scores["float32"], rtol=1e-6, atol=0)
    del whole["text_projection.weight"]
    save_file(whole, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 tensors of CLIP, first text_projection.weight"):
        ClipReward(path=str(tmp_path / "clip")).prepare(torch.device("cpu"))


def test_a_text_that_is_longer_than_clip_reads_is_told_once(clip_folder, caplog):
    reward = ClipReward(path=str(clip_folder))
    reward.prepare(torch.device("cpu"))
    pixels = torch.rand(1, 1, 3, 16, 16)
    reward(pixels, ["a red blue star a red"])  # 8 tokens with its marks, as many as are read
    assert not caplog.records
    for word in ("circle", "star"):
        reward(pixels, [f"a red blue star a red {word}"])
    (record,) = caplog.records
    assert "a text has 9 tokens, CLIP reads 8: the rest is not judged" in record.getMessage()


def test_hps_weights_in_open_clip_names_replace_those_of_the_folder(clip_folder, tmp_path):
    own = load_file(clip_folder / "model.safetensors")
    theirs = open_clip_tensors(own, scale=2)
    save_file(theirs, tmp_path / "hps.safetensors")
    torch.save({"state_dict": theirs}, tmp_path / "hps.pt")
    for file in ("hps.safetensors", "hps.pt"):
        reward = HPS(path=str(clip_folder), weights=str(tmp_path / file))
        reward.prepare(torch.device("cpu"))
        for name, value in reward.similarity.clip.state_dict().items():
            if "position_ids" not in name:
                torch.testing.assert_close(value, own[name] * 2)
    with pytest.raises(ValueError, match="no OpenCLIP"):
        from_open_clip({"visual.head.weight": torch.zeros(1)}, {})


def test_weights_that_would_run_code_are_refused(clip_folder, tmp_path):
    import pickle

    class Marker:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"state_dict": Marker()}))
    with pytest.raises(ValueError, match="bad.pt is refused"):
        HPS(path=str(clip_folder), weights=str(tmp_path / "bad.pt")).prepare(torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
