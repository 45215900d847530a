"""The model card beside an export: what the hub reads of it, what a person reads, whose commands
run, what it must not say, and whose pages it leaves alone."""

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mmdit import privacy
from mmdit.commands import export_card
from mmdit.commands.card_scores import score_rows, score_tables
from mmdit.commands.card_text import escaped, fenced
from mmdit.commands.export_card import card_path, is_ours, write_card
from mmdit.commands.exported import (
    Exported,
    commands_for,
    needed_places,
    places_here,
    uses_elsewhere,
)
from mmdit.commands.push import Push
from mmdit.config import encode
from mmdit.diagnostics.curves import NOT_ABOUT_THE_MODEL, PANELS, curves_svg, learning_curves
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.scripts import evaluate, export, sample, train_t2v
from mmdit.training.checkpoint import latest, load_weights
from tests.helpers.thorough import thorough
from tests.helpers.tiny import Workshop, refused

HOSTILE = (
    "</details></pre><script>alert(1)</script> ![x](http://x/y.png) [z](javascript:q) ```\n# h"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Runs of somebody called jane, whose home folder holds everything."""
    home = tmp_path_factory.mktemp("home") / "jane"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("HF_TOKEN", "hf_" + "s3cr3t" * 6)
        shop = Workshop(home)
        run = shop.train("base", "train.sample_every_steps=2", f"train.init_from={_start(shop)}")
        words = ["--checkpoint", str(run), "--device", "cpu", "--count", "2"]
        evaluate.main([*words, "--out", str(run / "scores.json")])
        yield shop


def _start(shop):
    return shop.train("start", "train.max_steps=1")


def front_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def write(run, out, *words) -> str:
    assert export.main(["--checkpoint", str(run), "--out", str(out), *words]) == 0
    return card_path(out).read_text(encoding="utf-8")


def test_a_card_has_what_the_hub_reads_and_its_commands_run(shop, tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    out = tmp_path / "my model.safetensors"
    words = ["card.license=mit", "card.data=eight moving shapes", "card.datasets=[me/shapes]"]
    text = write(shop.folder / "runs/base", out, *words)
    assert f"its card is {tmp_path / 'my model.md'}" in capsys.readouterr().out
    data = hub.ModelCard(text).data
    assert (data.license, data.library_name) == ("mit", "mmdit")
    assert data.pipeline_tag == "text-to-image" and data.datasets == ["me/shapes"]
    assert data.tags == ["mmdit", "text-to-image", "flow-matching"]
    for file in ("my model-curves.png", "my model-samples.webp"):
        assert Image.open(tmp_path / file).width > 100
        assert f"({file.replace(' ', '%20')})" in text
    assert "a large red star on a navy background" in text and "eight moving shapes" in text
    assert "prompt accuracy | 0." in text and "of 2 |" in text and "held out accuracy" in text
    assert "its training began from start" in text.lower() and "8 items" in text
    assert yaml.safe_load(blocks_of(text, "yaml")[0])["card"]["license"] == "mit"

    use, made = (shlex.split(block, comments=True) for block in blocks_of(text, "bash"))
    assert (
        "average of its weights" in text
        and made[:2] == ["mmdit", "train"]
        and made[made.index("export") - 1] == "mmdit"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(shop.config.read_text().replace(str(shop.folder), "."))
    end = use.index("mmdit", 1)
    assert sample.main([*use[2:end], "--device", "cpu"]) == 0
    train = [word.replace("CACHE", str(shop.cache("pictures"))) for word in use[end + 2 :]]
    assert train_t2v.main([*train, "--device", "cpu", "train.max_steps=1"]) == 0


def test_neither_card_nor_file_says_where_things_lie_or_who_wrote_them(shop, tmp_path):
    out = tmp_path / "model.safetensors"
    write(shop.folder / "runs/base", out)
    meta = load_weights(out).meta
    assert meta.config["output_dir"] == "runs" and meta.config["train"]["init_from"] == "start"
    assert list(privacy.local_values(meta.config)) == [] and meta.origin.keys() <= {"crc32"}
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert b"jane" not in data and b"s3cr3t" not in data and b"/tmp" not in data, path
        assert str(shop.folder).encode() not in data and str(tmp_path).encode() not in data
    text = card_path(out).read_text()
    assert privacy.private_parts(text, privacy.secrets()) == []
    assert "mmdit train --config tiny.yaml --train_cache_dir pictures" in text
    assert "train.init_from=start" in text and "is not stated. Ask their author" in text
    assert "license" not in front_of(text)


def test_words_that_begin_like_a_path_are_exported_as_they_are():
    """Keep, for example, a separator `/` between a trigger word and the caption."""
    config = encode(ExperimentConfig("x"))
    for key in privacy.WORDS:
        section, name = key.split(".")
        several = isinstance(config[section][name], list)
        config[section][name] = ["/a b", "~c"] if several else "/"
    assert privacy.portable_config(config) == config
    assert list(privacy.local_values(config)) == []


def test_a_place_that_loading_needs_stays_and_is_told(shop, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    words = ["--checkpoint", str(shop.folder / "runs/base"), "--out", str(out)]
    vtp = {"tokenizer": {"type": "vtp", "name_or_path": f"{shop.folder}/vtp"}}
    others = {
        "train": {"init_from": f"{shop.folder}/runs/a"},
        "data": {"sources": [{"path": "/c/d"}]},
    }
    portable = privacy.portable_config(vtp | others, privacy.NEEDED)
    assert portable["tokenizer"]["name_or_path"] == "~/vtp"
    assert portable["train"]["init_from"] == "a" and portable["data"]["sources"][0]["path"] == "d"
    assert list(privacy.local_values(portable)) == [("tokenizer.name_or_path", "~/vtp")]
    refused(capsys, export.main, [*words, "model.depth=3"], "model.depth=3", "card.…")
    refused(capsys, export.main, [*words, "card.license=My Own"], "'My Own'", "apache-2.0")
    refused(capsys, export.main, [*words, "card.datasets=['a/b/c']"], "'a/b/c'", "owner/name")


def test_a_relative_place_that_only_this_machine_has_is_told_too(tmp_path, monkeypatch):
    """A tokenizer of one's own, and its statistics; not what ships, nor a name on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "stats.json").write_text("{}")
    tokenizer = {"name_or_path": "runs/mine", "latent_stats": "stats.json"}
    config = {"tokenizer": tokenizer, "text_encoder": {"name_or_path": "google/t5-v1_1-base"}}
    assert dict(places_here(config)) == {f"tokenizer.{key}": it for key, it in tokenizer.items()}
    words = ["tokenizer.name_or_path=runs/mine", "tokenizer.latent_stats=stats.json"]
    words.insert(1, "text_encoder.name_or_path=google/t5-v1_1-base")
    assert sorted(needed_places(config)) == sorted(words)
    ships = {"name_or_path": "VTP/checkpoints/vtp_tiny_f16d64", "latent_stats": "auto"}
    assert not dict(places_here({"tokenizer": ships})) and not needed_places({"tokenizer": ships})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_hostile_words_stay_words(tmp_path):
    """Names, captions and what was stated, in a page as a renderer of Markdown with HTML shows
    it."""
    markdown_it = pytest.importorskip("markdown_it")
    run = tmp_path / "a](b) <i>"
    preview = run / "samples/step_00000002"
    (run / "checkpoints/step_00000002").mkdir(parents=True)
    preview.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(preview / "grid.png")
    config = encode(ExperimentConfig("x")) | {"experiment_name": run.name}
    config["train"] = config["train"] | {"sample_prompts": [HOSTILE, "1. one | two", "- x"]}
    config["card"] = {"data": HOSTILE, "data_license": "a | b", "base_model": "me/base"}
    config["lora"] = config["lora"] | {"enabled": True, "type": "lora"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "starts.jsonl").write_text(json.dumps({"data": HOSTILE, "device": HOSTILE}) + "\n")
    report = {"settings": {}, "checkpoint": "", "machine": {"device": HOSTILE}, "step": 2}
    (run / "r.json").write_text(json.dumps(report | {"features": {HOSTILE: 1.5, "x": HOSTILE}}))
    out = tmp_path / "<b>n](x).safetensors"
    out.write_bytes(b"")
    made = Exported(
        out, "comfy", config, run / "checkpoints/step_00000002", 2, 7, True, False, HOSTILE
    )
    write_card(made)
    text = card_path(out).read_text()
    assert front_of(text)["base_model"] == "me/base"
    body = text.split("---\n", 2)[2]
    page = Page(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    expected = {"h1", "h2", "p", "pre", "code", "ul", "li", "img", "a", "details", "summary"}
    assert page.tags == expected | {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.links == [
        "https://huggingface.co/me/base",
        "%3Cb%3En%5D%28x%29-samples.webp",
    ]
    assert page.text.count("<script>alert(1)</script>") >= 5 and "1. one | two" in page.text


def test_one_line_of_markdown_cannot_begin_anything():
    assert escaped("# a\nb") == r"\# a b" and escaped("12. a") == r"12\. a"
    assert escaped("a|b `c` <d>") == r"a\|b \`c\` &lt;d&gt;"
    assert "\x1b" not in escaped("\x1b[2J") and "\u202e" not in escaped("\u202ex")
    assert fenced("a\n````\nb").startswith("`````\n")


def test_pages_of_others_and_changed_ones_stay(shop, tmp_path, capsys, monkeypatch):
    def without_matplotlib(*arguments):
        raise ValueError("curves need matplotlib")

    monkeypatch.setattr(export_card, "learning_curves", without_matplotlib)
    out, run = tmp_path / "model.safetensors", shop.folder / "runs/start"
    card = tmp_path / "model.md"
    card.write_text("my own notes")
    assert write(run, out) == "my own notes" and "stays as it is" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.md", out.name]
    card.unlink()
    first = write(run, out, "card.license=mit")
    assert "it has no curves: curves need matplotlib" in capsys.readouterr().out
    assert "curves.png" not in first
    second = write(run, out, "card.license=apache-2.0")
    assert front_of(first)["license"] == "mit" and front_of(second)["license"] == "apache-2.0"
    card.write_text(second.replace("# model", "# My model"))
    assert not is_ours(card) and "# My model" in write(run, out)


def test_scores_of_other_weights_are_left_out(shop, tmp_path, capsys):
    run = shop.folder / "runs/base"
    text = write(run, tmp_path / "a.safetensors", "--raw_weights")
    said = capsys.readouterr().out
    assert "## Scores" not in text and "scores.json are of other weights" in said
    text = write(run / "checkpoints/step_00000002", tmp_path / "b.safetensors")
    assert "## Scores" not in text and "step 2 of 3" in text


def test_scores_of_another_run_that_lie_beside_it_are_left_out(shop, tmp_path):
    """A baseline of as many steps, say; or the run itself, before it was trained anew."""
    run = shop.folder / "runs/base"
    exported = Exported(tmp_path / "a.safetensors", "mmdit", {}, latest(run), 3, 1)
    report = json.loads((run / "scores.json").read_text())
    older = {key: report[key] for key in report if key != "checkpoint_crc32"}
    other = older | {"checkpoint_crc32": report["checkpoint_crc32"] + 1}
    for row, expected in ((report, (1, 0)), (older, (1, 0)), (other, (0, 1))):
        (tmp_path / "scores.json").write_text(json.dumps(row))
        tables, notes = score_tables(tmp_path, exported)
        assert (len(tables), len(notes)) == expected
    assert "another run or step" in notes[0]


def test_scores_are_shown_with_what_they_rest_on():
    rate = {"value": 0.5, "low": 0.25, "high": 0.75, "correct": 4, "count": 8}
    kernel = {"value": 0.000191937, "deviation": 7e-5, "subsets": 100}
    features = {
        "frechet_distance": 12.3456789,
        "kernel_distance": kernel,
        "encoder": "vtp",
        "weights": "/home/jane d/clip",
    }
    features |= {"warnings": ["few samples"], "nearest": {"a": ["b", 0.1]}, "limit": None}
    report = {"prompt_accuracy": rate, "attributes": {"color": rate}, "features": features}
    assert list(score_rows(report | {"settings": {}, "step": 3})) == [
        ("prompt accuracy", "0.500 [0.250, 0.750] of 8"),
        ("features: frechet distance", "12.3457"),
        ("features: kernel distance", "0.000191937 ± 7e-05"),
        ("features: encoder", "vtp"),
        ("features: weights", "clip"),
        ("features: warnings", "few samples"),
    ]


def test_what_a_card_does_not_draw_are_panels_of_a_report():
    assert set(NOT_ABOUT_THE_MODEL) < PANELS.keys()
    nothing = [{"step": 1, "grad_norm": 1.0, "tflops": 2.0}]
    with pytest.raises(ValueError, match="no figure yet"):
        learning_curves("x", nothing)
    assert "<svg" in curves_svg("x", nothing)


def test_every_form_has_its_commands():
    def made(form, config=None, is_lora=False):
        return Exported(Path("x y"), form, config or {}, None, None, 1, is_lora)

    lora = commands_for(made("kohya", is_lora=True), "Wan-AI/Wan2.1-T2V-1.3B", "p")
    assert lora[0] == (
        "mmdit sample --checkpoint Wan2.1-T2V-1.3B --lora 'x y' --prompts p --out samples"
    )
    assert lora[1].endswith("train.init_from='x y' lora.enabled=true")
    ours = {"model": {"type": "video_mmdit"}}  # a LoRA is no start without its base
    assert len(commands_for(made("comfy", ours, is_lora=True), "", "p")) == 1
    assert commands_for(made("official"), "", "p")[0].endswith("model.name_or_path='x y'")
    config = {"model": {"name_or_path": "~/models/Wan2.1-T2V-1.3B"}, "tokenizer": {}}
    own = commands_for(made("mmdit", config), "", "p")[0]
    assert own.endswith("--out samples model.name_or_path=Wan2.1-T2V-1.3B")
    config = {"text_encoder": {"name_or_path": "google/t5"}}
    assert commands_for(made("mmdit", config), "", "p")[0].endswith("name_or_path=google/t5")
    low = Exported(Path("x"), "diffusers", {"model": {"type": "wan"}}, None, None, 1, is_lora=True)
    (_, call) = uses_elsewhere(replace(low, expert="low"), "p")
    assert "weight_name='x', load_into_transformer_2=True)" in call
    assert "transformer_2" not in uses_elsewhere(replace(low, expert="high"), "p")[1]
    whole = replace(low, expert="low", is_lora=False)
    assert uses_elsewhere(whole, "p") == [
        "It takes the place of the folder `transformer_2` in its release."
    ]
    (place,) = uses_elsewhere(replace(whole, form="official", expert="high"), "p")
    assert "`high_noise_model`" in place and commands_for(whole, "", "p") == []
    i2v = {"tokenizer": {"picture": "first_last"}}
    both = "--prompts p --image first.png --image last.png --out samples"
    assert both in commands_for(made("mmdit", i2v), "", "p")[0]
    assert both in commands_for(made("comfy", i2v, is_lora=True), "", "p")[0]
    refiner = commands_for(made("mmdit", {"model": {"conditioning": "low_resolution"}}), "", "p")
    assert "--checkpoint SMALL_MODEL --refine 'x y' --prompts p" in refiner[0]
    assert refiner[1].endswith("train.init_from='x y'")
    ours = {"tokenizer": {"name_or_path": "VTP/checkpoints/vtp_tiny_f16d64"}}
    assert commands_for(made("mmdit", ours), "", "p")[0].endswith("--out samples")


@pytest.mark.parametrize("form", [*thorough("peft"), "comfy"])
def test_adapters_name_their_base(shop, tmp_path, form):
    start = shop.folder / "runs/start"
    words = ["lora={enabled: true, rank: 2}", f"train.init_from={start}", "train.max_steps=1"]
    words.append("captions={trigger: zork, separator: ' |'}")
    run = shop.folder / "runs/adapted"
    if not run.exists():
        shop.train("adapted", *words)
    out = tmp_path / ("adapter" if form == "peft" else "adapter.safetensors")
    text = write(run, out, "--lora", form, "card.base_model=me/start")
    front = front_of(text)
    assert (front["base_model"], front["base_model_relation"]) == ("me/start", "adapter")
    assert front["library_name"] == {"peft": "peft", "comfy": "mmdit"}[form]
    assert card_path(out).name == {"peft": "README.md", "comfy": "adapter.md"}[form]
    assert "rank 2" in text and "[me/start](https://huggingface.co/me/start)" in text
    assert front["instance_prompt"] == "zork" and "the trigger word zork, which prompts" in text
    assert "--prompts 'zork | a large red star" in text
    own = write(run, tmp_path / "own.safetensors")  # which knows the word
    assert "the trigger word zork, which is put in front of prompts that lack it" in own


def test_a_release_is_known_by_the_name_of_its_folder_and_not_by_its_place(tmp_path):
    out = tmp_path / "adapter.safetensors"
    save_file({"x": torch.zeros(1)}, out)
    for name, base in (("Wan2.2-TI2V-5B/", "Wan-AI/Wan2.2-TI2V-5B"), ("mine", None)):
        config = encode(ExperimentConfig("x"))
        config["model"] = {"type": "wan", "name_or_path": f"/data/models of jane/{name}"}
        write_card(Exported(out, "comfy", config, None, None, 1, is_lora=True))
        text = card_path(out).read_text()
        assert front_of(text).get("base_model") == base and "jane" not in text
        assert "ComfyUI" in text and Push(out).license == "not stated"


def test_exports_whose_names_have_dots_do_not_share_a_card(shop, tmp_path):
    for name in ("v1.5", "v1.6"):
        write(shop.folder / "runs/start", tmp_path / name)
    cards = {path.name for path in tmp_path.glob("*.md")}
    assert cards == {"v1.5.md", "v1.6.md"} and "# v1.5" in (tmp_path / "v1.5.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} <= {"v1.5-curves.png", "v1.6-curves.png"}


def test_reports_of_another_form_are_no_scores(tmp_path):
    """Whatever lies in the folder of a run, the export has its card."""
    exported = Exported(tmp_path / "x.safetensors", "mmdit", {}, tmp_path, 2, 1)
    about = {"settings": {"sampler": "euler"}, "checkpoint": "x", "machine": {}, "step": 2}
    odd = {"a": {"value": 0.5, "low": 0.25, "high": None}, "b": {"value": 0.5, "count": "few"}}
    (tmp_path / "a.json").write_text(json.dumps(about | odd))
    for name, part in (("b", {"machine": "mine"}), ("c", {"settings": [1]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(about | part))
    (table,), notes = score_tables(tmp_path, exported)
    assert "| a | 0.5 |" in table and "a.json" in table and not notes
