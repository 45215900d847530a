"""Many samples: written as they come, kept when drawing goes on, replaced when drawn otherwise;
memory and grid stay bounded."""

import json
import weakref

import pytest
import torch
from PIL import Image

from mmdit.pixels import to_shown
from mmdit.scripts import evaluate, sample
from mmdit.training import media
from mmdit.training.media import contact_sheet, read_back, save_sample, sheet_holds
from mmdit.training.pipeline import Pipeline
from tests.helpers.tiny import Workshop, refused

PROMPTS = [f"a {color} star" for color in ("red", "blue", "green", "white", "grey")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("samples"))
    shop.train("base")
    return shop


@pytest.fixture
def draw(shop, tmp_path, monkeypatch):
    """`draw(name, *words)`: the files of the folder `name` after the command; `draw.calls`:
    numbers of the samples it drew."""
    decode, calls = Pipeline.latents, []

    def counted(self, captions, width, height, frames, settings, first=0, **more):
        calls.extend(range(first, first + len(captions)))
        if stop_at[0] is not None and first >= stop_at[0]:
            raise KeyboardInterrupt
        return decode(self, captions, width, height, frames, settings, first, **more)

    def run(name, *words, prompts=PROMPTS, stop=None, run="base"):
        calls.clear()
        stop_at[0] = stop
        arguments = [
            "--checkpoint",
            shop.folder / "runs" / run,
            "--device",
            "cpu",
            "--batch_size",
            2,
            "--out",
            tmp_path / name,
            *words,
            "--prompts",
            *prompts,
        ]
        try:
            assert sample.main([str(word) for word in arguments]) == 0
        except SystemExit:
            assert stop is not None
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    stop_at = [None]
    monkeypatch.setattr(Pipeline, "latents", counted)
    run.calls = calls
    return run


@pytest.mark.parametrize("words", [[], ["--frames", "2"]])
def test_stopped_drawing_goes_on_and_ends_with_the_same_files(draw, words):
    pytest.importorskip("av")
    whole = draw("whole", *words)
    half = draw("half", *words, stop=4)
    story = json.loads(half["samples.json"])
    assert [row["prompt"] for row in story["samples"]] == PROMPTS[:4] and "grid.png" not in half
    assert set(half) == {"samples.json", *(row["file"] for row in story["samples"])}
    again = draw("half", *words)
    assert draw.calls == [4] and set(again) == set(whole)
    for name in whole:
        assert again[name] == whole[name] or (words and name == "grid.png")  # H.264 is not exact
    draw("half", *words)
    assert draw.calls == []


def test_a_sample_that_is_gone_or_of_another_prompt_is_drawn_anew(draw, tmp_path, capsys):
    whole = draw("out")
    (tmp_path / "out/0001.png").unlink()
    assert draw("out") == whole and draw.calls == [0, 1]
    prompts = [*PROMPTS[:3], "a black ring", PROMPTS[4], "a sixth"]
    draw("out", prompts=prompts)
    assert draw.calls == [2, 3, 4, 5] and "4 of 6 samples are in" in capsys.readouterr().out
    assert draw("out", prompts=PROMPTS[:2]).keys() == {
        "0000.png",
        "0001.png",
        "grid.png",
        "samples.json",
    }
    assert draw.calls == []


def test_samples_of_other_settings_or_weights_are_replaced_and_it_is_told(
    shop, draw, capsys, tmp_path
):
    first = draw("out")
    other = draw("out", "--seed", 3, prompts=PROMPTS[:3])
    said = capsys.readouterr().out
    assert "5 samples in" in said and "settings.seed: 0 → 3" in said and "replaced" in said
    assert draw.calls == [0, 1, 2] and set(other) == {
        "0000.png",
        "0001.png",
        "0002.png",
        "grid.png",
        "samples.json",
    }
    assert other["0000.png"] != first["0000.png"]
    shop.train("base", "--resume", "train.max_steps=5")  # the same name, other weights
    draw("out", "--seed", 3, prompts=PROMPTS[:3])
    assert draw.calls == [0, 1, 2] and "weights: " in capsys.readouterr().out
    (tmp_path / "out/samples.json").write_text('{"samples": [{"file": "../../base.txt"}, 3]}')
    draw("out")
    assert draw.calls == [0, 1, 2, 3, 4]


