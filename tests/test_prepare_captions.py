"""Captions by a model in a folder or on a server: each asked for once, whatever fails in between,
and written as lines that caching reads."""

import errno
import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.config import ConfigError
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.dataset.captions import all_captions
from mmdit.data.dataset.problems import Unusable
from mmdit.data.dataset.records import read_records
from mmdit.data.preparing import caption_preparation
from mmdit.data.preparing.caption_preparation import (
    NOTES,
    CaptionPreparation,
    CaptionSettings,
)
from mmdit.data.preparing.caption_server import KEY, ServerCaptioner
from mmdit.data.preparing.caption_texts import clean_caption
from mmdit.scripts import cache_vtp_latents, prepare_captions, prepare_clips, train_t2v
from tests.helpers import films
from tests.helpers.caption_servers import reply, stand_in
from tests.helpers.tiny import CONFIG, refused
from tests.test_cache import write_meta

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (90,) * 3}


@pytest.fixture
def server():
    with stand_in() as running:
        yield running


@pytest.fixture
def images(tmp_path):
    """Four pictures of one colour, the last of which has a caption; a damaged and a missing one."""
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (64 + 16 * number, 48), colour).save(tmp_path / f"{name}.png")
        rows.append({"id": name, "image_path": f"{name}.png", "caption": "", "licence": "CC0"})
    rows[-1]["caption"] = "written by a person"
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    for name in ("torn", "gone"):
        rows.append({"id": name, "image_path": f"{name}.png", "caption": ""})
    return write_meta(tmp_path, rows)


def colour_of(request) -> str:
    """What is in the first picture of a request."""
    shown = np.asarray(request["pictures"][0]).mean((0, 1))
    return min(COLOURS, key=lambda name: np.abs(shown - COLOURS[name]).sum())


def describe(request) -> str:
    return f"a {colour_of(request)} picture"


def words(meta, server, *more):
    place = ["--meta_jsonl", str(meta), "--out_dir", str(meta.parent / "out")]
    return [*place, "--server", server.address, "--model", "seer", *more]


