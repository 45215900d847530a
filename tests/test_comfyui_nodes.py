"""The nodes in `integrations/comfyui`, with stand-ins for the few functions of ComfyUI that they
call (`tests/drivers/comfyui.py` runs them under ComfyUI itself)."""

import importlib.util
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmdit.experiment.load import load_pipeline
from mmdit.training.pipeline import SampleSettings
from tests.helpers.thorough import thorough

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "integrations" / "comfyui"
MODEL = ROOT / "assets" / "moving_shapes_64.safetensors"
TOKENIZER = ROOT / "VTP" / "checkpoints" / "vtp_tiny_f16d64"
WORKFLOW = json.loads((NODES / "workflow_api.json").read_text(encoding="utf-8"))
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str}


class Interrupted(Exception):
    pass


class ComfyUI:
    """What ComfyUI is to a node: folders of models, a device, a progress bar, and a button that
    interrupts at a step."""

    def __init__(self, models: Path):
        self.models, self.interrupt_at = models, None
        self.totals, self.steps = [], 0

    def modules(self) -> dict[str, ModuleType]:
        comfyui = self

        class ProgressBar:
            def __init__(self, total):
                comfyui.totals.append(total)

            def update(self, value):
                comfyui.steps += value

        def interrupted():
            if comfyui.steps == comfyui.interrupt_at:
                raise Interrupted

        def names(folder):
            places, endings = paths.folder_names_and_paths[folder]
            files = [file for place in places for file in Path(place).glob("*")]
            return sorted(file.name for file in files if file.suffix in endings)

        paths = ModuleType("folder_paths")
        paths.models_dir, paths.folder_names_and_paths = str(self.models), {}
        paths.get_filename_list = names
        paths.get_folder_paths = lambda folder: paths.folder_names_and_paths[folder][0]
        paths.get_full_path_or_raise = lambda folder, name: str(self.models / folder / name)
        management, utils = ModuleType("comfy.model_management"), ModuleType("comfy.utils")
        management.get_torch_device = lambda: torch.device("cpu")
        management.throw_exception_if_processing_interrupted = interrupted
        utils.ProgressBar = ProgressBar
        names_of_modules = ("folder_paths", "comfy", "comfy.model_management", "comfy.utils")
        modules = (paths, ModuleType("comfy"), management, utils)
        return dict(zip(names_of_modules, modules, strict=True))


