"""What commands print: any letters into any file or pipe, and no letter of a stranger's file
that commands the terminal."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from mmdit.scripts import inspect_data, inspect_weights, prepare_moving_shapes, train_t2v
from mmdit.terminal import PlainStream, install, message_of, plain, shown
from tests.helpers import warm
from tests.helpers.tiny import Workshop, refused

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path for path in (ROOT / "mmdit/scripts").glob("*.py") if "__main__" in path.read_text()
)
ATTACK = "\x1b]0;title\x07\x1b[2J\x9d52;c;AAAA\x9c\u202egnp.\u2066\x7f\u2028"
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]"
)


def test_control_characters_are_shown_and_letters_of_every_script_stay():
    assert plain("a\x1b[31m\x9b\u202e") == "a\\x1b[31m\\x9b\\u202e"
    for text in ("猫 → ü … 𝕏 👩\u200d🚀", "two\nlines\tand a tab"):
        assert plain(text) == text
    assert shown("a\nb\tc\rd") == "a\\nb\\tc\\x0dd"


def test_closed_streams_lead_nowhere_and_give_their_numbers_to_no_file(tmp_path):
    """As a job has them that was started with `>&- 2>&-`."""
    child = os.fork()
    if not child:
        try:
            os.closerange(0, 3)
            sys.stdin = sys.stdout = sys.stderr = None
            install()
            for _ in tqdm(range(2)):  # which needs a stream
                print("said", file=sys.stderr)
            handle = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
            os._exit(0 if handle > 2 and sys.stdin.read() == "" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "latin-1", "ascii"])
def test_a_stream_takes_any_text_in_its_encoding(encoding):
    file = io.BytesIO()
    stream = PlainStream(io.TextIOWrapper(file, encoding=encoding))
    text = "4.0 → 64.0, 猫, half a pair \ud83d, Fahrrad für 5 €\n"
    assert print(text, file=stream, flush=True) is None
    written = file.getvalue().decode(encoding)
    kept = text.encode(encoding, "backslashreplace").decode(encoding)
    assert written == kept + "\n" and "64.0" in written


def test_progress_bars_are_drawn_as_ever():
    bars = [io.StringIO(), io.StringIO()]
    for stream in (bars[0], PlainStream(bars[1])):
        with tqdm(total=2, file=stream, mininterval=0, bar_format="{desc} {n_fmt}") as outer:
            outer.set_description("outer")
            for _ in tqdm(range(2), file=stream, leave=False, mininterval=0, bar_format="{n_fmt}"):
                outer.update()
    assert bars[0].getvalue() == bars[1].getvalue() and "\x1b[A" in bars[0].getvalue()


def test_names_in_files_of_others_command_no_terminal(tmp_path, capsys):
    """A tensor's name, the keys of a config, a line and an id of metadata, a path, an option's
    value."""
    save_file({f"w{ATTACK}\nforged": torch.zeros(2)}, tmp_path / "w.safetensors")
    inspect_weights.main([str(tmp_path / "w.safetensors")])
    inspect_weights.main([str(tmp_path / "w.safetensors"), "--json"])
    said = capsys.readouterr().out
    assert "w\\x1b]0;title" in said and not HARMFUL.search(said) and "\nforged" not in said

    shop = Workshop(tmp_path)
    Image.new("RGB", (48, 32)).save(tmp_path / "p.png")
    rows = [
        {"id": "a\u202e\x85b", "image_path": "p.png", "caption": ATTACK, ATTACK: 1},
        {"id": "b", "image_path": f"p{ATTACK}.png", "caption": "x"},
    ]
    meta = tmp_path / "m.jsonl"
    meta.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--config", str(shop.config), "--meta_jsonl", str(meta), "--num_workers", "0"]
    inspect_data.main(words)
    captured = capsys.readouterr()
    assert not HARMFUL.search(captured.out) and not HARMFUL.search(captured.err.replace("\r", ""))

    shop.config.write_text(shop.config.read_text() + f'"{json.dumps(ATTACK)[1:-1]}": 1\n')
    message = refused(capsys, train_t2v.main, ["--config", shop.config, "--train_cache_dir", "x"])
    assert "unknown key" in message and not HARMFUL.search(message)


def test_every_command_begins_in_the_one_place_that_makes_its_output_plain():
    assert len(SCRIPTS) > 20
    for path in SCRIPTS:
        assert path.read_text().rstrip().endswith('if __name__ == "__main__":\n    run(main)'), path


def test_a_command_writes_into_a_legacy_pipe(tmp_path):
    """What Windows does when output is redirected; the message of the error holds a letter that
    cp1252 lacks."""
    command = ["-m", "mmdit.scripts.prepare_moving_shapes"]
    words = ["--out_dir", tmp_path / "→", "--count", "2", "--width", "32", "--height", "32"]
    done = warm.run(*command, *words, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and "\\u2192" in done.stdout, done.stderr
    words = ["--out_dir", tmp_path, "--split", "\x1b[2J→"]
    done = warm.run(*command, *words, PYTHONIOENCODING="cp1252")
    assert done.returncode == 2 and "invalid choice" in done.stderr and "\x1b" not in done.stderr


def test_a_mistake_in_a_recipe_is_one_message(capsys, tmp_path):
    refused(capsys, prepare_moving_shapes.main, ["--out_dir", tmp_path, "--width", "7"], "7")


def test_letters_that_the_locale_lacks_are_told_with_what_helps(monkeypatch):
    error = UnicodeEncodeError("utf-8", "\udce7", 0, 1, "surrogates not allowed")
    assert "surrogates" in message_of(error)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert "this locale, of ascii," in message_of(error) and "PYTHONUTF8=1" in message_of(error)