def lines(meta):
    text = (meta.parent / "out" / meta.name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def captions(meta):
    return {row["id"]: row["caption"] for row in lines(meta)}


def reasons(meta):
    text = (meta.parent / "out" / "skipped.jsonl").read_text(encoding="utf-8")
    return {row["id"]: row["reason"] for row in map(json.loads, text.splitlines())}


MADE = {name: f"a {name} picture" for name in ("red", "green", "blue")}
ALL = MADE | {"grey": "written by a person"}


# ── a server ──────────────────────────────────────────────────────────────────────────────────────
def test_each_picture_without_a_caption_gets_one(images, server, capsys, monkeypatch):
    monkeypatch.setenv(KEY, "secret-7")
    server.answer = describe
    assert prepare_captions.main(words(images, server)) == 0
    said = capsys.readouterr().out
    assert captions(images) == ALL
    assert lines(images)[0] == {
        "id": "red",
        "image_path": "../red.png",
        "caption": "a red picture",
        "licence": "CC0",
        "captioned_by": "seer",
    }
    assert read_records(images.parent / "out" / images.name, "image")
    assert "3 captioned" in said and "1 had a caption, 2 skipped" in said
    assert reasons(images)["gone"] == "file not found" and "torn" in reasons(images)
    assert len(server.requests) == 3
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer secret-7"
    assert request["body"]["model"] == "seer" and request["body"]["max_tokens"] == 256
    assert len(request["pictures"]) == 1 and "caption" in request["prompt"]
    assert "secret" not in said
    for file in (images.parent / "out").iterdir():
        assert b"secret" not in file.read_bytes()


@pytest.mark.parametrize("change", [reversed, lambda rows: rows[:-1], lambda rows: rows[1:]])
def test_lines_that_are_edited_meanwhile_get_no_caption_of_another(images, server, capsys, change):
    """The lines are read again to be written, and a caption belongs to an id."""

    once = threading.Lock()  # several requests are answered at a time

    def edited(request):
        if once.acquire(blocking=False):
            rows = images.read_text().splitlines(keepends=True)
            images.write_text("".join(change(rows)))
        return describe(request)

    server.answer = edited
    refused(capsys, prepare_captions.main, words(images, server), "was changed while its records")
    assert not (images.parent / "out" / images.name).exists()
    assert prepare_captions.main(words(images, server)) == 0
    assert captions(images).items() <= ALL.items() and len(server.requests) == 3


def preparation(meta, server, waits=None, threads=1, media="image", **options):
    settings = options.pop("settings", CaptionSettings(("What is it?",)))
    sleep = (waits if waits is not None else []).append
    captioner = ServerCaptioner(server.address, "seer", sleep=sleep, **options)
    return CaptionPreparation(
        meta, media, meta.parent / "out", captioner, settings, threads=threads
    )


def test_what_fails_for_a_moment_is_tried_again_after_longer_and_longer(images, server):
    server.answer = describe
    cut = reply("a red picture")[:40]
    server.faults.extend(
        [
            500,
            503,
            (429, {"Retry-After": "7"}, b"later"),
            (200, {}, b"<html>not JSON"),
            (200, {"Content-Length": "4000"}, cut),  # the connection ends within the reply
            0.0,  # the answer; and for the next picture:
            (200, {}, b'{"choices": []}'),
            (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
            0.4,  # no answer in time
        ]
    )
    waits = []
    report = preparation(images, server, waits, timeout=0.2).run()
    assert captions(images) == ALL and report.made == 3
    assert waits == [1.0, 2.0, 7.0, 8.0, 16.0, 1.0, 2.0, 4.0]


def test_a_picture_that_fails_every_time_is_skipped_and_asked_for_by_the_next_run(images, server):
    server.answer = describe
    server.faults.extend([500] * 6)
    report = preparation(images, server).run()
    assert report.made == 2 and "red" not in captions(images)
    assert "status 500" in reasons(images)["red"] and "6 times" in reasons(images)["red"]
    server.faults.append(400)  # it refuses this one: too large, perhaps
    assert preparation(images, server).run().made == 0
    assert "refuses the request with 400" in reasons(images)["red"]
    report = preparation(images, server).run()
    assert (report.made, report.already) == (1, 2) and captions(images) == ALL
    assert len(server.requests) == 6 + 2 + 1 + 1


@pytest.mark.parametrize(
    "status, remedy", [(401, KEY), (403, KEY), (404, "--model"), (302, "leads elsewhere")]
)
def test_a_server_that_will_refuse_everything_ends_the_run(
    images, server, capsys, monkeypatch, status, remedy
):
    monkeypatch.setenv(KEY, "secret-7")
    with stand_in() as other:
        headers = {"Location": f"{other.address}/chat/completions"}
        body = b'{"error": "wrong key: secret-7 \x1b[2J"}'
        server.faults.extend([(status, headers, body)] * 99)
        message = refused(capsys, prepare_captions.main, words(images, server), remedy, str(status))
        assert "secret" not in message and "***" in message and "\x1b" not in message
        assert not other.requests  # nobody was sent on with the key
    assert len(server.requests) <= 3


def test_a_server_that_is_gone_ends_the_run_and_what_is_made_stays(tmp_path, server, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [{"id": f"{n:03d}", "image_path": "a.png", "caption": ""} for n in range(60)]
    meta = write_meta(tmp_path, rows)
    server.faults.extend([0.0] * 5 + [500] * 6 * len(rows))  # each is asked for six times
    with pytest.raises(ValueError, match="20 requests failed one after the other.*goes on"):
        preparation(meta, server).run()
    assert len(lines(meta)) == 5
    server.faults.clear()
    assert preparation(meta, server).run().already == 5


@pytest.mark.parametrize(
    "address, reason",
    [
        ("localhost:8000", "must be an address"),
        ("ftp://localhost/v1", "must be an address"),
        ("http://user:secret@localhost/v1", "address alone"),
        ("http://localhost/v1?key=secret", "address alone"),
        ("http://example.com/v1", "would show it to the network"),
        ("http://localhost:99999/v1", "must be an address"),
    ],
)
def test_addresses_that_would_leak_a_key_or_lead_nowhere_are_refused(monkeypatch, address, reason):
    monkeypatch.setenv(KEY, "secret-7")
    with pytest.raises(ValueError, match=reason) as refusal:
        ServerCaptioner(address, "seer")
    assert "secret-7" not in str(refusal.value)
    assert "secret-7" not in repr(ServerCaptioner("https://example.com/v1", "seer"))


def test_a_reply_without_end_is_cut(images, server):
    """A server that sends a byte now and then would keep a request for ever."""
    server.faults.append((200, {}, b" " * (2 << 20)))
    captioner = ServerCaptioner(server.address, "seer", tries=1)
    with pytest.raises(Unusable, match="more than 1048576 bytes"):
        captioner([Image.new("RGB", (8, 8))], "what?", 0)


# ── stopping, going on ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("threads", [0, 3])
def test_stopped_by_a_signal_it_goes_on_and_asks_for_nothing_twice(tmp_path, server, threads):
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"id": str(n), "image_path": f"{n}.png", "caption": ""} for n in range(12)]
    meta = write_meta(tmp_path, rows)

    def stopping(request):
        if len(server.requests) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return f"red {request['pictures'][0].getpixel((9, 9))[0]}"

    server.answer = stopping
    report = preparation(meta, server, threads=threads).run()
    assert report.interrupted and 0 < report.made < 12 and report.waiting == 12 - report.made
    made = captions(meta)
    assert len(made) == report.made  # the lines are whole, and ready to be cached
    again = preparation(meta, server, threads=threads).run()
    assert (again.already, again.made) == (report.made, 12 - report.made)
    assert len(server.requests) <= 12 + max(1, threads)  # but for what was under way
    assert list(captions(meta)) == [str(number) for number in range(12)]
    assert made.items() <= captions(meta).items()


def test_a_note_that_a_kill_has_cut_off_costs_one_caption(images, server):
    server.answer = describe
    preparation(images, server).run()
    notes = images.parent / "out" / NOTES
    for cut in (-1, -5, -30):
        notes.write_bytes(notes.read_bytes()[:cut])
        report = preparation(images, server).run()
        assert (report.already, report.made) == (2, 1) and captions(images) == ALL
        assert all(json.loads(line) for line in notes.read_text().splitlines())


def test_other_settings_are_told_and_their_captions_kept(images, server):
    server.answer = lambda request: f"{request['prompt']} {colour_of(request)}"
    first = CaptionSettings(("Say",))
    preparation(images, server, settings=first).run()
    report = preparation(images, server, settings=CaptionSettings(("Tell",), side=32)).run()
    assert (report.made, report.already) == (3, 0) and captions(images)["red"] == "Tell red"
    assert report.changed_settings == ["side: 768 → 32", "prompts: ['Say'] → ['Tell']"] or set(
        report.changed_settings
    ) == {"side: 768 → 32", "prompts: ['Say'] → ['Tell']"}
    assert "not used" in report.text()
    asked = len(server.requests)
    report = preparation(images, server, settings=first).run()
    assert report.already == 3 and captions(images)["red"] == "Say red"
    assert len(server.requests) == asked  # back to the first settings: nothing is asked for


def test_a_picture_that_was_exchanged_is_told_and_captioned_anew(images, server):
    server.answer = describe
    preparation(images, server).run()
    (images.parent / "red.png").write_bytes((images.parent / "blue.png").read_bytes())
    os.utime(images.parent / "green.png", (1, 1))  # touched: the same bytes
    report = preparation(images, server).run()
    assert report.changed_sources == ["red"] and (report.made, report.already) == (1, 2)
    assert captions(images)["red"] == "a blue picture"
    (images.parent / "red.png").unlink()
    preparation(images, server).run()
    assert "red" not in captions(images) and reasons(images)["red"] == "file not found"


def test_replace_captions_those_that_have_one(images, server):
    server.answer = describe
    prepare_captions.main(words(images, server, "--replace"))
    assert captions(images) == MADE | {"grey": "a grey picture"}
    written = images.parent / "out" / images.name
    by_hand = written.read_text(encoding="utf-8").replace("a red picture", "mine")
    written.write_text(by_hand, encoding="utf-8")
    prepare_captions.main(words(images, server, "--replace"))
    assert captions(images) == MADE | {"grey": "a grey picture"}
    (kept,) = written.parent.glob("train_images.before-*.jsonl")
    assert kept.read_text(encoding="utf-8") == by_hand


# ── what models write ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "text, clean",
    [
        ("  A cat\n\tsleeps. ", "A cat sleeps."),
        ("a\x1b[31m cat\x00\x07 \u202eon a mat\u2028", "a [31m cat on a mat"),
        ("<think>It is a cat? Or not.</think>\n\nA cat.", "A cat."),
        ('"A cat."', "A cat."),
        ("“A cat.”", "A cat."),
        ("a cat \ud83d", "a cat"),  # half a character
        (
            "ein Kätzchen 猫 می‌رود",
            "ein Kätzchen 猫 می‌رود",
        ),  # letters of any script, joined as they are
        ("x" * 50, "x" * 40),
        ("One sentence. Another that does not end before the limit", "One sentence."),
        ("words without any sentence that go on and on", "words without any sentence that go on"),
    ],
)
def test_captions_are_one_clean_line_of_limited_length(text, clean):
    assert clean_caption(text, 40) == clean


