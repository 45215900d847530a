"""Models that are sent to the hub and fetched from it, with the real huggingface_hub and a
stand-in for its server: what is sent, what is refused, what is taken, and that tokens stay where
they are."""

import json
import logging
import os
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402
from huggingface_hub import file_download as downloads  # noqa: E402

from mmdit.commands.export_card import card_path  # noqa: E402
from mmdit.commands.hub import explain_hub_errors  # noqa: E402
from mmdit.commands.pull import is_read, uses_of  # noqa: E402
from mmdit.commands.push import front_matter  # noqa: E402
from mmdit.files import lock  # noqa: E402
from mmdit.scripts import evaluate, export, pull, push, sample, train_t2v  # noqa: E402
from tests.helpers.hub_server import TOKEN, running_hub  # noqa: E402
from tests.helpers.tiny import Workshop, refused  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CARD = b"---\nlicense: mit\n---\n# x\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    shop = Workshop(tmp_path_factory.mktemp("hub"))
    run = shop.train("base", "train.max_steps=1", "train.sample_every_steps=1")
    out = shop.folder / "out/model.safetensors"
    export.main(["--checkpoint", str(run), "--out", str(out), "card.license=mit"])
    return shop


@pytest.fixture
def model(shop, tmp_path):
    """A file with its card and pictures, to be changed by a test."""
    shutil.copytree(shop.folder / "out", tmp_path / "out")
    return tmp_path / "out/model.safetensors"


@pytest.fixture
def hub(monkeypatch):
    """A server, which the client takes for the hub, and a login."""
    with running_hub() as server:
        place = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + place)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
        yield server


def sent(server, name) -> dict[str, bytes]:
    return server.repositories[name].at("main")[1]


