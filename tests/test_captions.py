"""Captions at batch time: pure functions of (seed, step, index), and each option does what it says
and no more."""

from collections import Counter

import pytest
import torch

from mmdit.config import ConfigError, decode
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.data.dataset.captions import (
    CaptionsConfig,
    drawn_captions,
    fixed_captions,
    length_report,
    trim,
    with_trigger,
)
from mmdit.interfaces import LatentSpec
from mmdit.rng import Draws

TAGS = "one, two, three, four, five, six"


def drawn(config, several, step=0, seed=0, indices=None):
    indices = torch.arange(len(several)) if indices is None else torch.tensor(indices)
    return drawn_captions(several, config, Draws(seed, step, indices))


def test_written_captions_come_out_unchanged_by_default():
    captions = ["a cat ,  sits.", "", "[trigger] x"]
    assert drawn(CaptionsConfig(), [[c] for c in captions]) == captions


def test_every_part_of_a_batch_draws_as_the_whole_and_steps_and_seeds_differ():
    config = CaptionsConfig(
        shuffle=True, token_dropout=0.4, trim_keywords=("three",), trim_prob=0.5
    )
    several = [[TAGS, "a, b, c" * (i % 3 + 1)] for i in range(16)]
    whole = drawn(config, several, step=5)
    assert drawn(config, several, step=5) == whole
    for part in ([3, 8, 2], [15], list(range(1, 16, 2))):
        assert drawn(config, [several[i] for i in part], step=5, indices=part) == [
            whole[i] for i in part
        ]
    assert (
        drawn(config, several, step=6) != whole and drawn(config, several, step=5, seed=1) != whole
    )


def test_one_of_several_captions_is_drawn_evenly():
    counts = Counter(
        c for step in range(40) for c in drawn(CaptionsConfig(), [["x", "y", "z"]] * 50, step)
    )
    assert set(counts) == {"x", "y", "z"} and all(
        abs(count / 2000 - 1 / 3) < 0.04 for count in counts.values()
    )


def test_dropout_shuffle_and_the_first_tokens():
    rows = [
        c.split(", ")
        for c in drawn(CaptionsConfig(token_dropout=0.3, keep_first=2), [[TAGS]] * 2000)
    ]
    assert all(row[:2] == ["one", "two"] and row == sorted(row, key=TAGS.index) for row in rows)
    for token in TAGS.split(", ")[2:]:
        assert abs(sum(token in row for row in rows) / 2000 - 0.7) < 0.04
    rows = [
        c.split(", ") for c in drawn(CaptionsConfig(shuffle=True, keep_first=1), [[TAGS]] * 2000)
    ]
    assert all(sorted(row) == sorted(TAGS.split(", ")) and row[0] == "one" for row in rows)
    for place in range(1, 6):  # every token is at every place equally often
        counts = Counter(row[place] for row in rows)
        assert len(counts) == 5 and all(abs(count / 2000 - 0.2) < 0.04 for count in counts.values())
    assert all(
        drawn(CaptionsConfig(token_dropout=0.95), [["a, b"]] * 200)
    )  # never empty: that would be unconditional
    prose = "A dog runs. It is  brown."
    assert drawn(CaptionsConfig(shuffle=True, token_dropout=0.5), [[prose]] * 20) == [prose] * 20


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a photo of [trigger] in snow", "a photo of ohwx in snow"),
        ("[name] and [name]", "ohwx and ohwx"),
        ("a dog", "ohwx, a dog"),
        ("An OHWX dog", "An OHWX dog"),
        ("ohwxes, nohwx", "ohwx, ohwxes, nohwx"),
        ("", "ohwx"),
    ],
)
def test_the_trigger_is_in_every_caption_once_it_is_wanted(caption, expected):
    config = CaptionsConfig(trigger="ohwx")
    assert with_trigger(caption, config) == expected == drawn(config, [[caption]])[0]
    assert with_trigger(with_trigger(caption, config), config) == expected
    assert with_trigger(caption, CaptionsConfig()) == caption


