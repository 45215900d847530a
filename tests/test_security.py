"""Files from others are data: none of them runs code, and none makes us write outside the folder
that was named.

Each malicious file would create a marker when unpickled, imported or constructed; the marker stays
absent and the refusal names the file.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdit.config import encode
from mmdit.data import BucketingConfig, VideoConfig, open_cache, read_records
from mmdit.data.cache.caching import Caching
from mmdit.data.cache.items import load_item
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.experiment.load import load_pipeline
from mmdit.interfaces import LatentSpec
from mmdit.interop.lora_formats import load_lora
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.tokenizers import DummyTokenizerConfig, VTPTokenizerConfig, build_tokenizer
from mmdit.training import checkpoint
from tests.helpers.tiny import forget_sums

ROOT = Path(__file__).resolve().parents[1]
SPEC = LatentSpec(channels=4, spatial=16)
VTP = ROOT / "VTP/checkpoints/vtp_tiny_f16d64"


class Evil:
    """Unpickling it creates the file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture(params=["pickle", "torch.save"])
def evil(request, tmp_path):
    """`evil(path)` writes a malicious file there; afterwards nothing of it may have run."""
    marker = tmp_path / "marker"

    def write(path: Path) -> Path:
        item = {
            "latents": torch.zeros(1, 2, 2, 4, dtype=torch.float16),
            "caption": "x",
            "facts": Evil(marker),
        }
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(item))
        else:
            torch.save(item, path)
        return path

    yield write
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # it would have


def manifest(**options) -> CacheManifest:
    return CacheManifest.of(
        build_tokenizer(DummyTokenizerConfig(latent_d=4)),
        VideoConfig(width=32, height=32),
        **options,
    )


def saved(run: Path, step: int = 1) -> Path:
    config = encode(ExperimentConfig("x", tokenizer=DummyTokenizerConfig(latent_d=4)))
    folder = checkpoint.save(
        run, checkpoint.Meta(step, config, SPEC, "abc"), {"model": {"w": torch.zeros(2)}}, 0
    )
    forget_sums(folder)  # who sends it wrote them himself
    return folder


def test_a_checkpoint(evil, tmp_path):
    with pytest.raises(ValueError, match="export.safetensors cannot be read"):
        checkpoint.load_weights(evil(tmp_path / "export.safetensors"))
    with pytest.raises(ValueError, match="other.pt cannot be read"):
        load_pipeline(evil(tmp_path / "other.pt"))
    folder = saved(tmp_path / "run")
    evil(folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        checkpoint.load_weights(folder)
    assert checkpoint.latest(tmp_path / "run") is None
    folder = saved(tmp_path / "run", 2)
    evil(folder / "optimizer.safetensors")
    assert checkpoint.latest(tmp_path / "run") is None
    folder = saved(tmp_path / "run", 3)
    (
        folder / "model.safetensors"
    ).unlink()  # parts of a sharded training instead, and what torch would keep beside its own
    (folder / "model").mkdir()
    for name in ("shard-00001-model-00001-of-00001.safetensors", ".metadata", "__0_0.distcp"):
        evil(folder / "evil").rename(folder / "model" / name)
    for shapes in ("{}", "[" * 10_000, '{"w": [-1]}', '{"w": 1e400}'):
        (folder / "model" / "shapes.json").write_text(shapes)
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            checkpoint.load_weights(folder)
    assert checkpoint.latest(tmp_path / "run") is None
    evil(folder / "checkpoint.json")
    with pytest.raises(ValueError, match="checkpoint.json cannot be read|no checkpoint"):
        checkpoint.load_weights(folder)


def test_a_cache_item(evil, tmp_path):
    with CacheWriter(tmp_path / "cache", manifest()) as writer:
        writer.add_many(["a", "b"], torch.zeros(2, 1, 2, 2, 4), ["x", "y"])
    with pytest.raises(ValueError, match="a.pt is damaged"):
        load_item(evil(tmp_path / "cache" / "a.pt"))
    with pytest.raises(ValueError, match="a.pt is damaged"):
        open_cache(tmp_path / "cache").load(0)  # the index still describes the old file
    (tmp_path / "cache" / "index.jsonl").unlink()
    with pytest.raises(ValueError, match="a.pt is damaged"):
        open_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        CacheWriter(tmp_path / "cache", manifest())


def network():
    return build_model(VideoMMDiTConfig(dim=16, depth=1, num_heads=2), 8, 16)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "adapter_model.bin"])
def test_an_adapter(evil, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} (cannot be read|is refused)"):
        load_lora(network(), evil(tmp_path / name))


