"""Scenes of several objects: what is held out of each task, captions, and the oracle that judges
count, colours, shapes, places and which belongs to which."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

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
)
from mmdit.data.moving_shapes.facts import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    HELD_OUT_OF_TASKS,
    SHAPES,
    TASKS,
    relation_of,
)
from mmdit.data.moving_shapes.prepare import Recipe, prepare_samples
from mmdit.data.moving_shapes.sentences import NUMBERS, OPPOSITE, RELATION_WORDS, SHAPE_WORDS
from tests.helpers.thorough import thorough, thorough_unless


def many(count, seed=0, **options):
    given = {"video": False, "width": 64, "height": 64, "variant": "many"}
    return draw(seed, range(count), **(given | options))


def right_of(pixels, facts):
    return {name: value.tolist() for name, value in judge(pixels, facts).items()}


def judge(pixels, facts):
    return score_samples(oracle(pixels, "many"), facts)


def shape(name, x, y, color="red", motion=None, radius=0.14):
    return Object(color, name, "small", motion, x, y, radius, COLORS[color])


# ── one object is what it was ─────────────────────────────────────────────────────────────────────
def digest(*parts):
    return hashlib.sha256("".join(map(repr, parts)).encode()).hexdigest()[:16]


def test_one_object_is_drawn_named_and_judged_as_before_there_were_tasks():
    """The digests were made by the version without tasks."""
    facts = [
        item
        for split in ("train", "held_out")
        for video in (False, True)
        for item in draw(5, range(40), video=video, width=112, height=64, split=split)
    ]
    texts = [caption(item, 5, i, i % 2 == 0) for i, item in enumerate(facts)]
    records = [json.dumps(item.to_json()) for item in facts]
    listed = [prompt.caption for prompt in prompts("held_out", True)]
    assert digest(texts, records, listed) == "9ace06a8517a310f"
    settings = dict(Recipe(64, 64).__dict__)
    assert settings.pop("complete_captions") is False  # a later setting, which is off
    assert digest(json.dumps(settings)) == "6a5c6e90029ffdcb"
    clips = [prompt.facts for prompt in prompts("seen", True)[:16]]
    predictions = oracle(render(clips, 64, 64, 5))
    scores = [accuracy(predictions, clips), accuracy(predictions, clips[1:] + clips[:1])]
    assert digest(json.dumps(scores)) == "fa7a3d52c824d65d"


# ── facts ─────────────────────────────────────────────────────────────────────────────────────────
def test_version_2_is_what_it_was_and_says_what_is_stated():
    (item,) = many(1, task="position")
    assert (item.background, item.relations) == ("navy", ("right", "below"))
    record = item.to_json()
    assert record["version"] == 2 and record["task"] == "position"
    assert Facts.from_json(json.loads(json.dumps(record))) == item
    assert Recipe(64, 64, variant="many").version == 2 and Recipe(64, 64).version == 1


@pytest.mark.parametrize("video", [*thorough(False), True])
def test_no_sample_depends_on_its_company(video):
    every = many(30, video=video)
    assert {len(item.objects) for item in every} == {1, 2, 3, 4}
    for i in (3, 17, 29):
        assert draw(0, [i], video=video, width=64, height=64, variant="many") == [every[i]]


def test_every_task_has_its_number_of_objects_and_all_are_as_likely():
    facts = many(600)
    tasks = Counter(item.task for item in facts)
    assert tasks.keys() == TASKS.keys() and all(70 < count < 130 for count in tasks.values())
    counts = {task: {len(f.objects) for f in facts if f.task == task} for task in TASKS}
    assert counts["counting"] == {2, 3, 4} and counts["single"] == counts["colors"] == {1}
    assert counts["two"] == counts["position"] == counts["attribution"] == {2, 3}
    for item in facts:
        alike = 1 if item.task == "counting" else len(item.objects)
        assert len({o.shape for o in item.objects}) == alike == len({o.color for o in item.objects})


def independent_combinations(item):
    """Return what a scene shows of each task, written down a second time."""
    shapes = [SHAPES.index(o.shape) for o in item.objects]
    shown = {task: False for task in TASKS}
    for o, number in zip(item.objects, shapes, strict=True):
        shown["single"] |= list(BACKGROUNDS).index(item.background) == number % 4
        shown["colors"] |= (o.color, o.shape) in HELD_OUT
    shown["attribution"] = shown["colors"]
    shown["counting"] = item.task == "counting" and len(shapes) == shapes[0] % 3 + 2
    for a, b in combinations(range(len(shapes)), 2):
        shown["two"] |= (shapes[a] - shapes[b]) % 6 == 3
        for time in (0, 0.5, 1):
            x, y = item.objects[a].offset(item.objects[b], time)
            first, second = (a, b) if min(x, y, key=lambda way: -abs(way)) < 0 else (b, a)
            step = 1 if abs(x) > abs(y) else 2
            shown["position"] |= (shapes[second] - shapes[first]) % 6 == step
    return {task for task, there in shown.items() if there}


@pytest.mark.parametrize("video", [False, *thorough(True)])
def test_training_shows_no_held_out_combination_and_each_task_is_tested_on_its_own(video):
    for item in many(80, video=video):
        assert not item.held_out and not independent_combinations(item)
    alike = {"colors", "attribution"}
    for task in TASKS:
        for item in many(8, video=video, split="held_out", task=task):
            expected = alike if task in alike else {task}
            assert item.held_out == expected == independent_combinations(item)
            if task == "position":
                assert item.said & HELD_OUT_OF_TASKS["position"]
    assert {task: len(held) for task, held in HELD_OUT_OF_TASKS.items()} == {
        **{"single": 6, "two": 3, "counting": 6, "colors": 6, "position": 12, "attribution": 6}
    }


def test_training_shows_every_word_with_every_task():
    for task in TASKS:
        facts = many(300, task=task)
        assert {o.shape for item in facts for o in item.objects} == set(SHAPES)
        assert {o.color for item in facts for o in item.objects} == set(COLORS)
        assert {item.background for item in facts} == set(BACKGROUNDS)
    relations = {r for item in many(200, task="position") for r in item.relations}
    assert relations == set(RELATION_WORDS)


@pytest.mark.parametrize("width, video", [(64, True), *thorough((112, False))])
def test_objects_never_touch_and_stay_where_the_relation_says(width, video):
    facts = many(36, video=video, width=width)
    for item in facts:
        alone = [Facts(item.background, (o,)) for o in item.objects]
        views = render(alone, 2 * width, 128, 5 if video else 1)
        ground = torch.tensor(BACKGROUNDS[item.background])[:, None, None]
        masks = F.max_pool2d((views != ground).any(2).float(), 3, 1, 1)
        assert masks.sum(0).max() == 1  # not even when each grows by a pixel
        for a, b, relation in zip(item.objects, item.objects[1:], item.relations, strict=False):
            for time in (0, 0.3, 0.7, 1):
                x, y = a.offset(b, time)
                assert relation_of(x, y) == relation
                assert min(abs(x), abs(y)) < 0.58 * max(abs(x), abs(y))


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task is 'three'.*single, two, counting"):
        many(1, task="three")


# ── captions ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("video", [*thorough(False), True])
@pytest.mark.parametrize("task", thorough_unless(lambda task: task in ("two", "position"), TASKS))
def test_a_caption_says_its_task_and_nothing_that_it_does_not_name(task, video):
    for i, item in enumerate(many(40, video=video, task=task)):
        for complete in (True, False):
            text, named = caption(item, 3, i, complete), named_attributes(item, 3, i, complete)
            assert text and not re.search(r"[{}]|  |^[ ,:]|[ ,:]$", text), text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
            assert set(TASKS[task]) <= named and (not complete or named == set(item.attributes))
            for o in item.objects:
                assert any(word in text for word in SHAPE_WORDS[o.shape]), text
                assert (re.search(rf"\b{o.color}\b", text) is not None) == ("color" in named)
            said = re.search(rf"\b({'|'.join(['grey', *BACKGROUNDS])})\b", text)
            assert (said is not None) == ("background" in named)
            moves = re.search(r"moving|drifting|sliding|going|\bstill|at rest", text)
            assert (moves is not None) == ("motion" in named)
            if task == "counting":
                assert any(f"{n} " in text for n in NUMBERS[len(item.objects)])


def test_a_relation_is_stated_from_either_end_and_never_wrongly():
    words = {w: name for name, options in RELATION_WORDS.items() for w in options}
    pattern = "|".join(sorted(words, key=len, reverse=True))
    turned = 0
    for i, item in enumerate(many(150, task="position")):
        text = caption(item, 0, i, True)
        shapes = [o.shape for o in item.objects]
        nouns = {w: s for s in shapes for w in SHAPE_WORDS[s]}
        listed = [nouns[w] for w in re.findall("|".join(nouns), text)]
        relations = [words[w] for w in re.findall(rf"\b(?:{pattern})\b", text)]
        if listed != shapes:
            turned += 1
            listed, relations = listed[::-1], [OPPOSITE[r] for r in reversed(relations)]
        assert (listed, tuple(relations)) == (shapes, item.relations), text
    assert 50 < turned < 100


def test_prompts_of_a_task_are_the_same_at_every_size_of_an_aspect_ratio():
    for task in ("counting", "position"):
        listed = [p.caption for p in prompts("held_out", False, 64, 64, task)]
        assert len(listed) == 128 and len(set(listed)) > 60
        assert listed == [p.caption for p in prompts("held_out", False, 128, 128, task)]
        assert all(task in p.facts.held_out for p in prompts("held_out", False, 64, 64, task))
        assert not any(p.facts.held_out for p in prompts("seen", False, 64, 64, task))


def test_prepared_samples_hold_task_and_relations(tmp_path):
    path = prepare_samples(tmp_path / "shapes", Recipe(64, 64, variant="many"), 12)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [Facts.from_json(r["facts"]) for r in records] == many(12)
    for record in records:
        facts = record["facts"]
        assert ("position" in facts["named"]) == (facts["task"] == "position")
        stated = len(facts["objects"]) - 1 if facts["task"] == "position" else 0
        assert len(facts["relations"]) == stated
    stored = json.loads((path.parent / "moving_shapes.json").read_text())
    (path.parent / "moving_shapes.json").write_text(json.dumps(stored | {"version": 1}))
    with pytest.raises(ValueError, match="version 1 there and 2 now"):
        prepare_samples(tmp_path / "shapes", Recipe(64, 64, variant="many"), 14)


# ── oracle ────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "width, height, frames, count",
    [*thorough((64, 64, 1, 150), (128, 128, 1, 40)), (112, 64, 8, 16)],
)
def test_the_oracle_reads_its_own_pictures(width, height, frames, count):
    facts = many(count, seed=9, video=frames > 1, width=width, height=height)
    right = judge(render(facts, width, height, frames), facts)
    assert right["all"].all()


def test_what_is_not_stated_does_not_count_and_what_is_stated_does():
    scene = Facts("black", (shape("circle", 0.2, 0.5), shape("star", 0.7, 0.5, "blue")), "two")
    other = Facts("black", (shape("circle", 0.7, 0.5, "green"), shape("star", 0.2, 0.5)), "two")
    pixels = render([scene], 64, 64)
    assert judge(pixels, [other])["all"].all()
    for task in ("attribution", "position"):
        right = right_of(pixels, [replace(other, task=task)])
        wrong = {name for name, value in right.items() if not value[0]}
        assert wrong & {*TASKS[task], "all"} == {*TASKS[task][2:], "all"}


def test_colours_at_the_wrong_shapes_are_wrong_together_but_each_is_there():
    scene = Facts("gray", (shape("ring", 0.2, 0.5), shape("star", 0.7, 0.5, "blue")), "attribution")
    ring, star = scene.objects
    swapped = (replace(ring, color="blue"), replace(star, color="red"))
    right = right_of(render([scene], 64, 64), [replace(scene, objects=swapped)])
    assert right["shape"] == right["count"] == [True]
    assert right["color"] == right["all"] == [False]


def test_equal_objects_are_counted_and_followed_through_a_clip():
    """They pass by each other, so that the largest or the leftmost is another one in each frame."""
    rows = [("right", 0.2, 0.2), ("left", 0.8, 0.5), ("still", 0.5, 0.8)]
    objects = tuple(shape("cross", x, y, "white", m, 0.12) for m, x, y in rows)
    scene = Facts("navy", objects, None)
    clip = render([scene], 128, 128, 12)
    seen = oracle(clip, "many")
    assert seen.present.sum() == 3 and not seen.stray.any()
    assert sorted(seen.motion[0, seen.present[0]].tolist()) == [0, 1, 2]  # still, left, right
    counted = replace(scene, task="counting")
    assert judge(clip, [counted])["all"].all()
    fewer, more = objects[:2], (*objects, objects[0])
    for asked in (fewer, more):
        right = right_of(clip, [replace(counted, objects=asked)])
        assert right["count"] == right["all"] == [False]
    clip[:, 5] = render([replace(scene, objects=objects[:2])], 128, 128, 12)[:, 5]
    assert right_of(clip, [counted])["count"] == [False]  # one is lost for a frame


def test_a_relation_must_hold_in_every_frame():
    objects = (shape("ring", 0.25, 0.3), shape("star", 0.6, 0.75, "cyan"))
    scene = Facts("brown", tuple(replace(o, motion="still") for o in objects), "position")
    clip = render([scene], 64, 64, 8)
    assert scene.relations == ("above",) and judge(clip, [scene])["all"].all()
    clip[:, 7] = clip[:, 7].flip(-2)  # upside down: now the star is above
    right = right_of(clip, [scene])
    assert right["position"] == right["all"] == [False]


def test_old_scenes_without_a_task_state_everything():
    scene = Facts("black", (shape("circle", 0.2, 0.5), shape("star", 0.7, 0.5, "blue")))
    record = scene.to_json()
    assert record["version"] == 1 and Facts.from_json(record) == scene
    pixels = render([scene], 64, 64)
    assert judge(pixels, [scene])["all"].all()
    larger = replace(scene.objects[0], size="large")
    right = right_of(pixels, [replace(scene, objects=(larger, scene.objects[1]))])
    assert right["size"] == right["all"] == [False] and right["shape"] == [True]