def test_a_caption_that_was_cut_off_ends_with_its_last_sentence():
    assert clean_caption("A cat. It sleeps on a", 100, cut_off=True) == "A cat."
    assert clean_caption("A cat that sleeps on", 100, cut_off=True) == "A cat that sleeps on"


@pytest.mark.parametrize("text", ["", " \n", "\x00\x1b", "...", '""', "<think>Well", "🙂"])
def test_a_caption_without_a_word_is_none(text):
    with pytest.raises(Unusable, match="empty caption"):
        clean_caption(text, 100)


def test_an_empty_caption_is_skipped_with_its_reason(images, server):
    server.answer = lambda request: "\x07" if colour_of(request) == "red" else describe(request)
    report = preparation(images, server).run()
    assert report.made == 2 and reasons(images)["red"].startswith("empty caption")
    assert "red" not in captions(images)


def test_several_prompts_and_samples_give_several_captions(images, server, tmp_path):
    server.answer = lambda request: f"{request['prompt']} {request['body'].get('seed', 0) % 1000}"
    more = ["--prompts", "What?", "Where?", "--count", "2", "--temperature", "0.7"]
    assert prepare_captions.main(words(images, server, *more)) == 0
    row = lines(images)[0]
    assert len(row["captions"]) == 4 and row["caption"] == row["captions"][0]
    assert [text.split()[0] for text in row["captions"]] == ["What?", "What?", "Where?", "Where?"]
    record = read_records(images.parent / "out" / images.name, "image")[0]
    assert all_captions(record.caption, record.facts) == row["captions"]
    # the same seeds another time
    (images.parent / "out" / NOTES).unlink()
    prepare_captions.main(words(images, server, *more))
    assert lines(images)[0] == row