def test_a_folder_of_peft(evil, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_model.bin is refused"):
        evil(tmp_path / "adapter_model.bin")
        load_lora(network(), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_a_tokenizer(evil, tmp_path, name):
    folder = tmp_path / "vtp"
    folder.mkdir()
    shutil.copy(VTP / "config.json", folder)
    evil(folder / name)
    with pytest.raises(ValueError, match="tokenizer.name_or_path: is .*vtp"):
        build_tokenizer(VTPTokenizerConfig(name_or_path=str(folder)))


def test_weights_of_a_text_encoder(evil, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.test_text_encoders import T5, hf, save_tokenizer

    save_tokenizer(tmp_path / "t5")
    transformers.T5Config(**T5).save_pretrained(tmp_path / "t5")
    evil(tmp_path / "t5" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="name_or_path"):
        hf(str(tmp_path / "t5"))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [",
        "!!python/object/new:os.system [touch ",
        "!!python/name:",
    ],
)
def test_a_config(tmp_path, tag):
    marker, path = tmp_path / "marker", tmp_path / "evil.yaml"
    path.write_text(f"experiment_name: x\nseed: {tag}{marker}{']' if '[' in tag else ''}\n")
    with pytest.raises(ValueError, match=r"evil.yaml:2: .*not allowed"):
        load_experiment_config(path)
    assert not marker.exists()


def test_weights_may_not_name_the_code_that_opens_them(tmp_path):
    """`tokenizer.repo_path` imports Python. In a config that someone wrote it is a choice; in one
    that came with weights, bait."""
    code, marker = tmp_path / "code", tmp_path / "marker"
    (code / "vtp").mkdir(parents=True)
    (code / "vtp" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    config = encode(ExperimentConfig("x", tokenizer=VTPTokenizerConfig(repo_path=str(code))))
    folder = checkpoint.save(
        tmp_path / "run",
        checkpoint.Meta(1, config, SPEC, "abc"),
        {"model": {"w": torch.zeros(2)}},
        0,
    )
    for words in ([], ["tokenizer.chunk_size=3"]):
        with pytest.raises(ValueError, match="tokenizer.repo_path: is .*would be run"):
            load_pipeline(folder, "cpu", overrides=words)
    assert not marker.exists()
    with pytest.raises(ValueError, match="other latent|other tokenizer|latents of the tokenizer"):
        load_pipeline(folder, "cpu", overrides=["tokenizer.repo_path=null"])
    assert not marker.exists()


def pictures(folder: Path, *ids: str) -> Path:
    Image.new("RGB", (32, 32)).save(folder / "p.png")
    rows = [{"id": id, "image_path": "p.png", "caption": "x"} for id in ids]
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "meta.jsonl"


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "id",
    ["../out", "/tmp/out", "..", "a/../../out", "..\\out", "a\0b", ".writing-0-0.tmp", "x" * 300],
)
def test_an_id_cannot_leave_its_folder(tmp_path, id):
    meta = pictures(tmp_path, id)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"meta.jsonl:1: id "):
        read_records(meta, "image")
    with (
        CacheWriter(tmp_path / "cache", manifest()) as writer,
        pytest.raises(ValueError, match="id "),
    ):
        writer.add(id, torch.zeros(1, 2, 2, 4), "x")
    assert {
        name
        for name in everything(tmp_path) - before
        if not name.startswith(str(tmp_path / "cache"))
    } == set()


def test_links_in_a_cache_folder_are_not_followed(tmp_path):
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    cache.mkdir()
    for name in ("a.pt", ".writing-0-0.tmp", ".writing-0-1.tmp", "manifest.json", "skipped.jsonl"):
        (outside / name).write_text("precious")
    for name in ("a.pt", ".writing-0-0.tmp", ".writing-0-1.tmp", "skipped.jsonl"):
        (cache / name).symlink_to(outside / name)
    tokenizer, video = (
        build_tokenizer(DummyTokenizerConfig(latent_d=4)),
        VideoConfig(width=32, height=32),
    )
    records = read_records(pictures(tmp_path, "a", "b"), "image")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="run is the folder of a run"):
        CacheWriter(tmp_path / "run", manifest())
    with pytest.raises(ValueError, match="no manifest.json"):
        Caching(records, "image", tokenizer, cache, video, progress=False).run()
    (cache / "a.pt").unlink()
    Caching(records, "image", tokenizer, cache, video, progress=False).run()
    assert {path.read_text() for path in outside.iterdir()} == {"precious"} and len(
        open_cache(cache)
    ) == 2
    (cache / "b.pt").unlink()
    (cache / "b.pt").symlink_to(outside / "a.pt")
    with CacheWriter(tmp_path / "second", manifest()) as writer:
        (tmp_path / "second" / "c.pt").symlink_to(outside / "a.pt")
        writer.add("c", torch.zeros(1, 2, 2, 4), "x")
    assert not (tmp_path / "second" / "c.pt").is_symlink()
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}


def test_a_link_in_place_of_an_index_or_a_size_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "index.jsonl").symlink_to(tmp_path / "outside" / "index.jsonl")
    with pytest.raises(ValueError, match="index.jsonl is a link"):
        CacheWriter(tmp_path / "one", manifest())
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "32x32").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="32x32 is a link"):
        CacheWriter(
            tmp_path / "two", manifest(bucketing=BucketingConfig(True, buckets=((32, 32),)))
        )
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/x", "a\0b"])
def test_a_run_stays_in_its_output_folder(name):
    with pytest.raises(ValueError, match="experiment_name"):
        ExperimentConfig(name)
