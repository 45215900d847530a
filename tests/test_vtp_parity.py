"""Our VTP network gives the numbers of the public release: golden vectors, measured values printed
(pytest -s), and proof that the bar is tight enough to notice every mistake that is easily made."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from vtp.models import VTPModel, decoder, layers, rope

GOLDEN = Path(__file__).parent / "golden"
BAR = 1e-5  # relative L2, float32
SETS = {"vtp_tiny": ("64x64", "48x80"), "vtp_variants": ("48x32", "32x64")}


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def measure(name):
    """{what: relative error} over everything that the golden set `name` holds."""
    expected = load_file(GOLDEN / name / "io.safetensors")
    model = VTPModel.from_pretrained(GOLDEN / name)
    errors = {}

    def compare(key, actual):
        errors[key] = relative(actual, expected[key])

    for size in SETS[name]:
        image = expected[f"{size}.image"]
        compare(f"{size}.latents", model.get_reconstruction_latents(image))
        compare(f"{size}.decoded", model.get_latents_decoded_images(expected[f"{size}.latents"]))
        for key, tokens in model.get_last_layer_feature(image).items():
            compare(f"{size}.{key}", tokens)
        compare(f"{size}.bottleneck_cls_token", model.trunk(image))
        for norm, infix in ((False, ""), (True, "normed.")):
            blocks = model.get_intermediate_layers_feature(
                image, model.config.vision_depth, return_class_token=True, norm=norm
            )
            for i, (patches, cls) in enumerate(blocks):
                compare(f"{size}.block{i}.{infix}patch_tokens", patches)
                compare(f"{size}.block{i}.{infix}cls_token", cls)
        if model.config.train_clip:
            compare(f"{size}.clip_image", model.get_clip_image_feature(image))
            compare(f"{size}.clip_logits", model.get_clip_logits(image, expected["text.ids"])[0])
    if model.config.train_clip:
        compare("clip_text", model.get_clip_text_feature(expected["text.ids"]))
    unused = {
        key
        for key in expected.keys() - errors.keys()
        if not key.endswith((".image", ".ids")) and "rope." not in key
    }
    assert not unused, f"golden tensors that nothing is compared with: {unused}"
    return errors


@pytest.mark.parametrize("name", SETS)
def test_golden_vectors(name):
    errors = measure(name)
    print(f"\n{name}: {len(errors)} comparisons, largest relative L2 {max(errors.values()):.1e}")
    for key, error in sorted(errors.items()):
        print(f"  {key:40} {error:.1e}")
    assert max(errors.values()) <= BAR


def test_rotary_tables_bit_for_bit():
    expected = load_file(GOLDEN / "vtp_tiny" / "io.safetensors")
    tables = 0
    for head_dim in (24, 64):
        embedding = rope.RotaryEmbedding(head_dim)
        assert torch.equal(embedding.periods, expected[f"rope.d{head_dim}.periods"])
        for key in expected:
            if key.startswith(f"rope.d{head_dim}.") and key.endswith(".sin"):
                h, w = map(int, key.split(".")[2].split("x"))
                sin, cos = embedding(h, w)
                assert torch.equal(sin, expected[key]) and torch.equal(
                    cos, expected[key[:-3] + "cos"]
                ), key
                tables += 1
    assert tables == 8


def rotary_in_float32(patch):
    def table(self, h, w):
        n = len(self.periods)
        periods = 100 ** (torch.arange(n) / n)
        axes = [
            2 * math.pi * ((torch.arange(length) + 0.5) / length * 2 - 1)[:, None] / periods
            for length in (h, w)
        ]
        grid = torch.cat(
            (axes[0][:, None].expand(h, w, -1), axes[1][None].expand(h, w, -1)), dim=-1
        )
        angles = grid.reshape(h * w, -1).repeat(1, 2)
        return angles.sin(), angles.cos()

    patch.setattr(rope.RotaryEmbedding, "_table", table)
    rotary_applied_in_float32(patch)


def rotary_applied_in_float32(patch):
    def rotate(x, table):
        sin, cos = (half.float() for half in table)
        prefix = x.shape[-2] - len(sin)
        tokens = x[..., prefix:, :]
        first, second = tokens.chunk(2, dim=-1)
        return torch.cat(
            (x[..., :prefix, :], tokens * cos + torch.cat((-second, first), dim=-1) * sin), dim=-2
        )

    patch.setattr(layers, "rotate", rotate)


def class_token_not_rounded(patch):
    original = layers.rotate

    def rotate(x, table):
        prefix = x.shape[-2] - len(table[0])
        return torch.cat((x[..., :prefix, :], original(x, table)[..., prefix:, :]), dim=-2)

    patch.setattr(layers, "rotate", rotate)


def no_rotation(patch):
    patch.setattr(layers, "rotate", lambda x, table: x.bfloat16().to(x.dtype))


def rows_and_columns_swapped(patch):
    original = rope.RotaryEmbedding._table

    def table(self, h, w):
        return tuple(
            half.unflatten(0, (w, h)).transpose(0, 1).flatten(0, 1) for half in original(self, w, h)
        )

    patch.setattr(rope.RotaryEmbedding, "_table", table)


def other_norm_epsilon(patch):
    original = layers.make_norm

    def make_norm(kind, dim):
        norm = original(kind, dim)
        norm.eps = 1e-5 if kind == "layernorm" else 1e-6
        return norm

    patch.setattr(layers, "make_norm", make_norm)


def tanh_gelu(patch):
    original = F.gelu
    patch.setattr(F, "gelu", lambda x: original(x, approximate="tanh"))


def pixels_before_colours(patch):
    def shuffle(x, factor):
        b, _, h, w = x.shape
        return (
            x.view(b, factor, factor, 3, h, w)
            .permute(0, 3, 4, 1, 5, 2)
            .reshape(b, 3, h * factor, w * factor)
        )

    patch.setattr(decoder.F, "pixel_shuffle", shuffle)


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (rotary_in_float32, "vtp_tiny"),
        (rotary_applied_in_float32, "vtp_tiny"),
        (class_token_not_rounded, "vtp_tiny"),
        (no_rotation, "vtp_tiny"),
        (rows_and_columns_swapped, "vtp_tiny"),
        (other_norm_epsilon, "vtp_variants"),
        (tanh_gelu, "vtp_variants"),
        (pixels_before_colours, "vtp_variants"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_bar_notices(mistake, name, monkeypatch):
    """Each mistake moves some output at least twice as far as the bar allows."""
    mistake(monkeypatch)
    errors = measure(name)
    worst = max(errors, key=errors.get)
    print(f"\n{mistake.__name__}: {worst} {errors[worst]:.1e}")
    assert errors[worst] > 2 * BAR


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 2e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_autocast_stays_close(dtype, bar):
    expected = load_file(GOLDEN / "vtp_tiny" / "io.safetensors")
    model = VTPModel.from_pretrained(GOLDEN / "vtp_tiny")
    with torch.autocast("cpu", dtype=dtype):
        latents = model.get_reconstruction_latents(expected["64x64.image"])
        decoded = model.get_latents_decoded_images(latents)
    assert latents.dtype == dtype
    errors = (
        relative(latents, expected["64x64.latents"]),
        relative(decoded, expected["64x64.decoded"]),
    )
    print(f"\nautocast {dtype}: latents {errors[0]:.1e}, decoded {errors[1]:.1e}")
    assert max(errors) < bar


def test_parameter_counts_of_the_released_sizes():
    """Of the published configs; the state dict of S has 477 tensors."""
    from vtp.models import VTPConfig

    totals = {(384, 12, 6): 167_177_857, (768, 12, 12): 295_639_297, (1024, 24, 16): 731_570_689}
    for (width, depth, heads), total in totals.items():
        sizes = dict(zip(("embed_dim", "depth", "num_heads"), (width, depth, heads), strict=True))
        config = VTPConfig(
            **{
                f"{part}_{key}": value
                for part in ("vision", "decoder")
                for key, value in sizes.items()
            }
        )
        with torch.device("meta"):
            model = VTPModel(config)
        assert sum(p.numel() for p in model.parameters()) == total
        if width == 384:
            assert len(model.state_dict()) == 477
            assert sum(p.numel() for p in model.trunk.parameters()) == 21_611_520
            assert sum(p.numel() for p in model.pixel_decoder.parameters()) == 21_621_120


def test_golden_config_keys_are_our_keys():
    from vtp.models import VTPConfig

    for name in SETS:
        assert (
            VTPConfig().to_dict().keys()
            == json.loads((GOLDEN / name / "config.json").read_text()).keys()
        )