# ── clips ─────────────────────────────────────────────────────────────────────────────────────────
def grey_frames(first, end):
    return [np.full((32, 48, 3), 20 + 4 * number, np.float32) for number in range(first, end)]


def test_a_clip_is_shown_as_frames_in_their_order(tmp_path, server):
    pytest.importorskip("av")
    films.write(grey_frames(0, 48), tmp_path / "a.mp4", rate=24)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(grey_frames(0, 20)):
        image = Image.fromarray(frame.astype(np.uint8))
        image.save(tmp_path / "frames" / f"{number}.png")
    rows = [
        {"id": "all", "video_path": "a.mp4", "caption": ""},
        {"id": "part", "video_path": "a.mp4", "video_span": [12, 24], "caption": ""},
        {"id": "short", "video_path": "a.mp4", "video_span": [40, 42], "caption": ""},
        {"id": "folder", "frames_dir": "frames", "caption": ""},
    ]
    meta = write_meta(tmp_path, rows, "train_videos.jsonl")
    settings = CaptionSettings(("What happens?",), frames=4, side=24)
    preparation(meta, server, media="video", settings=settings).run()
    shown = []
    for request in server.requests:
        assert {picture.size for picture in request["pictures"]} == {(24, 16)}
        greys = [picture.getpixel((9, 9))[0] for picture in request["pictures"]]
        shown.append([round((grey - 20) / 4) for grey in greys])
    assert shown == [[0, 12, 24, 36], [12, 15, 18, 21], [40, 41], [0, 5, 10, 15]]
    assert [row["frames_dir"] for row in lines(meta)[3:]] == ["../frames"]


