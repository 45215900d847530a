"""Whatever is in a file that a person or a download gives: refused with a location as a data error,
or used; never another exception, never a hang. 60 mutated files of each kind; `pytest -m thorough
tests/test_fuzz.py` takes 300, and `-m slow` 5,000.
"""

import contextlib
import json
import random
import signal
from pathlib import Path

import pytest
import torch

from mmdit.config import ConfigError, apply_overrides, decode, encode, parse_yaml
from mmdit.data.cache.items import load_item
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.captions import all_captions
from mmdit.data.dataset.records import check_id, read_records
from mmdit.experiment.experiment_config import ExperimentConfig, load_experiment_config
from mmdit.interfaces import LatentSpec
from mmdit.training import checkpoint
from tests.helpers.thorough import thorough

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10  # a file that takes longer counts as a hang; the slowest takes a fraction of a second
COUNTS = [60, *thorough(300), pytest.param(5000, marks=pytest.mark.slow)]
NASTY = [
    "",
    "~",
    "null",
    "true",
    "no",
    "0",
    "-1",
    "1e400",
    "-.inf",
    ".nan",
    "NaN",
    "1e-999",
    "9" * 30,
    "9" * 5000,
    "0x_",
    "1:2:3",
    "0b",
    "[]",
    "{}",
    "[1, 2",
    "{a: ",
    "[[[[[[[[",
    "[" * 2000,
    "{a: " * 500,
    "&a [*a]",
    "*a",
    "<<: *a",
    "? a",
    "!!python/object/apply:os.abort []",
    "!!int x",
    "!!int ''",
    "!!float []",
    "!!bool maybe",
    "!!map x",
    "!!set {a}",
    "!!timestamp 2020-01-01",
    "!<x> y",
    "2020-01-01",
    "'",
    '"',
    '"\\u0000"',
    "\0",
    "\x7f",
    "\ufeff",
    "\ud7ff",
    "\u2028",
    "\x85",
    "𝕏" * 9,
    "../../x",
    "/etc/passwd",
    "a/b",
    "type: [a]",
    "type: {b: c}",
    "- ",
    "--- ",
    "...",
    "%YAML 9.9",
    "#",
    ": ",
    "|",
    ">",
    "\t",
    "\r",
    "\n",
    "  ",
    "x" * 100_000,
    "1" + "_0" * 50,
    '{"id": 1}',
    "\\",
    "@",
    "`",
]


def mutated(text: str, chance: random.Random, others: list[str]) -> bytes:
    """1 to 4 changes by character, value, line or structure, and sometimes bytes that are no
    UTF-8."""
    for _ in range(chance.randint(1, 4)):
        lines = text.split("\n")
        at, line = chance.randrange(len(text) + 1), chance.randrange(len(lines))
        match chance.randrange(9):
            case 0:
                text = text[:at] + chance.choice(NASTY) + text[at:]
            case 1:
                text = text[:at] + text[at + chance.randint(1, 30) :]
            case 2 if ":" in lines[line]:  # another value for a key
                lines[line] = lines[line].partition(":")[0] + ": " + chance.choice(NASTY)
                text = "\n".join(lines)
            case 3:  # the value of a key in flow style, or of a JSON object
                start = text.find(":", at)
                text = (
                    text[: start + 1]
                    + " "
                    + chance.choice(NASTY)
                    + text[start + 1 + chance.randint(1, 8) :]
                )
            case 4:
                lines.insert(chance.randrange(len(lines)), lines[line])
                text = "\n".join(lines)
            case 5:
                del lines[line]
                text = "\n".join(lines)
            case 6:
                lines[line] = (
                    " " * chance.randint(1, 3) + lines[line]
                    if chance.random() < 0.5
                    else lines[line].lstrip()
                )
                text = "\n".join(lines)
            case 7:
                other = chance.choice(others)
                cut = chance.randrange(len(other) + 1)
                text = text[:at] + other[cut : cut + chance.randint(1, 300)] + text[at:]
            case _:
                text = (
                    text[:at]
                    if chance.random() < 0.3
                    else text[:at] + chr(chance.randrange(1, 0xD7FF)) + text[at + 1 :]
                )
    data = text.encode("utf-8", "surrogatepass")
    if data and chance.random() < 0.1:
        at = chance.randrange(len(data))
        data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    return data


class Hang(BaseException):
    pass


