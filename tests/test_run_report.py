"""One file about a run: everything is inside it, nothing in it is executed, and it says what has
become of the run."""

import fcntl
import json
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image

from mmdit.config import encode
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts import report
from mmdit.training.media import save_video
from mmdit.training.run_start import read_starts
from mmdit.training.trainer import Trainer
from mmdit.ui import run_report
from mmdit.ui.run_report import defaults
from mmdit.vtp_training.pretrain_loop import pretrain
from tests.helpers.tiny import Workshop, refused
from tests.test_vtp_train import CPU, configured

HOSTILE = "</pre><script>alert(1)</script><img src=http://x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    """`run(steps, **train)`: a run folder made by hand."""

    def make(steps, name="a run", **train):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train = {"max_steps": 300, "sample_prompts": [HOSTILE], **train}
        config = {**encode(ExperimentConfig("a")), "experiment_name": name}
        config["train"] = {**config["train"], **train}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [{"step": i, "loss_ema_100": 1 / i, "lr": 1e-4, "wall_s": i} for i in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture
def no_curves(monkeypatch):
    """Leave the drawing of curves to the tests whose fact they are: it takes most of a page's
    time."""
    monkeypatch.setattr(run_report, "curves_svg", lambda name, records: "")


def page_of(folder) -> Page:
    out = folder.parent / "report.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert out.stat().st_size <= 10e6
    page = Page(out.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    return page


def previews(folder, count, size, clip=0):
    for step in range(1, count + 1):
        place = folder / "samples" / f"step_{step:08d}"
        place.mkdir(parents=True)
        noise = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(place / "grid.png")
        if clip:
            save_video(torch.rand(clip, 3, 64, 64), place / "video.mp4", 8)


def test_everything_is_inside_and_words_stay_words(run):
    folder = run(range(1, 1_501), name="<b>$x_1$")
    previews(folder, 20, 120, clip=3)
    page = page_of(folder)
    assert HOSTILE in page.text and "<b>$x_1$" in page.text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 1 and tags.count("img") == 2 * 8 and "b" not in tags
    assert "step 20" in page.text and "step 1" in page.text and "12 previews" in page.text
    assert "train.max_steps: 1000 → 300" in page.text


@pytest.mark.thorough
def test_pictures_are_made_smaller_until_they_fit(run, no_curves, monkeypatch):
    folder = run(range(1, 4))
    previews(folder, 9, 400)  # a WebP of such noise takes 150 kB
    monkeypatch.setattr(run_report, "MEDIA_BYTES", 200_000)
    sources = [tag["src"] for name, tag in page_of(folder).tags if name == "img"]
    assert len(sources) == 8 and 50_000 < sum(map(len, sources)) < 200_000 * 4 / 3 + 8 * 40


def test_what_has_become_of_a_run(run, no_curves, capsys):
    assert "finished" in page_of(run(range(1, 301))).text
    folder = run(range(1, 9))
    assert "stopped: it goes on with --resume" in page_of(folder).text
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (folder / "metrics.jsonl").open("a") as torn:
            torn.write('{"step": 9, "lo')
        text = page_of(folder).text
        assert "running" in text and "step 8 of 300" in text
    (folder / "failures").mkdir()
    row = {"kind": "training", "step": 8, "error": "<i>the disk is full"}
    (folder / "failures" / "training_00000008_0.json").write_text(json.dumps(row))
    assert "failed: training, step 8: <i>the disk is full" in page_of(folder).text
    (folder / "metrics.jsonl").unlink()  # it failed before the first report
    assert "no metrics" in page_of(folder).text
    refused(capsys, report.main, [folder / "checkpoints"], "there is no run")


def test_a_training_leaves_what_a_report_tells(tmp_path, no_curves, monkeypatch):
    shop = Workshop(tmp_path)
    folder = shop.train("base", "train.sample_every_steps=2")
    shop.train("base", "--resume", "train.max_steps=4")
    starts = read_starts(folder)
    assert [start["step"] for start in starts] == [0, 3] and starts[0]["device"] == "CPU"
    assert starts[0]["torch"] == torch.__version__ and "8 items" in starts[0]["data"]
    text = page_of(folder).text
    assert torch.__version__ in text and str(starts[0]["commit"]) in text and "8 items" in text
    assert "tokenizer.latent_d" in text and "model.shift" not in text

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "optimizer_step", full)
    with pytest.raises(SystemExit):
        shop.train("base", "--resume", "train.max_steps=6")
    assert "failed: training, step 4: [Errno 28] No space left" in page_of(folder).text


def test_a_training_of_a_tokenizer_is_told_too(tmp_path):
    steps = {"max_steps": 3, "log_every_steps": 1, "eval_every_steps": 2}
    pretrain(configured(tmp_path / "vtp", **steps), CPU)
    page = page_of(tmp_path / "vtp")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 1 and tags.count("img") == 2, "two sheets of reconstructions"
    for words in ("losses of a tokenizer", "PSNR of held-out", "PSNR of training pictures"):
        assert words in page.text
    assert "generated pictures of 32x32" in page.text and torch.__version__ in page.text
    assert "train.max_steps: " in page.text and "flow_matching" not in page.text


def test_every_reward_and_source_has_a_curve_and_many_starts_stay_short(run):
    folder = run([])
    row = {"reward_aesthetic": 0.5, "reward_aesthetic_std": 1, "val_loss/mine": 2}
    lines = [json.dumps({"step": i, **row}) + "\n" for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    starts = [json.dumps({"step": i, "data": "d"}) + "\n" for i in range(400)]
    (folder / "starts.jsonl").write_text("".join(starts))
    page = page_of(folder)
    assert "reward_aesthetic" in page.text and "val_loss/mine" in page.text
    assert "aesthetic_std" not in page.text
    assert [tag for tag, _ in page.tags].count("tr") == 51 and "350 earlier ones" in page.text


def test_a_difference_is_from_the_defaults_of_the_chosen_types():
    config = encode(ExperimentConfig("a"))
    stored = {**config, "tokenizer": {"type": "dummy", "latent_d": 8}}
    assert defaults(stored)["tokenizer"]["type"] == "dummy"
    assert defaults(config) == config
    assert defaults({"tokenizer": {"type": "no such"}})["train"] == config["train"]