def test_accents_are_the_same_however_they_are_composed():
    """A caption typed on a Mac has an `e` and an accent where the config has one letter."""
    config = CaptionsConfig(trigger="caf\u00e9", trim_keywords=("voil\u00e0",))
    assert with_trigger("a cafe\u0301 at night", config) == "a cafe\u0301 at night"
    assert trim("night, voila\u0300, rain", config) == "night, rain"
    assert with_trigger("a cafe at night", config) == "caf\u00e9, a cafe at night"


def test_the_trigger_outlives_dropout_and_shuffle():
    config = CaptionsConfig(trigger="ohwx", token_dropout=0.6, shuffle=True)
    rows = drawn(config, [["a, [trigger] cat, b, c"]] * 200)
    assert all(row.split(", ").count("ohwx") + row.count("ohwx cat") == 1 for row in rows)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("red car, watermark, night", "red car, night"),
        ("A red car. There is a Watermark in the corner. Night.", "A red car. Night."),
        ("watermarked paper", "watermarked paper"),
        ("a car at 3.5 m.p.h. beside a jpeg artifacts sign, fast", "fast"),
        ("watermark", "watermark"),
        ("A car, jpeg artifacts!", "A car!"),
    ],
)
def test_trimming_removes_what_holds_a_keyword_and_nothing_else(caption, expected):
    config = CaptionsConfig(trim_keywords=("watermark", "jpeg artifacts"))
    assert trim(caption, config) == expected == drawn(config, [[caption]])[0]
    half = drawn(
        CaptionsConfig(trim_keywords=("watermark",), trim_prob=0.25), [["a, watermark"]] * 2000
    )
    assert abs(half.count("a") / 2000 - 0.25) < 0.04


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_a_caption_may_become_is_known_where_nothing_is_left_out_or_shuffled(share):
    """Embeddings of these are made ahead."""
    config = CaptionsConfig(trigger="zork", trim_keywords=("watermark",), trim_prob=share)
    for caption in ("a, watermark", "a [trigger]", "watermark", ""):
        assert set(fixed_captions(caption, config)) == set(drawn(config, [[caption]] * 64))
    assert fixed_captions("a, b", CaptionsConfig()) == ["a, b"]


@pytest.mark.parametrize(
    "values, told",
    [
        ({"separator": ""}, "separator"),
        ({"token_dropout": 1.0}, "cfg_dropout_prob"),
        ({"keep_first": 2}, "neither shuffled"),
        ({"keep_first": -1, "shuffle": True}, "at least 0"),
        ({"trim_keywords": [" "]}, r"trim_keywords\[0\]"),
        ({"trim_prob": 2}, "from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        decode(CaptionsConfig, values)


def test_lengths_are_counted_in_words():
    report = length_report([["", "a b"], ["one two three four five"], ["w " * 300]])
    assert (
        report["captions"] == 4
        and report["items"] == 3
        and report["items_with_several"] == 1
        and report["empty"] == 1
    )
    assert report["captions_by_words"] == {"0": 1, "1-4": 1, "5-8": 1, "over 256": 1}
    assert report["words"] == {"median": 5, "p95": 300, "longest": 300}
    assert length_report([])["captions"] == 0


def test_batches_draw_captions_per_step_and_the_same_on_every_rank(tmp_path):
    manifest = CacheManifest("none", "none", LatentSpec(channels=3), ((32, 32),), False)
    with CacheWriter(tmp_path, manifest) as writer:
        writer.add("several", torch.zeros(1, 2, 2, 3), "one", {"captions": ["one", "two"]})
        writer.add("single", torch.zeros(1, 2, 2, 3), "x, y, z")
    cache = open_cache(tmp_path)
    options = {"captions": CaptionsConfig(shuffle=True, trigger="T"), "num_workers": 0}
    plan = BatchPlan(cache, VideoConfig(32, 32), 4, seed=3)
    whole = LatentBatches(cache, plan, **options)
    ranks = [
        LatentBatches(cache, plan, rank=rank, world=2, accum=2, **options) for rank in range(2)
    ]
    seen = set()
    for step in range(30):
        captions = whole.step(step)[0].captions
        for rank in ranks:
            for batch in rank.step(step):
                assert batch.captions == [captions[i] for i in batch.indices.tolist()]
        seen |= set(captions)
    assert {"T, one", "T, two", "T, x, y, z", "T, z, x, y"} <= seen and all(
        caption.startswith("T, ") for caption in seen
    )