def test_a_model_is_sent_fetched_and_used(hub, shop, model, tmp_path, capsys):
    assert push.main([str(model), "me/shapes"]) == 0
    said = capsys.readouterr().out
    assert "me/shapes (private)" in said and "model.safetensors" in said and "licence: mit" in said
    assert hub.repositories["me/shapes"].private
    files = sent(hub, "me/shapes")
    assert files["model.safetensors"] == model.read_bytes()
    assert files["README.md"] == card_path(model).read_bytes()
    assert {"model-curves.png", "model-samples.webp"} <= files.keys()

    out = tmp_path / "got"
    assert pull.main(["me/shapes", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert hub.repositories["me/shapes"].head in said and ".gitattributes" in said
    got = {path.name: path.read_bytes() for path in out.iterdir()}
    assert got == {name: data for name, data in files.items() if name != ".gitattributes"}
    command = next(line for line in said.splitlines() if line.startswith("next: mmdit sample"))
    assert f"--checkpoint {out}/model.safetensors" in command
    words = command.removeprefix("next: mmdit sample ").replace("'a prompt'", "star").split()
    assert sample.main([*words[:-1], str(tmp_path / "samples"), "--device", "cpu"]) == 0
    words = ["--checkpoint", str(out / "model.safetensors"), "--device", "cpu", "--count", "2"]
    assert evaluate.main(words) == 0
    start = f"train.init_from={out}/model.safetensors"
    assert train_t2v.main(shop.train_words("again", start, "train.max_steps=1")) == 0

    hub.requests.clear()
    assert pull.main(["me/shapes", "--out", str(out)]) == 0  # all is there: nothing comes again
    assert "4 files were there already" in capsys.readouterr().out
    assert not [path for _, path, *_ in hub.requests if "/resolve/" in path]


def test_pictures_that_an_earlier_export_left_are_not_sent(hub, shop, model, capsys):
    """Export a run without previews by the name that one with previews had."""
    run = shop.train("plain", "train.max_steps=1")
    assert model.with_name("model-samples.webp").is_file()
    export.main(["--checkpoint", str(run), "--out", str(model), "card.license=mit"])
    assert push.main([str(model), "me/plain"]) == 0
    assert "model-curves.png" in sent(hub, "me/plain")
    assert "model-samples.webp" not in sent(hub, "me/plain")


def test_the_page_about_sharing_can_be_typed(hub, shop, tmp_path, monkeypatch):
    """Its first block, as it stands, in a folder with the run that it names."""
    shutil.copytree(shop.folder / "runs/base", tmp_path / "runs/my_run")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
    block = page.split("```bash\n")[1].split("```")[0]
    commands = {"export": export, "push": push, "pull": pull, "sample": sample}
    typed = [shlex.split(line)[1:] for line in block.splitlines()]
    for name, *words in typed:
        assert commands[name].main(words) == 0
    assert [name for name, *_ in typed] == ["export", "push", "push", "pull", "sample"]
    assert hub.repositories["OWNER/NAME"].private
    assert (tmp_path / "samples/0000.png").is_file()


@pytest.mark.slow
def test_it_goes_on_by_the_variable_and_the_commands_that_people_use(hub, model, tmp_path):
    """In processes of their own, where HF_ENDPOINT names the server."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'VTP'}"
    for words in (["push", "out", "me/x", "--public"], ["pull", "me/x", "--out", "got"]):
        if words[0] == "push":
            (tmp_path / "out/model.md").rename(tmp_path / "out/README.md")
        done = subprocess.run(
            [sys.executable, "-m", "mmdit", *words],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert not hub.repositories["me/x"].private
    assert (tmp_path / "got/model.safetensors").read_bytes() == model.read_bytes()


def test_what_is_public_is_asked_for(hub, model, capsys):
    hub.public("me/open", {"README.md": CARD})
    refused(capsys, push.main, [model, "me/open"], "me/open is public", "--public")
    assert sent(hub, "me/open") == {"README.md": CARD}
    assert push.main([str(model), "me/open", "--public"]) == 0
    assert "model.safetensors" in sent(hub, "me/open")
    hub.public("me/closed", {"README.md": CARD}).private = True
    refused(capsys, push.main, [model, "me/closed", "--public"], "me/closed is private")
    assert sent(hub, "me/closed") == {"README.md": CARD}


def test_a_look_sends_nothing(hub, model, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push.main([str(model), "me/x", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "README.md  (from model.md)" in said and "nothing is sent" in said
    assert hub.requests == []


def png_that_says(path: Path, text: str) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add_itxt("mmdit", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=facts)


def png_that_says_last(path: Path, text: str) -> None:
    """Write a text behind the pixels, as other programs do."""
    Image.new("RGB", (4, 4)).save(path)
    said = b"tEXt" + f"Comment\0{text}".encode()
    chunk = struct.pack(">I", len(said) - 4) + said + struct.pack(">I", zlib.crc32(said))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])


def weights_that_say(path: Path, config: dict, **more) -> None:
    text = json.dumps({"config": config})
    save_file({"x": torch.zeros(1), **more}, path, {"mmdit": text})


@pytest.mark.parametrize(
    "name, make, expected",
    [
        ("w.pt", lambda path: torch.save({}, path), "is a pickle, which may run code"),
        ("pytorch_model.bin", lambda path: path.touch(), "is a pickle"),
        ("optimizer.safetensors", lambda path: path.touch(), "state of its training"),
        ("step_1/checkpoint.json", lambda path: path.touch(), "state of its training"),
        ("manifest.json", lambda path: path.write_text("{}"), "of a cache"),
        ("train.jsonl", lambda path: path.touch(), "data set"),
        ("run.py", lambda path: path.touch(), "none of the files that a model consists of"),
        ("notes.txt", lambda path: path.write_text(f"key {TOKEN}"), "token"),
        ("notes.md", lambda path: path.write_text("see /home/jane/runs/a"), "/home/jane/runs/a"),
        ("a.json", lambda path: path.write_text('{"x": "/scratch/me/a b"}'), "/scratch/me/a"),
        ("b.yaml", lambda path: path.write_text("x: C:\\Users\\jane\\y"), "C:\\Users\\jane\\y"),
        ("c.png", lambda path: png_that_says(path, "--out /home/jane/x"), "/home/jane/x"),
        ("d.webp", lambda path: path.write_bytes(b"no picture"), "cannot be read"),
        ("e.txt", lambda path: path.write_text("the word Correct-Horse-Battery"), "secret"),
        (
            "f.safetensors",
            lambda path: weights_that_say(path, {"tokenizer": {"name_or_path": "~/vtp"}}),
            "tokenizer.name_or_path = ~/vtp, which others do not have: export it with tokenizer.",
        ),
        ("g.safetensors", lambda path: path.write_bytes(b"\x80\x02 pickle"), "cannot be read"),
        ("i.txt", lambda path: path.write_text(TOKEN, encoding="utf-16"), "is no text in UTF-8"),
        ("j.png", lambda path: png_that_says_last(path, "/home/jane/x"), "/home/jane/x"),
        (
            "h.safetensors",
            lambda path: weights_that_say(path, {}, **{"q.exp_avg": torch.zeros(1)}),
            "state of an optimizer",
        ),
    ],
)
def test_what_is_not_sent(hub, tmp_path, capsys, monkeypatch, name, make, expected):
    monkeypatch.setenv("SOME_API_KEY", "Correct-Horse-Battery")
    folder = tmp_path / "out"
    (folder / name).parent.mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    make(folder / name)
    said = refused(capsys, push.main, [folder, "me/x"], "nothing is sent", name, expected)
    assert TOKEN not in said and "Correct-Horse" not in said
    assert hub.requests == []


def test_a_card_with_a_licence_is_needed_and_links_are_not_followed(hub, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    weights_that_say(folder / "x.safetensors", {})
    refused(capsys, push.main, [folder, "me/x"], "has no model card", "README.md")
    refused(capsys, push.main, [folder / "x.safetensors", "me/x"], "has no model card", "x.md")
    (folder / "README.md").write_text("# x\n")
    refused(capsys, push.main, [folder, "me/x"], "states no licence", "card.license=NAME")
    (folder / "README.md").write_text("---\n: [\n---\n# x\n")
    refused(capsys, push.main, [folder, "me/x"], "no YAML")
    (folder / "README.md").write_text("# x\nIts licence is not stated.\n")
    (folder / ".env").write_text(TOKEN)
    assert push.main([str(folder), "me/x", "--dry_run"]) == 0
    assert "left out, for they are hidden: .env" in capsys.readouterr().out
    (folder / "y.txt").symlink_to(tmp_path)
    refused(capsys, push.main, [folder, "me/x"], "y.txt is a link")
    refused(capsys, push.main, [tmp_path / "gone", "me/x"], "is not there")
    (tmp_path / "x.pt").touch()
    refused(capsys, push.main, [tmp_path / "x.pt", "me/x"], "is a pickle")
    refused(capsys, push.main, [folder, "x"], "must be OWNER/NAME")
    assert hub.requests == []


def test_only_what_mmdit_reads_is_taken_and_names_lead_nowhere(hub, tmp_path, capsys):
    hostile = ["../out.json", "/etc/x.json", "a/../../b.txt", ".git/config.yaml", "c\\d.json"]
    others = ["model.py", "w.bin", "x.safetensors.exe", "e:f.json", "g\x1b[2J.json"]
    wanted = ["README.md", "sub/config.json"]
    hub.public("me/x", dict.fromkeys([*hostile, *others, *wanted], CARD))
    out = tmp_path / "deep/out"
    assert pull.main(["me/x", "--out", str(out)]) == 0
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert there == {"deep", "deep/out", *(f"deep/out/{name}" for name in wanted), "deep/out/sub"}
    told = capsys.readouterr().out
    assert "\x1b" not in told and "no weights come: " in told
    assert not any(map(is_read, [*hostile, *others])) and all(map(is_read, wanted))
    hub.public("me/y", {"a.py": b""})
    refused(capsys, pull.main, ["me/x", "--out", out / "README.md"], "is a file, but a folder")
    refused(capsys, pull.main, ["me/y", "--out", out], "none of the files that mmdit reads")


def test_a_revision_is_pinned_and_files_here_are_not_replaced_unasked(hub, tmp_path, capsys):
    repository, out = hub.public("me/x", {"a.txt": b"first"}), tmp_path / "x"
    first = repository.head
    repository.commit({"a.txt": b"second"})
    assert pull.main(["me/x", "--out", str(out), "--revision", first]) == 0
    assert (out / "a.txt").read_bytes() == b"first" and first in capsys.readouterr().out
    refused(capsys, pull.main, ["me/x", "--out", out], "1 files of other content (a.txt)")
    assert (out / "a.txt").read_bytes() == b"first"
    assert pull.main(["me/x", "--out", str(out), "--replace"]) == 0
    assert (out / "a.txt").read_bytes() == b"second"
    refused(capsys, pull.main, ["me/x", "--out", out, "--revision", "no"], "no such revision")
    (tmp_path / "link").symlink_to(out)
    refused(capsys, pull.main, ["me/x", "--out", tmp_path / "link"], "is a link")


def test_weights_of_another_revision_are_named_and_are_no_part_of_what_came(hub, tmp_path, capsys):
    """An index that stays has shards that stay read in place of the one file of a newer commit."""
    lora = tmp_path / "lora.safetensors"
    save_file({"blocks.0.q.lora_A.weight": torch.zeros(1)}, lora)
    shards = ["w-00001-of-00002.safetensors", "w-00002-of-00002.safetensors"]
    repository = hub.public("me/x", dict.fromkeys([*shards, "w.safetensors.index.json"], b"{}"))
    repository.commits[repository.head] = {"w.safetensors": lora.read_bytes(), "a.json": b"{}"}
    for name in (*shards, "w.safetensors.index.json", "mine.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(lora.read_bytes())
    assert pull.main(["me/x", "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    assert f"3 files of weights there are not of this commit: {', '.join(shards)}, w.saf" in said
    assert "mine.json" not in said and "next: mmdit sample" in said
    commands = said[said.index("next:") :]
    assert "x/w.safetensors" in commands and shards[0] not in commands
    assert pull.main(["me/x", "--out", str(tmp_path / "y")]) == 0
    assert "not of this commit" not in capsys.readouterr().out


def test_what_stands_in_the_way_is_named_and_nothing_is_fetched(hub, tmp_path, capsys):
    hub.public("me/x", {"a.txt": b"x", "b.txt/c.json": b"{}"})
    (tmp_path / "one/a.txt").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/b.txt").write_text("mine")
    for name, expected in (("one", "a.txt is a folder"), ("two", "b.txt is a file")):
        before = sorted(tmp_path.rglob("*"))
        words = ["me/x", "--out", tmp_path / name, "--replace"]
        refused(capsys, pull.main, words, expected, "remove it")
        assert sorted(tmp_path.rglob("*")) == before


def test_a_model_whose_card_cannot_be_read_is_fetched(hub, tmp_path):
    hub.public("me/x", {"README.md": b"---\n: [\n---\n", "a.json": b"{}"})
    assert pull.main(["me/x", "--out", str(tmp_path / "x")]) == 0


def test_the_head_of_a_card_is_read_and_not_computed(tmp_path, capsys):
    """A number to the base of 60 takes minutes, and brackets in brackets all of the stack."""
    sixty = ":".join(["1"] * 50_000)
    rows = ["license: mit", f"a: {sixty}", "base_model: a/b", "c: 2001-99-99", "? [d]", ": e"]
    rows += ["f: &f [x, x]", "g: [*f, *f]", "h: !!str {i: j}"]
    card = "\n".join(["---", *rows, "---", ""])
    assert front_matter(card) == {"license": "mit", "base_model": "a/b"}
    deep = f"---\na: {'[' * 600}{']' * 600}\n---\n"
    with pytest.raises(ValueError, match="no YAML: maximum recursion"):
        front_matter(deep)
    with pytest.raises(ValueError, match="more than 262144 letters"):
        front_matter(f"---\na: {'x' * 300_000}\n---\n")
    save_file({"blocks.0.q.lora_A.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "README.md").write_text(deep)
    assert "--checkpoint BASE" in uses_of(tmp_path)[0]
    refused(capsys, push.main, [tmp_path, "me/x"], "the head of the card is no YAML")


def test_a_file_that_is_not_what_the_hub_says_does_not_stay(hub, tmp_path, capsys):
    hub.public("me/x", {"a.safetensors": b"x" * 100, "b.txt": b"fine"})
    for hub.damaged in ("a.safetensors", "b.txt"):
        out = tmp_path / hub.damaged
        refused(capsys, pull.main, ["me/x", "--out", out], hub.damaged, "another check sum")
        assert not (out / hub.damaged).exists()


def test_a_download_that_broke_off_goes_on(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # as it reaches the disk
    data = bytes(range(256)) * 200
    hub.public("me/x", {"a.safetensors": data})
    hub.broken_after = 20_000
    words = ["me/x", "--out", tmp_path / "x"]
    refused(capsys, pull.main, words, "answered with status 503")
    assert not (tmp_path / "x/a.safetensors").exists()
    hub.broken_after = 0
    hub.requests.clear()
    assert pull.main(list(map(str, words))) == 0
    assert (tmp_path / "x/a.safetensors").read_bytes() == data
    ranges = [asked for *_, asked in hub.requests if asked]
    assert ranges == ["bytes=20000-"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.safetensors"]


def test_what_another_call_fetches_into_the_folder_stays(hub, tmp_path):
    hub.public("me/x", {"a.txt": b"x"})
    fetched, left = (tmp_path / f".pulling-{name}.part" for name in ("fetched", "left"))
    left.write_bytes(b"half")
    with fetched.open("ab") as file:
        lock(file)
        assert pull.main(["me/x", "--out", str(tmp_path)]) == 0
    assert fetched.exists() and not left.exists()


def test_the_token_stays_where_it_is(hub, model, tmp_path, capsys, caplog, monkeypatch):
    """It goes to the hub, and into no message, log or file."""
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    with caplog.at_level(logging.DEBUG):
        push.main([str(model), "me/x"])
        pull.main(["me/x", "--out", str(tmp_path / "x")])
        said = refused(capsys, push.main, [model, "others/x"], "your login may not do this", "403")
    asked = {path: authorization for _, path, authorization, _ in hub.requests}
    assert {asked[path] for path in asked if "me/x" in path} == {f"Bearer {TOKEN}"}
    elsewhere = [asked[path] for path in asked if path.startswith("/storage/")]
    assert len(elsewhere) == 3 and not any(elsewhere)
    client = huggingface_hub.HfApi()
    unreached = pytest.raises(ValueError, match="was not reached")
    with unreached as stop, explain_hub_errors(client, "me/x"):
        raise RuntimeError(f"{TOKEN} was sent")
    said += str(stop.value)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything = [said, caplog.text, *map(str, capsys.readouterr()), str(written)]
    assert not any(TOKEN in text for text in everything)


def test_what_is_missing_is_one_sentence(hub, model, capsys, monkeypatch, tmp_path):
    refused(capsys, pull.main, ["me/none"], "there is no me/none", "private")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(capsys, push.main, [model, "me/x"], "needs a login", "hf auth login", "HF_TOKEN")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(capsys, pull.main, ["me/x"], "http://127.0.0.1:9 was not reached")
    monkeypatch.setattr(constants, "ENDPOINT", "http://jane:pass-of-jane@127.0.0.1:9")
    for main, words in ((pull.main, ["me/x"]), (push.main, [model, "me/x"])):
        assert "pass-of-jane" not in refused(capsys, main, words, "127.0.0.1:9 was not reached")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(capsys, pull.main, ["me/x"], "pip install 'mmdit[hf]'")


def test_what_was_fetched_is_known_again(tmp_path):
    save_file({"blocks.0.q.lora_A.weight": torch.zeros(1)}, tmp_path / "a b.safetensors")
    (tmp_path / "README.md").write_text("---\nbase_model: Wan-AI/Wan2.1-T2V-1.3B\n---\n")
    first, second = uses_of(tmp_path)
    assert first.startswith("mmdit sample --checkpoint Wan2.1-T2V-1.3B --lora ")
    assert f"train.init_from='{tmp_path}/a b.safetensors'" in second
    card = "---\nbase_model: Wan-AI/Wan2.2-T2V-A14B\n---\n"
    for more, name in (("", "a_low_noise"), ("for the low-noise expert of x", "a b")):
        (tmp_path / "README.md").write_text(card + more)
        next(tmp_path.glob("*.safetensors")).rename(tmp_path / f"{name}.safetensors")
        first, second = uses_of(tmp_path)
        assert " --lora_low " in first and second.endswith("lora.enabled=true model.expert=low")
    (tmp_path / "README.md").write_text("---\nbase_model: Wan-AI/Wan2.1-T2V-1.3B\n---\n")
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert uses_of(tmp_path)[0].endswith(f"model.name_or_path={tmp_path}")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "transformer/config.json")
    drawn, trained = uses_of(tmp_path)  # a whole release, in the layout of Diffusers
    assert drawn.startswith(f"mmdit sample --checkpoint {tmp_path} --prompts 'a prompt'")
    assert trained.endswith(f"model.name_or_path={tmp_path}")
    (tmp_path / "adapter_config.json").write_text("{}")  # its weights were left out: a pickle
    assert uses_of(tmp_path) == [drawn, trained]
    row = {"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16}
    (tmp_path / "transformer/config.json").write_text(json.dumps(row))
    assert "'a prompt' --image first.png --out samples" in uses_of(tmp_path)[0]
    (tmp_path / "transformer/config.json").write_text(json.dumps(row | {"in_channels": []}))
    assert len(uses_of(tmp_path)) == 2
    (tmp_path / "transformer/config.json").unlink()
    (tmp_path / "config.json").write_text("[" * 100_000)
    weights_that_say(tmp_path / "c.safetensors", {"model": 7, "tokenizer": {"name_or_path": []}})
    (tmp_path / "d.safetensors").write_bytes(b"broken")
    assert len(uses_of(tmp_path)) == 4