@pytest.fixture
def in_time():
    def stop(signum, frame):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)

    def attempt(work, file: Path, kind=ValueError):
        """The error's text, or None; whatever is raised otherwise fails the test."""
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            work()
        except kind as error:
            assert str(file) in str(error) and len(str(error)) < 20_000, str(error)[:500]
            return str(error)
        except BaseException as error:
            content = file.read_bytes()[:3000] if file.is_file() else ""
            raise AssertionError(
                f"{type(error).__name__}: {str(error)[:500]} from {content!r}"
            ) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    yield attempt
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("count", COUNTS)
def test_configs(tmp_path, in_time, count):
    texts = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    file, refused = tmp_path / "fuzz.yaml", 0
    for number in range(count):
        chance = random.Random(number)
        file.write_bytes(mutated(chance.choice(texts), chance, texts))

        def load():
            config = load_experiment_config(file)
            assert decode(ExperimentConfig, encode(config)) == config

        refused += in_time(load, file, ConfigError) is not None
    assert count * 0.4 < refused < count


@pytest.mark.parametrize("count", [40, *thorough(100), pytest.param(1000, marks=pytest.mark.slow)])
def test_overrides(count):
    base = parse_yaml((ROOT / "configs/quickstart.yaml").read_text())[0]
    keys = [
        "train.lr",
        "tokenizer.type",
        "video",
        "train.sample_prompts",
        "bucketing.buckets",
        "a.b.c",
        "seed",
        "",
        ".",
        "train..lr",
    ]
    for number in range(count):
        chance = random.Random(number)
        words = [
            f"{chance.choice(keys)}={chance.choice(NASTY)}" for _ in range(chance.randint(1, 3))
        ]
        with contextlib.suppress(ConfigError):
            decode(ExperimentConfig, apply_overrides(base, words))


@pytest.mark.parametrize("count", COUNTS)
def test_metadata(tmp_path, in_time, count):
    rows = [
        {"id": f"a{i}", "image_path": f"p/{i}.png", "caption": "a cat", "licence": "CC0", "n": i}
        for i in range(4)
    ]
    text = "\n".join(map(json.dumps, rows))
    file, refused = tmp_path / "fuzz.jsonl", 0
    for number in range(count):
        chance = random.Random(number)
        file.write_bytes(mutated(text, chance, [text]))

        def read():
            for record in read_records(file, chance.choice(["image", "image", "video"])):
                assert (
                    check_id(record.id)
                    and isinstance(record.caption, str)
                    and "\0" not in record.path
                )

        refused += in_time(read, file) is not None
    assert count * 0.4 < refused < count


def damaged(data: bytes, chance: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at : at + chance.randint(1, 64)] = bytes(
                    chance.choice([0, 255, 65]) for _ in range(chance.randint(0, 64))
                )
            case 2:
                del data[at:]
            case _:
                data[at:at] = data[: chance.randint(1, 64)]
    return bytes(data)


@pytest.mark.parametrize(
    "count", [100, *thorough(500), pytest.param(20_000, marks=pytest.mark.slow)]
)
def test_caches_and_checkpoints(tmp_path, in_time, count):
    """Manifest, index, item, checkpoint.json and weights: files that come with a download."""
    spec = LatentSpec(channels=3, spatial=16)
    manifest = CacheManifest("abc", "dummy", spec, ((32, 32),), False)
    with CacheWriter(tmp_path / "cache", manifest) as writer:
        writer.add_many(
            ["a", "b"], torch.zeros(2, 1, 2, 2, 3), ["x", "y"], [{"n": 1}, {"captions": ["y", "z"]}]
        )
    meta = checkpoint.Meta(3, {"seed": 1}, spec, "abc")
    folder = checkpoint.save(tmp_path / "run", meta, {"model": {"w": torch.zeros(3, 4)}}, 1)

    def use_cache():
        cache = open_cache(tmp_path / "cache", manifest)
        assert [tuple(cache.load(i).shape) for i in range(len(cache))] == [(1, 2, 2, 3)] * len(
            cache
        )
        assert all(isinstance(caption, str) for caption in cache.captions) and all(
            isinstance(facts, dict) for facts in cache.facts
        )
        assert all(
            isinstance(caption, str)
            for pair in zip(cache.captions, cache.facts)
            for caption in all_captions(*pair)
        )

    def use_item():
        assert load_item(tmp_path / "cache" / "a.pt", 3)["latents"].shape[-1] == 3

    readers = {
        tmp_path / "cache" / "manifest.json": use_cache,
        tmp_path / "cache" / "index.jsonl": use_cache,
        tmp_path / "cache" / "a.pt": use_item,
        folder / "checkpoint.json": lambda: checkpoint.load_weights(folder),
        folder / "model.safetensors": lambda: checkpoint.load_weights(folder),
    }
    for file, read in readers.items():
        whole = file.read_bytes()
        for number in range(count // len(readers)):
            chance = random.Random(number)
            binary = file.suffix in (".pt", ".safetensors") or chance.random() < 0.3
            file.write_bytes(
                damaged(whole, chance)
                if binary
                else mutated(whole.decode(), chance, [whole.decode()])
            )
            in_time(read, file.parent if read is use_cache else file)
        file.write_bytes(whole)