def test_from_a_film_to_a_training(tmp_path, server, monkeypatch, capsys):
    """prepare-clips → prepare-captions → cache-latents → train, as a person runs them."""
    pytest.importorskip("av")
    pictures = [films.shot(np.random.default_rng(seed), "pan", 36) for seed in (1, 2)]
    films.write([*pictures[0], *pictures[1]], tmp_path / "film.mp4")
    (tmp_path / "films").mkdir()
    meta = write_meta(
        tmp_path, [{"id": "film", "video_path": "film.mp4", "caption": ""}], "train_videos.jsonl"
    )
    clips, captioned = tmp_path / "clips", tmp_path / "captioned"
    lengths = ["--min_seconds", "0.5", "--max_seconds", "2"]
    assert prepare_clips.main(["--meta_jsonl", str(meta), "--out_dir", str(clips), *lengths]) == 0
    server.answer = lambda request: f"a thing that moves, seen {len(request['pictures'])} times"
    place = ["--meta_jsonl", str(clips / meta.name), "--out_dir", str(captioned)]
    assert prepare_captions.main([*place, "--server", server.address, "--model", "seer"]) == 0
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    size = ["video.fps=24", "video.num_frames=4", "train.batch_size=2", "train.max_steps=2"]
    start = ["--config", str(config), "--device", "cpu"]
    cache = tmp_path / "cache"
    source = ["--meta_jsonl", str(captioned / meta.name), "--out_dir", str(cache)]
    assert cache_vtp_latents.main([*start, *source, *size]) == 0
    store = open_cache(cache)
    assert sorted(store.ids) == ["film_000000", "film_000036"]
    assert set(store.captions) == {"a thing that moves, seen 8 times"}
    train_t2v.main([*start, "--train_cache_dir", str(cache), *size])
    assert (tmp_path / "runs" / "base" / "metrics.jsonl").is_file()


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────
def test_mistakes_are_refused_in_one_sentence(images, server, capsys, tmp_path):
    local = ["--meta_jsonl", str(images), "--out_dir", str(tmp_path / "out"), "--model"]
    for more, *expected in [
        (words(images, server, "--count", "3"), "would be the same", "--temperature"),
        (words(images, server, "--parallel", "0"), "--parallel: is 0"),
        (words(images, server, "--temperature=-1"), "must be at least 0"),
        (words(images, server, "--frames", "0"), "frames: is 0"),
        (words(images, server, "--prompts", " "), "prompts: one is empty"),
        (words(images, server, "--out_dir", str(images.parent)), "would be replaced"),
        ([*local, "seer"], "is no folder with a config.json", "--server"),
        ([*local, str(tmp_path)], "is no folder with a config.json"),
    ]:
        refused(capsys, prepare_captions.main, more, *expected)
    assert not server.requests
    with pytest.raises(ConfigError):
        CaptionSettings(("a",), count=0)


