"""Facts about the VTP network beyond the golden vectors: every variant, features, text pooling,
masks, files, precisions."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vtp.models import DINOHead, TextTransformer, VTPConfig, VTPModel, layers, pretrained

TINY = dict(
    vision_embed_dim=24,
    vision_depth=2,
    vision_num_heads=2,
    vision_feature_bottleneck=8,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=1,
    text_embed_dim=16,
    text_depth=1,
    text_num_heads=2,
    text_context_length=6,
    text_vocab_size=20,
)
IDS = torch.tensor([[18, 3, 4, 19, 0, 0], [18, 5, 19, 0, 0, 0]])


def tiny(**changes):
    return VTPModel(VTPConfig(**{**TINY, **changes})).eval()


def everything(model, image):
    with torch.no_grad():
        outputs = [
            *model(image, forward_type="rec").values(),
            *model(image, forward_type="feature").values(),
        ]
        if model.config.train_clip:
            outputs += model(image, IDS).values()
    return outputs


VARIANTS = [
    *(
        dict(
            vision_ffn_layer=ffn,
            decoder_ffn_layer=ffn,
            vision_norm_layer=norm,
            decoder_norm_layer=norm,
            vision_init_values=scale,
            decoder_init_values=scale,
            vision_use_qk_norm=qk,
            decoder_use_qk_norm=qk,
        )
        for (ffn, norm), (scale, qk) in zip(
            itertools.product(
                ("mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"),
                ("layernorm", "layernormbf16", "rmsnorm"),
            ),
            itertools.cycle([(None, False), (0.1, True), (0, True), (0.1, False)]),
            strict=False,
        )
    ),
    dict(vision_feature_bottleneck=24),
    dict(vision_bottleneck_ae_only=False),
    dict(vision_clip_feat="pooled"),
    dict(text_ls_init_value=0.0, text_quick_gelu=True, text_no_causal_mask=True),
    dict(text_proj_type="none", text_pool_type="first"),
    dict(text_proj_bias=True, text_pool_type="last"),
    dict(text_pool_type="none"),
    dict(init_logit_bias=-10.0, init_logit_scale=2.0, nonscalar_logit_scale=True),
    dict(train_clip=False),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c.values())))
def test_every_variant_survives_a_file(changes, tmp_path):
    model = tiny(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    again = VTPModel.from_pretrained(tmp_path)
    image = torch.randn(2, 3, 32, 48)
    for before, after in zip(everything(model, image), everything(again, image), strict=True):
        assert torch.equal(before, after)


def test_state_names_of_the_variants():
    names = set(
        tiny(
            vision_init_values=0.1,
            vision_use_qk_norm=True,
            text_ls_init_value=1.0,
            text_proj_bias=True,
        ).state_dict()
    )
    assert {
        "trunk.blocks.0.ls1.gamma",
        "trunk.blocks.1.attn.k_norm.weight",
        "text_transformer.resblocks.0.ls_2.gamma",
    } <= names
    assert {
        "text_projection.weight",
        "text_projection.bias",
        "logit_scale",
    } <= names and "logit_bias" not in names
    assert "trunk.feature_bottleneck.weight" not in tiny(vision_feature_bottleneck=24).state_dict()
    only_images = tiny(train_clip=False, train_reconstruction=False)
    assert all(name.startswith("trunk.") for name in only_images.state_dict())
    with pytest.raises(RuntimeError, match="no pixel decoder"):
        only_images.get_latents_decoded_images(torch.zeros(1, 8, 2, 2))
    with pytest.raises(RuntimeError, match="no text tower"):
        only_images(forward_type="clip", text=IDS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(vision_ffn_layer="swiglu16"), "swiglu16"),
        (dict(decoder_norm_layer="batchnorm"), "batchnorm"),
        (dict(vision_num_heads=5), "24 is not divisible by num_heads 5"),
        (dict(vision_num_heads=4), "divisible by 4, got 6"),
        (dict(text_pool_type="mean"), "text_pool_type is 'mean'"),
        (dict(text_num_heads=3), "16 is not divisible by text_num_heads 3"),
        (dict(vision_clip_feat="max"), "vision_clip_feat is 'max'"),
        (dict(text_embed_cls=True), "text_embed_cls is true"),
    ],
)
def test_configs_that_cannot_be_built_say_why(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


# ── encoder ───────────────────────────────────────────────────────────────────────────────────────
def test_features_agree_with_each_other():
    model, image = tiny(), torch.randn(2, 3, 32, 48)
    last = model.get_last_layer_feature(image)
    ((patches, cls),) = model.get_intermediate_layers_feature(image, 1, return_class_token=True)
    assert torch.equal(patches, last["patch_tokens"]) and torch.equal(cls, last["cls_token"])
    (grid,) = model.get_intermediate_layers_feature(image, [1], reshape=True)
    assert torch.equal(grid.flatten(2).mT, patches)
    assert len(model.get_intermediate_layers_feature(image, 2)) == 2
    latents = model.get_reconstruction_latents(image)
    narrow = model.get_last_layer_feature(image, use_bottleneck=True)
    assert torch.allclose(latents.flatten(2).mT, narrow["patch_tokens"]) and latents.shape == (
        2,
        8,
        2,
        3,
    )
    assert torch.equal(model.trunk(image), narrow["cls_token"])
    for wrong in ([2], 3):
        with pytest.raises(ValueError, match="encoder with 2 blocks"):
            model.get_intermediate_layers_feature(image, wrong)


def test_remainders_are_cut_and_samples_do_not_mix():
    model, image = tiny(), torch.randn(3, 3, 50, 70)
    latents = model.get_reconstruction_latents(image)
    assert torch.equal(latents, model.get_reconstruction_latents(image[..., :48, :64]))
    assert torch.allclose(latents[1:2], model.get_reconstruction_latents(image[1:2]), atol=1e-3)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        model.get_reconstruction_latents(image[..., :15])
    with pytest.raises(ValueError, match=r"\(batch, 8, h, w\)"):
        model.get_latents_decoded_images(torch.zeros(1, 9, 2, 2))


def test_masked_patches_cannot_be_seen():
    model, image = tiny().train(), torch.randn(2, 3, 32, 32)
    masks = torch.tensor([[True, False, False, False], [False, False, True, True]])
    seen = model.trunk(image, is_training=True, masks=masks)["x_prenorm"]
    for sample, row, column in ((0, 0, 0), (1, 1, 0), (1, 1, 1)):
        image[sample, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1
    assert torch.equal(seen, model.trunk(image, is_training=True, masks=masks)["x_prenorm"])
    assert not torch.equal(seen, model.trunk(image, is_training=True)["x_prenorm"])


def test_stochastic_depth_skips_or_scales():
    x = torch.ones(8, 5, 4)
    gain = layers._add_branch(x, lambda kept: torch.ones_like(kept), drop_ratio=0.25) - 1
    per_sample = sorted(gain[:, 0, 0].tolist())
    assert per_sample == pytest.approx([0, 0] + [8 / 6] * 6)
    assert torch.equal(layers._add_branch(x, torch.ones_like, drop_ratio=0.0), x + 1)


def test_rotary_positions_survive_every_cast_and_mode():
    model, image = tiny(), torch.randn(1, 3, 48, 32)
    expected = model.get_reconstruction_latents(image)
    for cast in (model.half, model.double, model.bfloat16, model.float):
        assert cast().trunk.rope_embed.periods.dtype == torch.bfloat16
    model = tiny()
    with torch.inference_mode():
        model.get_reconstruction_latents(image)
    model.get_reconstruction_latents(
        image
    ).sum().backward()  # the table was first made in inference mode
    assert (
        expected.shape == (1, 8, 3, 2)
        and model.trunk.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    )


@pytest.mark.thorough
def test_training_compiles_without_graph_breaks():
    trunk = tiny(vision_use_qk_norm=True, vision_depth=1).train().trunk
    compiled = torch.compile(trunk.encode, backend="eager", fullgraph=True)
    for size in ((32, 32), (48, 64)):  # the second size makes the axes symbolic
        image = torch.randn(2, 3, *size)
        assert torch.allclose(compiled(image), trunk.encode(image), atol=1e-3)


# ── text ──────────────────────────────────────────────────────────────────────────────────────────
def text_tower(**changes):
    sizes = dict(context_length=6, vocab_size=20, embed_dim=16, num_heads=2, depth=2)
    return TextTransformer(**{**sizes, **changes}).eval()


@torch.no_grad()
def test_text_pooling():
    ids = torch.tensor([[18, 3, 4, 19, 0, 0]])
    after_end, repeated = ids.clone(), ids.clone()
    after_end[0, 4:] = 7
    repeated[0, 5] = 19  # a second end token: the first counts
    tower = text_tower()
    assert torch.equal(tower(ids), tower(after_end)) and torch.equal(tower(ids), tower(repeated))
    free = text_tower(no_causal_mask=True)
    assert not torch.allclose(free(ids), free(after_end))
    every = text_tower(pool_type="none", proj_type="none")
    tokens = every(ids)
    for pool, index in (("argmax", 3), ("first", 0), ("last", 5)):
        every.text_pool_type = pool
        assert torch.equal(every(ids), tokens[:, index])
    with pytest.raises(ValueError, match=r"\(1, 4\); must be \(batch, 6\)"):
        tower(ids[:, :4])


@torch.no_grad()
def test_contrast():
    image = torch.randn(3, 3, 32, 32)
    model = tiny(init_logit_bias=-3.0)
    outputs = model(image, IDS)
    logits, transposed = model.get_clip_logits(image, IDS)
    expected = (
        outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        + outputs["logit_bias"]
    )
    assert torch.allclose(logits, expected, atol=1e-6) and torch.equal(logits.T, transposed)
    assert (
        outputs["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
        and outputs["logit_bias"] == -3
    )
    assert torch.allclose(outputs["image_features"].norm(dim=-1), torch.ones(3))
    assert model(text=IDS)["image_features"] is None
    pooled = tiny(vision_clip_feat="pooled")
    tokens = pooled.get_last_layer_feature(image)["patch_tokens"]
    assert torch.allclose(
        pooled.get_clip_image_feature(image, normalize=False),
        pooled.visual_proj(tokens.mean(1)),
        atol=1e-6,
    )


def test_dino_head_is_bounded_by_its_gains():
    head = DINOHead(24, 50, hidden_dim=32, bottleneck_dim=16)
    x = torch.randn(4, 7, 24)
    logits = head(x)
    assert logits.shape == (4, 7, 50) and logits.abs().max() <= 1 + 1e-6  # cosines at the start
    with torch.no_grad():
        head.prototypes.mul_(3)
        assert torch.allclose(head(x), logits, atol=1e-6)
        head.gain.mul_(2)
    assert torch.allclose(head(x), 2 * logits, atol=1e-6)
    head(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


# ── files ─────────────────────────────────────────────────────────────────────────────────────────
def test_half_precision_files_and_unknown_keys(tmp_path):
    model = tiny(train_clip=False)
    model.config.transformers_version, model.config.somebody_elses_key = "4.56.0.dev0", [1]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode
    weights = load_file(tmp_path / pretrained.WEIGHTS_FILE)
    assert weights["trunk.rope_embed.periods"].dtype == torch.bfloat16
    for stored in (torch.float16, torch.bfloat16):
        halves = {
            name: tensor.to(torch.float32 if "periods" in name else stored)
            for name, tensor in weights.items()
        }
        save_file(halves, tmp_path / pretrained.WEIGHTS_FILE)
        loaded = VTPModel.from_pretrained(tmp_path)
        assert (
            loaded.dtype == torch.float32
            and loaded.trunk.rope_embed.periods.dtype == torch.bfloat16
        )
        assert torch.equal(loaded.trunk.cls_token, weights["trunk.cls_token"].to(stored).float())
        assert VTPModel.from_pretrained(tmp_path, dtype=stored).dtype == stored
    assert loaded.config == model.config and loaded.config.somebody_elses_key == [1]


def test_sharded_checkpoint(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    whole = tmp_path / pretrained.WEIGHTS_FILE
    weights = load_file(whole)
    whole.unlink()
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[:40],
        "model-00002-of-00002.safetensors": names[40:],
    }
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = tmp_path / pretrained.INDEX_FILE
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensor in VTPModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, weights[name])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002"):
        VTPModel.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="files of the same folder"):
        VTPModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / pretrained.WEIGHTS_FILE
    weights = load_file(file)
    changed = {name: tensor for name, tensor in weights.items() if name != "trunk.norm.weight"}
    save_file(
        {**changed, "trunk.storage_tokens": torch.zeros(1), "trunk.mask_token": torch.zeros(1, 25)},
        file,
    )
    with pytest.raises(ValueError) as error:
        VTPModel.from_pretrained(tmp_path)
    for words in (
        "1 missing: trunk.norm.weight",
        "1 unexpected: trunk.storage_tokens",
        "trunk.mask_token is (1, 25)",
        "(1, 24)",
    ):
        assert words in str(error.value)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        VTPModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        VTPModel.from_pretrained(tmp_path)
    for text, words in (
        ('{"model_type": "clip"}', "must be 'vtp'"),
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            VTPModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        VTPModel.from_pretrained(tmp_path / "elsewhere")