def test_a_story_of_others_removes_no_file_elsewhere(draw, tmp_path):
    draw("out")
    story = json.loads((tmp_path / "out/samples.json").read_text())
    (tmp_path / "0009.png").write_text("precious")
    (tmp_path / "out/mine.txt").write_text("precious")
    story["settings"]["seed"] = 9
    story["samples"] += [{"file": name, "prompt": "x"} for name in ("../0009.png", "mine.txt")]
    (tmp_path / "out/samples.json").write_text(json.dumps(story))
    draw("out")
    assert (
        (tmp_path / "0009.png").read_text() == (tmp_path / "out/mine.txt").read_text() == "precious"
    )


def test_no_more_than_one_batch_is_in_memory(draw, monkeypatch):
    alive, most, sizes = weakref.WeakSet(), [0], []
    call = Pipeline.__call__

    def watched(self, *arguments, **more):
        pixels = call(self, *arguments, **more)
        sizes.append(len(pixels))
        alive.add(pixels.untyped_storage())
        most[0] = max(most[0], len(alive))
        return pixels

    monkeypatch.setattr(Pipeline, "__call__", watched)
    draw("out", prompts=[f"{i}" for i in range(12)])
    assert sizes == [2] * 6 and most[0] <= 2  # the batch that is written, and the next


def test_where_samples_go_is_looked_at_before_anything_is_loaded(shop, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["--checkpoint", shop.folder / "nothing", "--prompts", "a", "--out"]
    refused(
        capsys, sample.main, [*words, tmp_path / "file"], "file is a file, but a folder is to be"
    )
    refused(capsys, sample.main, [*words, tmp_path / "file/deep"], "cannot be written", "no folder")
    words = ["--checkpoint", shop.folder / "nothing"]
    for option in ("--out", "--sheet"):
        refused(
            capsys, evaluate.main, [*words, option, tmp_path], "is a folder, but a file is to be"
        )


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfe\x00", "p.txt is not in UTF-8"), (b"\n \n", "no prompt")]
)
def test_prompts_that_are_no_text_are_refused_before_anything_is_drawn(
    capsys, tmp_path, content, message
):
    (tmp_path / "p.txt").write_bytes(content)
    refused(
        capsys, sample.main, ["--checkpoint", "x", "--prompts_file", tmp_path / "p.txt"], message
    )
    refused(
        capsys,
        sample.main,
        ["--checkpoint", "x", "--prompts", "half \ud83d"],
        "is no text in UTF-8",
    )
    refused(
        capsys,
        sample.main,
        ["--checkpoint", "x", "--prompts", "a", "--refine", "y", "--strength", "2"],
        "--strength is 2.0",
        "at most 1",
    )


def test_sheets_stay_within_their_bounds(monkeypatch):
    assert sheet_holds(64, 64, 1) == sheet_holds(512, 512, 1) == 256
    assert sheet_holds(1280, 720, 81) == 10
    assert sheet_holds(20_000, 20_000, 1) == 1
    monkeypatch.setattr(media, "SHEET_SAMPLES", 3)
    sheet = contact_sheet(torch.rand(9, 1, 3, 16, 16), ["word " * 100_000] * 9, 2)
    assert sheet.size == contact_sheet(torch.rand(3, 1, 3, 16, 16), ["word " * 1000] * 3, 2).size
    assert sheet.height < 900


@pytest.mark.parametrize("frames", [1, 3])
def test_what_was_written_is_read_back(tmp_path, frames, monkeypatch):
    clip = torch.rand(frames, 3, 16, 32)
    path = save_sample(clip, tmp_path / "0003", 8)
    assert read_back(path).shape == clip.shape
    if frames == 1:
        assert torch.equal(read_back(path), to_shown(clip)) and Image.open(path).size == (
            32,
            16,
        )
