"""Moving shapes: the pictures are what the facts say, the oracle reads them back, and no sample
depends on another."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from mmdit.data.moving_shapes import (
    Facts,
    Object,
    accuracy,
    caption,
    draw,
    named_attributes,
    oracle,
    prompts,
    render,
    score_samples,
    wilson,
)
from mmdit.data.moving_shapes.facts import BACKGROUNDS, COLORS, HELD_OUT, MOTIONS, SHAPES, SIZES
from mmdit.data.moving_shapes.sentences import IMAGE, SHAPE_WORDS, SIZE_WORDS, VIDEO
from mmdit.pixels import to_uint8, to_unit
from tests.helpers.thorough import thorough


def some(count, seed=0, **options):
    return draw(seed, range(count), **({"video": False, "width": 64, "height": 64} | options))


def prompt_accuracy(pixels, facts, variant="one"):
    return accuracy(oracle(pixels, variant), facts)["prompt_accuracy"]["value"]


# ── facts ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("variant", ["one", "many"])
def test_a_sample_depends_on_version_seed_and_index_alone(variant):
    every = some(12, video=True, variant=variant)
    again = draw(0, [7, 3, 11], video=True, width=64, height=64, variant=variant)
    assert again == [every[7], every[3], every[11]]
    assert draw(0, [5], video=True, width=64, height=64, variant=variant) == [every[5]]
    assert some(12, seed=1, video=True, variant=variant) != every
    assert all(Facts.from_json(json.loads(json.dumps(item.to_json()))) == item for item in every)


def test_version_1_is_what_it_was():
    """Sample 0 of seed 0, and the first prompts: a change here is a new version."""
    (item,) = draw(0, [0], video=False, width=64, height=64)
    expected = Object("cyan", "triangle", "large", None, 0.32495, 0.70758, 0.25343, (52, 194, 213))
    assert item == Facts("navy", (expected,))
    assert prompts("seen", False)[0].caption == "a brown backdrop with a large purple triangle"
    assert prompts("held_out", True)[0].caption == "drifting left: a big blue triangle on grey"


def test_six_pairs_are_held_out_of_training_and_every_word_is_still_seen():
    assert len(HELD_OUT) == 6 == len({c for c, _ in HELD_OUT}) == len({s for _, s in HELD_OUT})
    pairs = {(o.color, o.shape) for item in some(4000) for o in item.objects}
    assert not pairs & set(HELD_OUT)
    assert {c for c, _ in pairs} == set(COLORS) and {s for _, s in pairs} == set(SHAPES)
    assert len(Counter((o.color, o.shape) for item in some(4000) for o in item.objects)) == 42
    assert {
        (o.color, o.shape) for item in some(200, split="held_out") for o in item.objects
    } == set(HELD_OUT)


@pytest.mark.parametrize("width, height, frames", [(64, 64, 5), (112, 64, 5), (64, 96, 1)])
def test_objects_stay_inside_the_canvas_and_have_the_named_size(width, height, frames):
    facts = some(300, video=frames > 1, width=width, height=height)
    pixels = render(facts, width, height, frames).int()
    ground = torch.tensor([BACKGROUNDS[item.background] for item in facts])[:, None, :, None]
    for edge in (pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]):
        assert (
            edge - ground
        ).abs().max() < 110  # at most the soft rim of an object reaches the outermost pixels
        assert (edge == ground).all(2).float().mean() > 0.9
    for item in facts:
        low, high = SIZES[item.objects[0].size]
        assert low - 1e-5 <= item.objects[0].radius <= high + 1e-5


def test_bad_settings_are_refused_with_the_remedy():
    for options, words in (
        ({"width": 60}, "width is 60.*multiple of 16.*64"),
        ({"split": "test"}, "split is 'test'.*train, held_out"),
        ({"variant": "few"}, "variant is 'few'"),
    ):
        with pytest.raises(ValueError, match=words):
            some(1, **options)
    with pytest.raises(ValueError, match="version 0"):
        Facts.from_json(some(1)[0].to_json() | {"version": 0})
    with pytest.raises(ValueError, match="frames is 0"):
        render(some(1), 64, 64, 0)
    with pytest.raises(ValueError, match="seen"):
        prompts("unseen", False)


# ── pictures ──────────────────────────────────────────────────────────────────────────────────────
def test_areas_are_those_of_the_shapes():
    """Anti-aliased coverage sums to the area that geometry gives."""
    r, star = 0.30, 5 * 0.42 * math.sin(math.radians(36))
    areas = {
        "circle": math.pi,
        "square": 4 * 0.86**2,
        "triangle": 0.75 * math.sqrt(3),
        "star": star,
    }
    areas |= {"ring": math.pi * (1 - 0.44**2), "cross": 4 * 0.66 - 4 * 0.33**2}
    for shape, area in areas.items():
        item = Facts(
            "black", (Object("white", shape, "large", None, 0.513, 0.49, r, (245, 245, 245)),)
        )
        coverage = (render([item], 256, 256)[0, 0, 0].double() - 12) / (245 - 12)
        assert coverage.sum() == pytest.approx(area * (r * 256) ** 2, rel=0.005), shape


def test_distances_are_in_pixels_and_the_star_points_up():
    from mmdit.data.moving_shapes.render import DISTANCE

    radius, zero = torch.tensor(10.0), torch.tensor(0.0)
    pointed = ("circle", "ring", "triangle", "star", "cross")
    tips = {shape: DISTANCE[shape](zero, torch.tensor(-10.0), radius).item() for shape in pointed}
    assert all(abs(value) < 1e-4 for value in tips.values()), tips
    angles = torch.deg2rad(torch.arange(5) * 72.0)
    assert DISTANCE["star"](10 * angles.sin(), -10 * angles.cos(), radius).abs().max() < 1e-4
    angles += math.radians(36)
    assert DISTANCE["star"](4.2 * angles.sin(), -4.2 * angles.cos(), radius).abs().max() < 1e-4
    assert DISTANCE["ring"](zero, zero, radius) == pytest.approx(4.4)


def test_rendering_in_company_alone_or_by_chunks_is_the_same(monkeypatch):
    facts = some(20, variant="many") + some(20)
    whole = render(facts, 64, 64, 3)
    assert torch.equal(whole[[33]], render([facts[33]], 64, 64, 3))
    monkeypatch.setattr(
        import_module("mmdit.data.moving_shapes.render"), "CHUNK_PIXELS", {"cpu": 64 * 64 * 6}
    )
    assert torch.equal(whole, render(facts, 64, 64, 3))
    assert torch.equal(to_uint8(to_unit(whole)), whole)


def test_motion_runs_at_constant_speed_over_its_path():
    start = Object("red", "circle", "small", "left", 0.7, 0.5, 0.17, COLORS["red"])
    for motion, (dx, dy) in MOTIONS.items():
        item = Facts(
            "black", (replace(start, motion=motion, x=0.5 - 0.19 * dx, y=0.5 - 0.19 * dy),)
        )
        weight = render([item], 64, 64, 5)[0, :, 0].double() - 12
        x = (weight.sum(1) * (torch.arange(64) + 0.5)).sum(-1) / weight.sum((1, 2)) / 64
        y = (weight.sum(2) * (torch.arange(64) + 0.5)).sum(-1) / weight.sum((1, 2)) / 64
        time = torch.linspace(-0.19, 0.19, 5).double()
        assert torch.allclose(x, 0.5 + dx * time, atol=2e-3) and torch.allclose(
            y, 0.5 + dy * time, atol=2e-3
        )
        last = render([item], 64, 64, 5)[:, -1:]
        assert torch.equal(last, render([item], 64, 64, fraction=1.0))


# ── captions ──────────────────────────────────────────────────────────────────────────────────────
def words_for(item, name):
    target = item.objects[0]
    if name in ("color", "background"):
        return {
            "color": (target.color,),
            "background": {"gray": ("gray", "grey")}.get(item.background, (item.background,)),
        }[name]
    if name == "motion":
        return ("still", "rest", "not mov") if target.motion == "still" else (target.motion,)
    return {"shape": SHAPE_WORDS[target.shape], "size": SIZE_WORDS[target.size]}[name]


@pytest.mark.parametrize("video", [False, True])
def test_a_caption_says_what_it_names_and_nothing_else(video):
    for i, item in enumerate(some(400, video=video)):
        for complete in (True, False):
            text, named = caption(item, 3, i, complete), named_attributes(item, 3, i, complete)
            assert text and "{" not in text and text == text.strip(" ,:") and "  " not in text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
            assert not complete or named == frozenset(item.attributes)
            for name in item.attributes:
                said = any(
                    re.search(rf"\b{word}", text.replace("does not move", "not mov"))
                    for word in words_for(item, name)
                )
                assert said or name not in named, (text, name)
                if name not in named and name in ("color", "size", "shape"):
                    assert not said, (text, name)


def test_training_captions_drop_each_fact_with_probability_015():
    facts = some(4000, video=True)
    dropped = Counter(
        name
        for i, item in enumerate(facts)
        for name in item.attributes
        if name not in named_attributes(item, 0, i, False)
    )
    assert all(0.13 < count / 4000 < 0.17 for count in dropped.values()) and len(dropped) == 5


def test_there_are_at_least_six_templates_and_captions_vary():
    assert min(len(IMAGE), len(VIDEO)) >= 6
    item = some(1, video=True)[0]
    assert len({caption(item, 0, i, True) for i in range(200)}) > 60


def test_prompts_are_256_and_the_same_at_every_size():
    for split, video in (("seen", False), ("seen", True), ("held_out", False)):
        listed = prompts(split, video)
        assert len(listed) == 256 and [p.caption for p in listed] == [
            p.caption for p in prompts(split, video, 448, 256)
        ]
        pairs = {(p.facts.objects[0].color, p.facts.objects[0].shape) for p in listed}
        assert pairs <= set(HELD_OUT) if split == "held_out" else not pairs & set(HELD_OUT)


# ── oracle ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "width, height, frames, count",
    [
        (64, 64, 1, 600),
        *thorough((128, 128, 1, 200), (256, 256, 1, 48), (448, 256, 1, 32)),
        (64, 64, 16, 48),
        *thorough((128, 128, 16, 10)),
        (448, 256, 16, 2),
    ],
)
def test_the_oracle_reads_its_own_pictures(width, height, frames, count):
    facts = some(count, seed=9, video=frames > 1, width=width, height=height)
    assert prompt_accuracy(render(facts, width, height, frames), facts) >= 0.995


def blurred(pixels, sigma):
    offsets = torch.arange(-4, 5)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2)[None, None]
    flat = F.pad(pixels.flatten(0, 2)[:, None], (4, 4, 4, 4), mode="replicate")
    return F.conv2d(flat, kernel).reshape(pixels.shape)


def test_mild_blur_and_noise_do_not_disturb_the_oracle():
    facts = some(300, seed=4)
    pixels = to_unit(render(facts, 64, 64))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert prompt_accuracy(blurred(pixels, 1.0), facts) >= 0.99
    assert prompt_accuracy((pixels + 0.04 * noise).clamp(0, 1), facts) >= 0.99
    assert (
        prompt_accuracy(blurred(pixels, 3.0), facts) < 0.8
    )  # and it is not blind: this much destroys the shapes


def test_what_is_no_object_is_wrong():
    facts = some(4)
    ground = (
        torch.tensor([BACKGROUNDS[item.background] for item in facts])[:, None, :, None, None] / 255
    )
    empty = ground.expand(4, 1, 3, 64, 64)
    full = empty.clone()
    full[..., 1:-1, 1:-1] = 1 - ground
    noise = torch.rand(4, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for pixels in (empty, full, noise, torch.full((4, 1, 3, 64, 64), math.nan)):
        for variant in ("one", "many"):
            assert prompt_accuracy(pixels, facts, variant) == 0
    assert score_samples(oracle(empty), facts)["background"].all()
    frame = empty.clone()  # none of the shapes
    frame[..., 20:44, 20:44] = 1 - ground
    frame[..., 22:42, 22:42] = ground
    assert (oracle(frame).shape == -1).all() and not score_samples(oracle(frame), facts)[
        "shape"
    ].any()
    bar = empty.clone()
    bar[..., 30:34, 4:60] = 1 - ground
    assert not score_samples(oracle(bar), facts)["size"][
        [o.objects[0].size == "small" for o in facts]
    ].any()


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("color", "white"),
        ("shape", "ring"),
        ("size", "large"),
        ("motion", "left"),
        ("background", "brown"),
    ],
)
def test_each_attribute_is_judged_by_itself(name, wrong):
    """One attribute is drawn otherwise than asked: it alone is wrong, and the prompt with it,
    unless the caption dropped it."""
    asked = Facts(
        "black", (Object("red", "circle", "small", "right", 0.3, 0.5, 0.17, COLORS["red"]),)
    )
    target = asked.objects[0]
    shown = {
        "color": replace(target, rgb=COLORS["white"]),
        "shape": replace(target, shape="ring"),
        "size": replace(target, radius=0.27),
        "motion": replace(target, x=0.7, motion="left"),
    }
    drawn = (
        Facts("brown", asked.objects) if name == "background" else Facts("black", (shown[name],))
    )
    predictions = oracle(render([drawn], 64, 64, 4))
    right = score_samples(predictions, [asked])
    assert {key for key, value in right.items() if not value.all()} == {name, "all"}


def test_a_clip_that_loses_its_object_is_wrong_and_short_drift_is_still():
    facts = [
        Facts("black", (Object("red", "square", "small", "right", 0.3, 0.5, 0.17, COLORS["red"]),))
    ]
    clip = render(facts, 64, 64, 8)
    assert prompt_accuracy(clip, facts) == 1
    clip[:, 3] = clip[:, 3, :, :1, :1]
    assert prompt_accuracy(clip, facts) == 0
    still = [Facts("black", (replace(facts[0].objects[0], motion="still"),))]
    steps = torch.stack([render(still, 64, 64)[0, 0].roll(f // 2, -1) for f in range(8)])[
        None
    ]  # 3 px of 64 over the clip
    assert prompt_accuracy(steps, still) == 1


def test_batching_does_not_change_what_is_seen(monkeypatch):
    facts = some(20, variant="many")
    pixels = render(facts, 64, 64)
    for variant in ("one", "many"):
        whole = oracle(pixels, variant)
        with monkeypatch.context() as patch:
            patch.setattr(
                import_module("mmdit.data.moving_shapes.oracle"),
                "CHUNK_PIXELS",
                {"cpu": 64 * 64 * 3},
            )
            apart = oracle(to_unit(pixels), variant)
        assert all(
            torch.equal(a, b)
            for a, b in zip(vars(whole).values(), vars(apart).values(), strict=True)
            if a is not None
        )


def test_wilson_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # the textbook case
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(0, 0) == (0, 1)