def opened(name: str) -> ModuleType:
    """Import the folder of nodes as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        name, NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    (models / "mmdit").mkdir()
    (models / "mmdit" / MODEL.name).symlink_to(MODEL)
    (models / "mmdit" / "notes.txt").write_text("no model")
    return ComfyUI(models)


@pytest.fixture(scope="module")
def nodes(comfyui):
    with pytest.MonkeyPatch.context() as patch:
        for name, module in comfyui.modules().items():
            patch.setitem(sys.modules, name, module)
        yield opened("comfyui_mmdit").NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def loaded(nodes):
    with torch.inference_mode():
        return nodes["LoadMMDiT"]().load(MODEL.name)[0]


def draw(nodes, loaded, **changes):
    words = {**WORKFLOW["2"]["inputs"], "model": loaded, "count": 2, "steps": 3, **changes}
    with torch.inference_mode():  # as ComfyUI runs nodes
        return nodes["MMDiTSampler"]().draw(**words)


def expected(frames, steps, prompts, seed=7, guidance=2.5):
    pipeline, config = load_pipeline(MODEL, "cpu")
    sampler = SampleSettings.of(config.train).sampler
    sampler = type(sampler)(sampler.solver, steps, sampler.eta, sampler.shift, sampler.grid)
    pixels = pipeline(prompts, 64, 64, frames, SampleSettings(sampler, guidance, seed=seed))
    return pixels.permute(0, 1, 3, 4, 2).flatten(0, 1)


def widgets(node) -> dict:
    """Return the inputs of a node by name."""
    inputs = node.INPUT_TYPES()
    return inputs["required"] | inputs.get("optional", {})


def test_nodes_are_what_comfyui_asks_of_them(nodes):
    shown = sys.modules["comfyui_mmdit"].NODE_DISPLAY_NAME_MAPPINGS
    assert nodes.keys() == shown.keys() == {"LoadMMDiT", "MMDiTSampler"}
    for node in nodes.values():
        called = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert list(called) == ["self", *widgets(node)]
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and node.CATEGORY
        for widget, *options in widgets(node).values():
            default = options[0].get("default") if options else None
            assert isinstance(widget, list) or widget in ("MMDIT_MODEL", *WIDGETS)
            assert default is None or isinstance(default, WIDGETS[widget])
    assert nodes["MMDiTSampler"].RETURN_TYPES == ("IMAGE", "FLOAT")


def test_only_models_are_listed(nodes):
    assert widgets(nodes["LoadMMDiT"])["file"] == ([MODEL.name],)


@pytest.mark.parametrize("frames", [*thorough(1), 4])
def test_images_are_those_of_sample_bit_for_bit(nodes, loaded, comfyui, frames):
    comfyui.totals, comfyui.steps = [], 0
    images, fps = draw(nodes, loaded, frames=frames)
    assert images.shape == (2 * frames, 64, 64, 3) and images.dtype == torch.float32
    assert images.is_contiguous() and images.min() >= 0 and images.max() <= 1 and fps == 8.0
    assert torch.equal(images, expected(frames, 3, [WORKFLOW["2"]["inputs"]["prompt"]] * 2))
    assert (comfyui.totals, comfyui.steps) == ([3], 3), "the progress is told step by step"


def test_what_is_left_open_is_as_the_model_was_trained(nodes, loaded):
    left_open = {"width": 0, "height": 0, "frames": 0, "steps": 1, "guidance": -1.0, "count": 1}
    assert draw(nodes, loaded, **left_open)[0].shape == (16, 64, 64, 3)
    left_open |= {"frames": 1, "steps": 2}
    images = draw(nodes, loaded, **left_open)[0]
    trained = {"width": 64, "height": 64, "guidance": 2.5}
    assert torch.equal(images, draw(nodes, loaded, **left_open | trained)[0])
    for change in ({"guidance": 1.0}, {"solver": "euler"}, {"negative": "red"}, {"seed": 8}):
        assert not torch.equal(images, draw(nodes, loaded, **left_open | change)[0]), change


def test_the_button_interrupts_between_steps(nodes, loaded, comfyui):
    comfyui.steps, comfyui.interrupt_at = 0, 2
    try:
        with pytest.raises(Interrupted):
            draw(nodes, loaded, frames=1, steps=5)
    finally:
        comfyui.interrupt_at = None
    assert comfyui.steps == 2


def test_sizes_that_cannot_be_drawn_are_refused_before_anything_is(nodes, loaded, comfyui):
    comfyui.totals = []
    with pytest.raises(ValueError, match="size 40x64 is not a multiple of 16"):
        draw(nodes, loaded, width=40)
    assert comfyui.totals == []


def test_a_tokenizer_beside_the_models_can_be_chosen(nodes, comfyui, loaded):
    place = comfyui.models / "mmdit" / "my_tokenizer"
    shutil.copytree(TOKENIZER, place)
    try:
        assert widgets(nodes["LoadMMDiT"])["tokenizer"][0] == ["as in the file", "my_tokenizer"]
        pipeline, config = nodes["LoadMMDiT"]().load(MODEL.name, "my_tokenizer")[0]
        assert config.tokenizer.name_or_path == str(place)
        before = nodes["LoadMMDiT"].IS_CHANGED(MODEL.name, "my_tokenizer")
        os.utime(place / "model.safetensors", ns=(1, 1))
        assert nodes["LoadMMDiT"].IS_CHANGED(MODEL.name, "my_tokenizer") != before
        with pytest.raises(KeyError):
            nodes["LoadMMDiT"]().load(MODEL.name, "../elsewhere")
    finally:
        shutil.rmtree(place)


def test_a_file_that_was_replaced_is_loaded_anew(nodes, comfyui):
    file = comfyui.models / "mmdit" / "other.safetensors"
    file.write_bytes(b"1")
    before = nodes["LoadMMDiT"].IS_CHANGED("other.safetensors")
    assert nodes["LoadMMDiT"].IS_CHANGED("other.safetensors") == before
    os.utime(file, ns=(1, 1))
    assert nodes["LoadMMDiT"].IS_CHANGED("other.safetensors") != before
    file.unlink()


def test_without_mmdit_the_nodes_say_what_to_install(nodes, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdit.experiment.load", None)
    with pytest.raises(ImportError, match="need the package mmdit in the Python of ComfyUI"):
        opened("comfyui_mmdit_again")


def test_workflows_fit_the_nodes(nodes):
    for number, step in WORKFLOW.items():
        if step["class_type"] not in nodes:
            continue
        asked = widgets(nodes[step["class_type"]])
        assert step["inputs"].keys() == asked.keys(), number
        for name, value in step["inputs"].items():
            widget, *options = asked[name]
            if isinstance(widget, list):
                assert value in widget, (number, name)
            elif widget in WIDGETS:
                limits = {"min": value, "max": value, **(options[0] if options else {})}
                assert isinstance(value, WIDGETS[widget]), (number, name)
                assert limits["min"] <= value <= limits["max"], (number, name)
            else:
                source, slot = value
                assert nodes[WORKFLOW[source]["class_type"]].RETURN_TYPES[slot] == widget


def test_the_workflow_of_the_page_is_that_of_the_api():
    """ComfyUI's page keeps widgets as a list, and one more behind a seed."""
    file = NODES / "example_workflows" / "picture_and_clip.json"
    page = json.loads(file.read_text(encoding="utf-8"))
    assert {str(node["id"]): node["type"] for node in page["nodes"]} == {
        number: step["class_type"] for number, step in WORKFLOW.items()
    }
    for node in page["nodes"]:
        inputs = WORKFLOW[str(node["id"])]["inputs"].values()
        values = [value for value in inputs if not isinstance(value, list)]
        kept = [value for value in node["widgets_values"] if value != "fixed"]
        if node["type"] != "CreateVideo":  # whose rate comes through a link
            assert kept == values
