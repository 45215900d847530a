"""Several sources: each has its share of the steps, exactly; the order is a function of (seed,
step) whoever asks, and latents of different kinds are not mixed."""

import hashlib
import json

import pytest
import torch

from mmdit.config import ConfigError, decode
from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.data_config import DataConfig, SourceConfig, check_together, shares_of
from mmdit.data.batches.latent_batches import LatentBatches, MixedBatches
from mmdit.data.batches.mixture import MixedPlan, Mixture
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.experiment.data_sources import with_given
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.interfaces import LatentSpec
from mmdit.scripts import train_t2v
from mmdit.training import checkpoint
from tests.helpers.tiny import Workshop, refused
from tests.test_batches import listing

VIDEO = VideoConfig(32, 32, num_frames=4, image_fraction=0.25)


def manifest(tokenizer="one", spec=None, size=(32, 32), plan=None):
    spec = spec or LatentSpec(channels=3)
    return CacheManifest(tokenizer, "none", spec, (size,), False, clip_plan=plan or {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Nine pictures of 48x32 and twelve clips of 32x32; channel 0 holds the item's number, channel
    1 the frame's."""
    root = tmp_path_factory.mktemp("sources")
    for name, count, frames, size in (("pictures", 9, 1, (48, 32)), ("clips", 12, 7, (32, 32))):
        with CacheWriter(root / name, manifest(size=size)) as writer:
            for number in range(count):
                latents = torch.zeros(frames, 2, size[0] // 16, 3)
                latents[..., 0] = number
                latents[..., 1] = torch.arange(frames)[:, None, None]
                writer.add(f"{name}{number:02}", latents, f"{name} {number}")
    return root


def mixed(folders, rank=0, world=1, accum=1, seed=7, size=8, prefix="", **options):
    """Return the batches of both folders, at 3 to 1."""
    parts = []
    for name in ("pictures", "clips"):
        cache = open_cache(folders / name)
        plan = BatchPlan(cache, VIDEO, size, seed, 0.2, name)
        given = {"rank": rank, "world": world, "accum": accum, "num_workers": 0, **options}
        parts.append(
            LatentBatches(cache, plan, prefix=prefix if name == "pictures" else "", **given)
        )
    return MixedBatches(parts, MixedPlan([part.plan for part in parts], [3, 1], 40))


@pytest.mark.parametrize("shares", [[1], [1, 1], [3, 1], [0.1, 0.6, 0.3], [1, 1000], [5, 3, 2, 7]])
def test_each_source_has_its_share_of_any_number_of_steps(shares):
    mixture, seen = Mixture(shares, seed=5), [0] * len(shares)
    for step in range(1500):
        assert mixture.counts(step) == seen
        for share, count in zip(mixture.shares, seen, strict=True):
            assert abs(count - step * share) < len(shares)
        source, position = mixture.at(step)
        assert position == seen[source], "the steps of a source are numbered without a gap"
        seen[source] += 1
    fresh = Mixture(shares, seed=5)
    assert [fresh.at(step) for step in (1400, 3)] == [mixture.at(step) for step in (1400, 3)]


def test_shares_are_exact_on_average_over_seeds():
    """Count single steps: the standard error of a share over 4,000 seeds is below 0.008."""
    for step in (0, 1, 7):
        counts = [0, 0, 0]
        for seed in range(4000):
            counts[Mixture([0.2, 0.5, 0.3], seed).at(step)[0]] += 1
        assert [count / 4000 for count in counts] == pytest.approx([0.2, 0.5, 0.3], abs=0.03)


def test_equal_shares_alternate():
    sources = [Mixture([1, 1], 3).at(step)[0] for step in range(10)]
    assert sources in ([0, 1] * 5, [1, 0] * 5)


def test_a_batch_is_of_one_source_and_pictures_stay_pictures(folders):
    """`num_frames` and `image_fraction` are for clips; a source of pictures gives pictures."""
    batches, seen = mixed(folders), {"pictures": [], "clips": []}
    for step in range(200):
        (batch,) = batches.step(step)
        (name,) = {id.rstrip("0123456789") for id in batch.ids}
        seen[name].append(batch.latents.shape[1])
        assert batch.latents.shape[3] == {"pictures": 3, "clips": 2}[name]
    assert len(seen["pictures"]) == pytest.approx(150, abs=1) and set(seen["pictures"]) == {1}
    assert seen["clips"].count(1) == pytest.approx(len(seen["clips"]) / 4, abs=1)
    assert set(seen["clips"]) == {1, 4}


def test_every_item_of_a_source_is_seen_equally_often(folders):
    counts = {}
    batches = mixed(folders)
    for step in range(400):
        for id in batches.step(step)[0].ids:
            counts[id] = counts.get(id, 0) + 1
    for name, held in (("pictures", 0), ("clips", 1)):
        part = batches.plan.plans[held]
        own = [count for id, count in counts.items() if id.startswith(name)]
        out = {part._ids[item] for item in part.held_out.tolist()}
        assert len(own) == part.items and not out & set(counts)
        assert max(own) - min(own) <= 3


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_together_are_the_global_batch(folders, world, accum):
    whole = mixed(folders)
    parts = [mixed(folders, rank, world, accum) for rank in range(world)]
    for step in range(24):
        (reference,) = whole.step(step)
        seen = []
        for part in parts:
            for batch in part.step(step):
                seen += batch.indices.tolist()
                assert torch.equal(batch.latents, reference.latents[batch.indices])
                assert batch.ids == [reference.ids[i] for i in batch.indices.tolist()]
        assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("where, workers", [(True, 1), (False, 0), (False, 1)])
def test_iterating_from_any_step_goes_on_as_if_never_stopped(folders, where, workers):
    batches = mixed(folders, in_memory=where, num_workers=workers)
    whole = [batches.step(step)[0] for step in range(12)]
    rest = [step[0] for step in batches.iterate(5, 12)]
    assert [batch.ids for batch in rest] == [batch.ids for batch in whole[5:]]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, whole[5:], strict=True))


def test_sources_of_one_size_have_orders_and_frames_of_their_own():
    video = VideoConfig(num_frames=4)
    plans = [BatchPlan(listing((16, 9, 2, 2)), video, 8, 1, name=name) for name in ("a", "b")]
    orders = [torch.cat([plan.batch(step).items for step in range(4)]).tolist() for plan in plans]
    assert orders[0] != orders[1]
    assert not torch.equal(plans[0].batch(0, 0).frames, plans[0].batch(0, 1).frames)


def test_one_source_is_in_the_order_of_before():
    """Compare with a digest that was taken before there could be several."""
    groups = ((40, 9, 2, 2), (9, 12, 1, 4), (5, 1, 2, 2))
    video = VideoConfig(num_frames=4, frame_stride=2, image_fraction=0.3)
    plan = BatchPlan(listing(*groups), video, 8, seed=3, held_out=0.1)
    digest = hashlib.sha256()
    for step in range(60):
        batch = plan.batch(step)
        row = (batch.grid, batch.items.tolist(), batch.frames.tolist())
        digest.update(repr(row).encode())
    assert digest.hexdigest()[:16] == "be7446580b6fa60c"


def test_shares_epochs_and_counts_are_told(folders):
    plan = mixed(folders, size=4).plan
    pictures, clips = plan.shares()
    assert pictures["share"] == 0.75 and pictures["steps"] + clips["steps"] == 40
    assert clips["counted"] == clips["steps"] / 40
    items = plan.plans[0].items
    assert pictures["epochs"] == pytest.approx(pictures["steps"] * 4 / items)
    assert pictures["epoch_steps"] == pytest.approx(items / 4 / 0.75)
    assert clips["epoch_steps"] == pytest.approx(plan.plans[1].items / 4 / 0.75 / 0.25)
    report = plan.report()
    assert "source pictures: 75.00% of the steps; it has 30 of 40 (75.00%)" in report
    assert f"for {items} pictures" in report and "left out" not in report
    assert {row["source"] for row in plan.table()} == {"pictures", "clips"}
    alone = BatchPlan(listing((12, 9, 2, 2)), VIDEO, 4, 0)
    assert alone.epoch_steps == 4 and "an epoch: 4 steps, for 12 clips" in alone.report()


def test_without_weights_items_are_seen_equally_often_and_repeats_multiply():
    plans = [BatchPlan(listing((count, 1, 2, 2)), VideoConfig(), 4, 0) for count in (30, 10)]
    sources = [SourceConfig("a"), SourceConfig("b", repeats=2)]
    assert shares_of(sources, plans) == [30, 20]
    weighted = [SourceConfig("a", weight=0.2), SourceConfig("b", weight=0.6)]
    assert shares_of(weighted, plans) == [0.2, 0.6]


def test_a_prefix_stands_in_front_of_the_captions_of_its_source(folders):
    batches = mixed(folders, prefix="drawn: ")
    captions = [text for step in range(12) for text in batches.step(step)[0].captions]
    assert {text.split()[0] for text in captions} == {"drawn:", "clips"}
    (held,) = batches.sources[0].held_out(1)
    assert held.captions[0].startswith("drawn: pictures")


@pytest.mark.parametrize(
    "rows, path, message",
    [
        (
            [{"path": "a/x"}, {"path": "b/x"}],
            "sources\\[1\\].name",
            "'x', as that of sources\\[0\\]",
        ),
        (
            [{"path": "a", "weight": 1}, {"path": "b"}],
            "sources\\[1\\].weight",
            "all a weight, or none",
        ),
        ([{"path": "a", "weight": 0}], "sources\\[0\\].weight", "must be above 0"),
        ([{"path": "a", "repeats": 0}], "sources\\[0\\].repeats", "at least 1"),
        ([{"path": "a", "weight": 1, "repeats": 2}], "sources\\[0\\].repeats", "remove one"),
        ([{"path": ""}], "sources\\[0\\].path", "is empty"),
    ],
)
def test_what_contradicts_itself_is_refused(rows, path, message):
    with pytest.raises(ConfigError, match=f"{path}.*{message}"):
        decode(DataConfig, {"sources": rows})


def stored(folder, frames=1, size=(32, 32), **options):
    with CacheWriter(folder, manifest(size=size, **options)) as writer:
        channels = writer.manifest.spec.channels
        writer.add("x", torch.zeros(frames, size[1] // 16, size[0] // 16, channels), "")
    return open_cache(folder)


def test_latents_of_different_kinds_are_refused_with_both_names(tmp_path):
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b", tokenizer="two")
    with pytest.raises(
        ValueError, match=r"(?s)sources \S*a and \S*b hold .*tokenizer: one and two"
    ):
        check_together([a, b], a.manifest, 1)
    wide = stored(tmp_path / "wide", spec=LatentSpec(channels=4))
    with pytest.raises(ValueError, match="latent channels: 3 and 4"):
        check_together([a, wide], a.manifest, 1)
    with pytest.raises(ValueError, match="wide is not what the config asks for"):
        check_together([wide], a.manifest, 1)
    scaled = stored(tmp_path / "scaled", spec=LatentSpec(channels=3, scale=2.0))
    (note,) = check_together([a, scaled], a.manifest, 1)
    assert "different latent statistics" in note and "scaled" in note
    small = stored(tmp_path / "small", size=(48, 32))
    assert check_together([a, small], a.manifest, 1) == []
    with pytest.raises(ValueError, match="items of 48x32 pixels.*no multiple of 32"):
        check_together([a, small], a.manifest, 2)


def test_clips_that_were_joined_otherwise_are_refused_but_pictures_go_with_all(tmp_path):
    spec = LatentSpec(channels=3, temporal=4)
    nine, five = ({"num_frames": frames} for frames in (9, 5))
    clips = stored(tmp_path / "clips", 3, spec=spec, plan=nine)
    others = stored(tmp_path / "others", 2, spec=spec, plan=five)
    pictures = stored(tmp_path / "pictures", 1, spec=spec, plan={"num_frames": 1})
    assert check_together([pictures, clips], clips.manifest, 1) == []
    with pytest.raises(ValueError, match="(?s)others is not what.*num_frames: 5 and 9"):
        check_together([clips, others], clips.manifest, 1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Pictures of 48x32, and clips of 32x32, as caches for runs."""
    shop = Workshop(tmp_path_factory.mktemp("mixture"))
    shop.sources = ["--train_cache_dir", str(shop.cache("pictures"))]
    words = ("--frames", "4", "video.num_frames=3", "video.width=32")
    shop.sources += ["--train_cache_dir", str(shop.cache("clips", *words, count=12))]
    shop.base = ["--config", str(shop.config), "--device", "cpu", "video.num_frames=3"]
    return shop


@pytest.mark.thorough
def test_a_run_on_two_sources_resumes_to_the_same_weights(shop, capsys):
    validation = ["train.val_every_steps=4", "train.val_share=0.3"]
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for number, end in enumerate(steps):
            words = [*shop.base, *shop.sources, *validation, f"experiment_name={name}"]
            words += [f"train.max_steps={end}"] + (["--resume"] if number else [])
            assert train_t2v.main(words) == 0
    log = capsys.readouterr().out
    assert "source pictures: " in log and "source clips: " in log and "epochs of" in log
    states = []
    for name in ("whole", "parts"):
        run = shop.folder / "runs" / name
        states.append(checkpoint.load_weights(run).tensors)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert last["val_loss/pictures"] > 0 and last["val_loss/clips"] > 0
        low, high = sorted((last["val_loss/pictures"], last["val_loss/clips"]))
        assert low < last["val_loss"] < high
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "other data" not in log
    few = shop.cache("few/pictures", count=7)
    words[words.index(str(shop.folder / "pictures"))] = str(few)
    assert train_t2v.main([*words, "train.max_steps=5"]) == 0
    log = capsys.readouterr().out
    assert log.count("other data") == 1 and f"now 7 items in {few}" in log


def test_where_sources_are_named_is_told(shop, capsys):
    refused(capsys, train_t2v.main, shop.base, "no data is named", "--train_cache_dir")
    inside = f"data.sources=[{{path: {shop.folder}/pictures}}]"
    refused(
        capsys,
        train_t2v.main,
        [*shop.base, *shop.sources, inside],
        "data.sources",
        "one of the two",
    )
    same = [*shop.base, *shop.sources[:2], *shop.sources[:2]]
    refused(capsys, train_t2v.main, same, "pictures is given twice", "repeats")


def test_caches_of_one_name_are_told_apart_by_their_folders():
    paths = ["a/x/cache", "b/x/cache", "b/y/cache"]
    sources = with_given(ExperimentConfig("a"), paths, ()).data.sources
    assert [source.label for source in sources] == ["a/x/cache", "b/x/cache", "b/y/cache"]
    sources = with_given(ExperimentConfig("a"), paths[1:], ()).data.sources
    assert [source.label for source in sources] == ["x/cache", "y/cache"]
    sources = with_given(ExperimentConfig("a"), ["a/one", "a/two"], ()).data.sources
    assert [source.name for source in sources] == ["", ""]
