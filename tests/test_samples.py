"""Many samples: written as they come, kept when drawing goes on, replaced only when asked;
memory and grid stay bounded."""

import io
import json
import os
import shlex
import weakref
from functools import partial

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from mmdit.files import held_folder
from mmdit.pixels import to_shown
from mmdit.scripts import (
    estimate_latent_scale,
    evaluate,
    evaluate_vtp,
    inspect_cache,
    plot_run,
    report,
    sample,
)
from mmdit.scripts.prompts import read_prompts, read_requests
from mmdit.training import media
from mmdit.training.media import contact_sheet, read_back, save_sample, sheet_holds
from mmdit.training.pipeline import Pipeline, SampleSettings
from mmdit.training.requests import Request
from mmdit.training.samples import check_files, weights_digest
from tests.helpers.thorough import thorough
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
        calls.extend(first)
        if stop_at[0] is not None and first[0] >= stop_at[0]:
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
            assert stop is not None, "it was refused"
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    stop_at = [None]
    monkeypatch.setattr(Pipeline, "latents", counted)
    run.calls = calls
    return run


@pytest.mark.parametrize("words", [*thorough([]), ["--frames", "2"]])
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


def test_a_sample_that_is_gone_is_drawn_anew_one_of_another_prompt_if_asked(draw, tmp_path, capsys):
    whole = draw("out")
    (tmp_path / "out/0001.png").unlink()
    assert draw("out") == whole and draw.calls == [0, 1]
    prompts = [*PROMPTS[:3], "a black ring", PROMPTS[4], "a sixth"]
    with pytest.raises(AssertionError):  # refused
        draw("out", prompts=prompts)
    said = capsys.readouterr().err
    assert "1 samples in" in said and "not asked for" not in said and draw.calls == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    draw("out", "--replace", prompts=prompts)
    assert draw.calls == [2, 3, 4, 5] and "4 of 6 samples are in" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        draw("out", prompts=PROMPTS[:2])
    assert "--replace to draw them anew; 4 of them are not asked for now" in capsys.readouterr().err
    assert draw("out", "--replace", prompts=PROMPTS[:2]).keys() == {
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
    with pytest.raises(AssertionError):
        draw("out", "--seed", 3)
    said = capsys.readouterr().err
    assert "5 samples in" in said and "settings.seed: 0 → 3" in said and "give --replace" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    other = draw("out", "--seed", 3, "--replace", prompts=PROMPTS[:3])
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
    draw("out", "--seed", 3, "--replace", prompts=PROMPTS[:3])
    assert draw.calls == [0, 1, 2] and "weights: " in capsys.readouterr().out
    (tmp_path / "out/samples.json").write_text('{"samples": [{"file": "../../base.txt"}, 3]}')
    with pytest.raises(AssertionError):
        draw("out")
    assert "no samples.json that says how" in capsys.readouterr().err
    draw("out", "--replace")
    assert draw.calls == [0, 1, 2, 3, 4]


def test_a_story_of_others_removes_no_file_elsewhere(draw, tmp_path):
    draw("out")
    story = json.loads((tmp_path / "out/samples.json").read_text())
    (tmp_path / "0009.png").write_text("precious")
    (tmp_path / "out/mine.txt").write_text("precious")
    story["settings"]["seed"] = 9
    story["samples"] += [{"file": name, "prompt": "x"} for name in ("../0009.png", "mine.txt")]
    (tmp_path / "out/samples.json").write_text(json.dumps(story))
    draw("out", "--replace")
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


def test_the_steps_of_a_batch_that_takes_long_are_shown(draw, capsys, monkeypatch):
    draw("quick", "--steps", "3")
    assert "step" not in capsys.readouterr().err
    monkeypatch.setattr("mmdit.commands.sample.PATIENCE", 0)
    monkeypatch.setattr("mmdit.commands.sample.tqdm", partial(tqdm, mininterval=0))
    draw("slow", "--steps", "3")
    shown = capsys.readouterr().err
    assert all(f"a batch: {share}" in shown for share in ("  0%", " 33%", " 67%", "100%"))
    assert len(draw.calls) == len(PROMPTS), "what is drawn is the same"


def test_where_samples_go_is_looked_at_before_anything_is_loaded(shop, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["--checkpoint", shop.folder / "nothing", "--prompts", "a", "--out"]
    refused(
        capsys, sample.main, [*words, tmp_path / "file"], "file is a file, but a folder is to be"
    )
    refused(capsys, sample.main, [*words, tmp_path / "file/deep"], "cannot be written", "no folder")
    checkpoint = ["--checkpoint", tmp_path / "nothing"]
    sheet = tmp_path / "sheet.png"
    sheet.mkdir()
    for main, words, option in (
        (evaluate.main, checkpoint, "--out"),
        (evaluate.main, checkpoint, "--sheet"),
        (evaluate_vtp.main, checkpoint, "--out"),
        (estimate_latent_scale.main, ["--cache_dir", "nothing"], "--save"),
        (inspect_cache.main, ["--cache_dir", "nothing", "--config", "nothing"], "--sheet"),
        (plot_run.main, ["--runs", shop.folder / "runs/base"], "--out"),
    ):
        refused(
            capsys, main, [*words, option, sheet], f"{option} {sheet} is a folder, but a file is"
        )


def test_the_folder_of_what_is_written_is_made(shop, tmp_path):
    report.main([str(shop.folder / "runs/base"), "--out", str(tmp_path / "a/report.html")])
    words = ["--cache_dir", str(shop.cache("pictures")), "--save", str(tmp_path / "b/scale.json")]
    estimate_latent_scale.main(words)
    assert (tmp_path / "a/report.html").is_file() and (tmp_path / "b/scale.json").is_file()


def test_the_sum_of_weights_knows_every_part_of_them():
    """A LoRA, or a picture, may change a few numbers alone."""
    torch.manual_seed(0)
    network, picture = torch.nn.Linear(8, 4), torch.rand(3, 4)
    sums = {weights_digest({"model": network}, picture)}
    for weight in (network.weight, network.bias, picture):
        for place in (0, weight.numel() // 2, weight.numel() - 1):
            with torch.no_grad():
                weight.view(-1)[place] += 1e-3
            sums.add(weights_digest({"model": network}, picture))
    assert len(sums) == 10 and len(sums | {weights_digest({"other": network}, picture)}) == 11


def test_a_picture_of_which_one_pixel_is_another_is_another_picture():
    picture = torch.zeros(1, 3, 200, 200)
    sums = {weights_digest({}, picture)}
    for place in (1, 777, 50_001):
        picture.view(-1)[place] = 1.0
        sums.add(weights_digest({}, picture))
    assert len(sums) == 4


def test_guidance_of_a_prompt_is_for_both_experts():
    common = SampleSettings(cfg_scale=4.0, cfg_scale_low=3.0)
    alone = Request("a").settings(common)
    own = Request("a", guidance=1.0).settings(common)
    assert (alone.cfg_scale, alone.cfg_scale_low) == (4.0, 3.0)
    assert (own.cfg_scale, own.cfg_scale_low) == (1.0, None) and not own.guides


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfe\x00", "p.txt is not in UTF-8"), (b"\n \n", "no prompt in")]
)
def test_prompts_that_are_no_text_are_refused_before_anything_is_drawn(
    shop, capsys, tmp_path, content, message
):
    words = ["--checkpoint", shop.folder / "runs/base", "--prompts", "a", "--negative", "\ud83d"]
    refused(capsys, sample.main, [*words, "--out", tmp_path / "half"], "is no text in UTF-8")
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
    half = {
        "p.jsonl": ('{"prompt": "a \\ud83d"}', "p.jsonl:1: prompt: holds half a surrogate pair"),
        "q.jsonl": ('\n{"prompt": "a", "negative": "\\ud83d"}', "q.jsonl:2: negative: holds half"),
        "p.yaml": ('prompts:\n- "a \\ud83d"', "p.yaml:2: 'a \\ud83d' holds half"),
        "p.json": ('[{"caption": "a \\ud83d"}]', "prompt 0 holds half"),
    }
    for name, (text, told) in half.items():
        (tmp_path / name).write_text(text)
        words = ["--checkpoint", "x", "--prompts_file", tmp_path / name]
        refused(capsys, sample.main, words, told)
    refused(
        capsys,
        sample.main,
        ["--checkpoint", "x", "--prompts", "a", "--refine", "y", "--strength", "2"],
        "--strength is 2.0",
        "at most 1",
    )
    words = ["--checkpoint", "x", "--prompts", "a", "--strength", "0.5"]
    refused(capsys, sample.main, words, "--strength is 0.5", "nothing is drawn again")
    words = ["--checkpoint", "x", "--prompts", "a", "train.sample_negative_prompt=ugly blurry"]
    refused(capsys, sample.main, words, "reads like an override")
    two = ["--lora", "a", "--lora", "b", "--checkpoint", "x"]
    refused(capsys, sample.main, two, "--lora: is given twice, and the first would be lost")


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


# ── requests ──────────────────────────────────────────────────────────────────────────────────────
def pixels_of(path):
    return read_back(path).float()


def command(run, out, *words):
    words = ["--checkpoint", run, "--device", "cpu", "--out", out, *words]
    return sample.main([str(word) for word in words])


def test_lines_have_settings_of_their_own_and_batches_change_nothing(shop, tmp_path, monkeypatch):
    rows = [
        {"prompt": "a red star"},
        {"prompt": "a red star", "seed": 7},
        {"prompt": "a blue star", "width": 32, "height": 48},
        {"prompt": "a green star", "seed": 8},
        {"prompt": "a white star", "negative": "grey", "guidance": 2},
        {"prompt": "a wide star", "width": 32, "height": 48, "seed": 7},
    ]
    jsonl, text = tmp_path / "prompts.jsonl", tmp_path / "prompts.yaml"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("prompts:\n- a red star\n" + "".join(f"- {json.dumps(r)}\n" for r in rows[1:]))
    run, sizes = shop.folder / "runs/base", []
    latents = Pipeline.latents

    def counted(self, captions, *rest, **more):
        sizes.append(len(captions))
        return latents(self, captions, *rest, **more)

    monkeypatch.setattr(Pipeline, "latents", counted)
    command(run, tmp_path / "all", "--prompts_file", jsonl)
    assert sizes == [3, 2, 1], "equal settings are drawn together"
    command(run, tmp_path / "one", "--prompts_file", text, "--batch_size", 1)
    drawn = [pixels_of(tmp_path / f"all/000{i}.png") for i in range(6)]
    for i, picture in enumerate(drawn):
        assert (pixels_of(tmp_path / f"one/000{i}.png") - picture).abs().max() <= 1
    assert drawn[2].shape == (1, 3, 48, 32) and drawn[0].shape == (1, 3, 32, 48)
    # a seed is the same noise wherever it stands: as the first prompt of a command
    command(run, tmp_path / "alone", "--prompts", "a green star", "--seed", 8)
    assert (pixels_of(tmp_path / "alone/0000.png") - drawn[3]).abs().max() <= 1
    assert (drawn[0] - drawn[1]).abs().max() > 2
    command(run, tmp_path / "plain", "--prompts", *["a white star"] * 5)
    assert (pixels_of(tmp_path / "plain/0004.png") - drawn[4]).abs().max() > 2
    stored = json.loads((tmp_path / "all/samples.json").read_text())["samples"]
    assert [{**row, "file": None} for row in stored] == [{"file": None, **row} for row in rows]
    sizes.clear()
    command(run, tmp_path / "all", "--prompts_file", text)
    assert not sizes, "finished samples are kept"


def test_two_commands_do_not_draw_into_one_folder(shop, tmp_path, capsys):
    """Each would write samples.json without the samples of the other."""
    run, out = shop.folder / "runs/base", tmp_path / "out"
    words = ["--checkpoint", run, "--device", "cpu", "--prompts", "a", "--out", out]
    with held_folder(out, ""):
        refused(capsys, sample.main, words, f"another process is drawing into {out}")
    command(run, out, "--prompts", "a")
    assert {path.name for path in out.iterdir()} == {"0000.png", "grid.png", "samples.json"}


def test_separators_of_unicode_end_no_line_of_a_prompts_file(tmp_path):
    prompt = "a red\u2028star\x85 on a page\x0c of navy"
    row = json.dumps({"prompt": prompt, "seed": 1}, ensure_ascii=False)
    for name, line in (("p.jsonl", row), ("p.txt", prompt)):
        (tmp_path / name).write_bytes(f"{line}\r\n\n{line}\n".encode())
        assert [one.prompt for one in read_requests(str(tmp_path / name))] == [prompt] * 2


def test_the_prompts_of_post_training_can_be_drawn(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('\ufeff[{"caption": "a red star"}, {"caption": "b"}]', encoding="utf-8")
    assert [one.prompt for one in read_requests(str(path))] == ["a red star", "b"]
    assert read_prompts(str(path)) == ["a red star", "b"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n')
    with pytest.raises(ValueError, match=r"prompt 1 has settings of its own \(seed\)"):
        read_prompts(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "sed": 1}',
            "p.jsonl:2: sed: unknown key (did",
        ),
        ("p.jsonl", '\n{"prompt": "a"', "p.jsonl:2: not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', '"prompt" is there twice'),
        ("p.jsonl", '{"prompt": "a", "frames": 0}', "p.jsonl:1: frames: is 0; must be at least 1"),
        ("p.yaml", "prompts:\n- a\n- {seed: 1}", "p.yaml:3: prompt: is missing"),
        ("p.yaml", "prompts: []\nseed: 1", "holds prompts, seed, must hold one list"),
        ("p.yaml", "prompts:\n- 3", "p.yaml:2: is 3, must be text"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]', "p.jsonl:2: is no JSON object"),
        ("p.jsonl", "a red star", "p.jsonl:1: is no JSON object"),
        ("p.json", '{"prompt": "a"}', "p.json', which cannot be read"),
        ("p.yaml", "prompts: []", "there is no prompt in"),
        (
            "p.jsonl",
            '{"prompt": "a", "width": 99999}',
            "p.jsonl:1: width: is 99999; must be at most 65536",
        ),
        ("p.jsonl", '{"prompt": "a", "width": 40}', "prompt 0 ({'width': 40}): "),
    ],
)
def test_a_bad_line_of_a_prompts_file_is_named(shop, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    words = ["--checkpoint", shop.folder / "runs/base", "--device", "cpu"]
    words += ["--prompts_file", tmp_path / name, "--out", tmp_path / "out"]
    refused(capsys, sample.main, words, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_file_says_how_it_was_drawn(shop, tmp_path, capsys, frames, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setenv("HOME", str(shop.folder))
    (tmp_path / "p.jsonl").write_text('{"prompt": "ein \\"roter\\" Stern ★", "seed": 5}\n')
    run = shop.folder / "runs/base"
    command(run, tmp_path / "out", "--frames", frames, "--prompts_file", tmp_path / "p.jsonl")
    capsys.readouterr()
    path = next((tmp_path / "out").glob("0000.*"))
    assert sample.main(["--read", str(path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt"] == 'ein "roter" Stern ★' and facts["checkpoint"] == "~/runs/base"
    assert facts["seed"] == facts["settings"]["seed"] == 5 and facts["number"] == 0
    assert facts["size"] == [48, 32, frames] and facts["settings"]["sampler"]["steps"] == 2
    assert facts["command"].startswith("mmdit sample --checkpoint '~/runs/base' --device cpu")
    assert "p.jsonl" not in facts["command"], "it stands alone"
    assert str(shop.folder) not in json.dumps(facts["command"]) and "--out" not in facts["command"]
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    refused(capsys, sample.main, ["--read", tmp_path / "other.png"], "does not say how it was made")
    refused(capsys, sample.main, ["--read", tmp_path / "p.jsonl"], "cannot be read as a sample")


def test_prompts_are_read_while_the_model_stays_loaded(shop, tmp_path, capsys, monkeypatch):
    def type_in(*lines, out="out", more=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        command(shop.folder / "runs/base", tmp_path / out, "--interactive", *more)
        return capsys.readouterr().out

    said = type_in("a red star", "", '{"prompt": "a blue star", "seed": 3}', '{"sed": 1}', "{", "x")
    assert said.count("\nready: ") + said.startswith("ready: ") == 1
    assert "0000.png" in said and said.count("error: this line") == 2
    assert "wrote 3 samples" in said and "0002.png, seed 2\n" in said
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("0*")}
    seeded = type_in("a", '{"prompt": "b", "seed": 3}', "c", out="seeded", more=["--seed", 40])
    assert all(f"000{i}.png, seed {seed}\n" in seeded for i, seed in enumerate((40, 3, 42)))
    assert "0003.png" in type_in("a fourth") and len(list((tmp_path / "out").glob("0*"))) == 4
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in first.items())
    words = ["--checkpoint", "x", "--interactive", "--prompts", "a"]
    refused(capsys, sample.main, words, "leave out --prompts")
    words = ["--checkpoint", "x", "--interactive", "--first", "3"]
    refused(capsys, sample.main, words, "--first is 3", "numbers its samples after those")


def drawn_again(path, out):
    """Run the command inside a sample, and return the file of its name in `out`."""
    words = shlex.split(media.read_facts(path)["command"])
    assert words[:2] == ["mmdit", "sample"]
    with_home = [os.path.expanduser(word) for word in words[2:]]
    assert sample.main([*with_home, "--out", str(out)]) == 0
    return out / path.name


@pytest.mark.parametrize("frames", [1, *thorough(2)])
def test_the_command_inside_a_sample_draws_it_again(shop, tmp_path, monkeypatch, frames):
    run, kept, short = shop.folder / "runs/base", tmp_path / "p.jsonl", ("--frames", frames)
    monkeypatch.setenv("HOME", str(shop.folder))
    command(run, tmp_path / "words", *short, "--seed", 5, "--prompts", *PROMPTS[:2])
    rows = [{"prompt": "-x 'ü' \"$HOME\""}, {"prompt": "b", "seed": 9, "width": 32, "negative": ""}]
    rows += [{"prompt": "c", "guidance": 2.5}]
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shortened = ["--prompts_f", kept, "--repl", "--batch=1"]
    command(run, tmp_path / "file", *short, *shortened)
    kept.unlink()  # a sample says everything itself
    lines = io.StringIO("a\n" + json.dumps({**rows[1], "frames": 1}) + "\nz\n")
    monkeypatch.setattr("sys.stdin", lines)
    command(run, tmp_path / "typed", *short, "--interactive")
    numbers = set()
    for place, count in (("words", 2), ("file", 3), ("typed", 3)):
        files = sorted((tmp_path / place).glob("0*"))
        assert len(files) == count
        for path in files:
            out = tmp_path / "again" / place / path.stem
            again = drawn_again(path, out)
            if place != "words":  # it is alone there; a line with a seed is its first sample
                (again,) = out.glob("0*")
            assert again.read_bytes() == path.read_bytes(), path
            numbers.add(media.read_facts(path)["number"])
    assert numbers == {0, 1, 2}


def test_no_file_is_written_over_that_samples_json_does_not_list(draw, tmp_path, capsys):
    draw("out", prompts=PROMPTS[:2])
    mine = tmp_path / "out/0003.png"
    mine.write_bytes(b"mine")
    with pytest.raises(AssertionError, match="it was refused"):
        draw("out")
    assert f"{mine} would be replaced" in capsys.readouterr().err and mine.read_bytes() == b"mine"
    mine.unlink()
    whole = draw("out")
    story = tmp_path / "out/samples.json"
    rows = json.loads(story.read_text())
    rows["samples"] = rows["samples"][:3]  # as a kill between a sample and its line leaves it
    story.write_text(json.dumps(rows))
    assert {name: whole[name] for name in whole if name[0] == "0"}.items() <= draw("out").items()
    mine.write_bytes(b"mine")
    story.write_text(json.dumps(rows))
    assert draw("out", "--replace")["0003.png"] == whole["0003.png"]


@pytest.mark.parametrize("content", [b"train: {lr: 1.0e-3}\n", b"\xff\xd8\xff\xe0", b"a cat\n"])
def test_a_file_that_no_command_wrote_is_not_replaced(tmp_path, content):
    path = tmp_path / "there"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--save .*there is there, .* it would be lost"):
        check_files(save=str(path))
    for ours in (b"", b'{"mean": [0.0]}', b"\x89PNG\r\n", b"<!doctype html>\n<html>"):
        path.write_bytes(ours)
        check_files(save=str(path))