# ── a model in a folder ───────────────────────────────────────────────────────────────────────────
WORDS = "a the red blue ball cube moves to left right on of table dog cat runs in is small"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tiny_model(folder):
    """A LLaVA of random weights: a CLIP of two layers and a Llama of two, which know 19 words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    known = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **size)
    text = transformers.LlamaConfig(
        vocab_size=len(known), num_key_value_heads=2, pad_token_id=0, eos_token_id=2, **size
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    transformers.LlavaProcessor(
        pictures,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_in_a_folder_captions_pictures_and_clips(images, tmp_path, capsys):
    pytest.importorskip("av")
    model = tiny_model(tmp_path / "seer")
    more = ["--model", str(model), "--device", "cpu", "--max_tokens", "8", "--temperature", "1.5"]
    place = ["--meta_jsonl", str(images), "--out_dir", str(images.parent / "out")]
    assert prepare_captions.main([*place, *more, "--count", "2", "--prompts", "the red ball"]) == 0
    made = lines(images)
    assert [row["id"] for row in made] == ["red", "green", "blue", "grey"]
    assert made[0]["captioned_by"] == "seer" and len(made[0]["captions"]) == 2
    assert set(made[0]["caption"].split()) <= set(WORDS.split())
    # a function of seed, item and prompt
    (images.parent / "out" / NOTES).unlink()
    prepare_captions.main([*place, *more, "--count", "2", "--prompts", "the red ball"])
    assert lines(images) == made
    films.write(grey_frames(0, 24), tmp_path / "a.mp4")
    clip = {"id": "clip", "video_path": "a.mp4", "video_span": [2, 20], "caption": ""}
    meta = write_meta(tmp_path, [clip], "train_videos.jsonl")
    place = ["--meta_jsonl", str(meta), "--out_dir", str(tmp_path / "clips")]
    assert prepare_captions.main([*place, *more, "--frames", "3"]) == 0
    row = json.loads((tmp_path / "clips" / "train_videos.jsonl").read_text())
    assert set(row["caption"].split()) <= set(WORDS.split()) and row["video_span"] == [2, 20]


@pytest.mark.slow
def test_a_folder_that_would_run_code_or_lacks_weights_is_refused(images, tmp_path, capsys):
    model = tiny_model(tmp_path / "seer")
    words = ["--meta_jsonl", str(images), "--out_dir", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--model", str(model)]
    config = json.loads((model / "config.json").read_text())
    strange = config | {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (model / "config.json").write_text(json.dumps(strange))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = refused(capsys, prepare_captions.main, words, "code of its own, which is not run")
    assert "trust_remote_code" not in message
    assert not (tmp_path / "ran").exists()
    chosen = config | {"attn_implementation": "someone/kernels"}
    (model / "config.json").write_text(json.dumps(chosen))
    refused(capsys, prepare_captions.main, words, "chooses code to run")
    (model / "config.json").write_text(json.dumps(config))
    weights = torch.load  # pickles are not opened
    os.rename(model / "model.safetensors", tmp_path / "model.safetensors")
    torch.save({}, model / "pytorch_model.bin")
    refused(capsys, prepare_captions.main, words, "is no vision-language model")
    assert torch.load is weights


def test_a_full_disk_ends_the_captioning_at_once(images, server, capsys, monkeypatch):

    server.answer, append, noted = describe, caption_preparation._append, []

    def full(notes, row):
        if noted:
            raise OSError(errno.ENOSPC, "No space left on device")
        noted.append(row)
        append(notes, row)

    with monkeypatch.context() as patch:
        patch.setattr(caption_preparation, "_append", full)
        refused(
            capsys,
            prepare_captions.main,
            words(images, server, "--parallel", "1"),
            "No space left on device. Free disk space",
        )
    assert len(server.requests) <= 2 and lines(images) == [lines(images)[0]]
    assert prepare_captions.main(words(images, server)) == 0 and captions(images) == ALL
