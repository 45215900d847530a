"""What is installed: lists of packages, the command `mmdit`, and a wheel far from its source."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdit import __version__, shipped
from mmdit.__main__ import commands, overview
from mmdit.commands import doctor

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Import names that differ from the names of their distributions.
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL"}
DEVELOPMENT = {"dev", "docs"}
# Used where they happen to be installed; without them one line says what to install.
ADVISED = {"huggingface_hub", "open_clip", "torchao"}
BESIDE = {"mmdit", "vtp", "benchmarks", "examples"}


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements ask for, without their versions."""
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def imports(*folders: str) -> set[str]:
    """Return the top-level names of all modules that the code of these folders imports."""
    modules = set()
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                modules.add(node.module.partition(".")[0])
    return modules - BESIDE - set(sys.stdlib_module_names)


def used_packages() -> set[str]:
    """Return what the project lists, development apart."""
    listed = names(PROJECT["dependencies"])
    for extra in EXTRAS.keys() - DEVELOPMENT:
        listed |= names(EXTRAS[extra])
    return listed


def test_requirements_are_those_of_the_package():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert names([line for line in lines if line and line[0] != "#"]) == used_packages()


def test_what_is_listed_is_imported_and_what_is_imported_is_listed():
    listed = {IMPORTED_AS.get(name, name) for name in used_packages()}
    used = imports("mmdit", "VTP/vtp", "examples")
    # Not on the lists: `triton`, which comes with torch. Not imported: TensorBoard, which torch
    # writes, sentencepiece, which transformers imports for the tokenizers of some folders, and the
    # trackers, which are imported by the name that a config gives.
    assert listed - {"tensorboard", "sentencepiece", "wandb", "trackio"} <= used
    assert used - {"triton"} - ADVISED <= listed


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mmdit, mmdit.__main__; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "torch" not in done.stdout and "mmdit" in done.stdout


def test_caching_and_sampling_import_no_compiler(tmp_path):
    """The compiler is a second of the start of each command, and what cuts tensors over processes
    half a second: neither is imported where nothing is compiled or cut."""
    code = """
import sys
from mmdit.__main__ import main

config, out, weights = sys.argv[1:]
for words in (
    f"cache-moving-shapes --config {config} --count 2 --out_dir {out}/cache",
    f"sample --checkpoint {weights} --frames 1 --steps 1 --prompts square --out {out}/samples",
):
    sys.argv = ["mmdit", *words.split()]
    assert not main()
heavy = {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy"}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    places = ["configs/moving_shapes_64_t2i.yaml", tmp_path, "assets/moving_shapes_64.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", code, *places], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "imported: []", done.stdout + done.stderr


def test_every_command_has_a_name_and_a_sentence():
    known = commands()
    assert {"quickstart", "train", "cache-images", "cache-latents", "sample", "doctor"} <= set(
        known
    )
    lines = overview().splitlines()[2:]
    assert len(lines) == len(known)
    assert all(len(line.split()) > 3 for line in lines)


def test_the_versions_agree():
    assert PROJECT["version"] == __version__


def mmdit(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `mmdit WORDS` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "mmdit", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_an_unknown_command_is_one_line_with_the_nearest(tmp_path):
    done = mmdit("trian", folder=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'VTP'}")
    assert done.returncode == 2 and "did you mean train?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_doctor_says_what_is_there_and_why_fast_paths_are_off(tmp_path):
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'VTP'}"}
    env["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # whatever is set where the tests run
    done = mmdit("doctor", "--device", "cpu", folder=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows["mmdit"].startswith(__version__)
    assert rows["fused kernels"].startswith("off: needs a CUDA GPU")
    assert rows["shipped files"] == "all there"
    assert "GB free" in rows["disk"]
    assert rows["float32 products"] == "in float32"
    assert re.search(r"bfloat16 takes \d+\.\d times as long as float32", rows["CPU"])
    named = {extra for extra, _ in doctor.OPTIONAL.values()}
    assert named == PROJECT["optional-dependencies"].keys() - {"dev", "docs"}
    assert doctor.OPTIONAL.keys() <= rows.keys()


def test_the_doctor_says_where_float32_is_less(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    said = dict(doctor.report(torch.device("cpu")))["float32 products"]
    assert "float32_matmul_precision is high" in said and "TORCH_ALLOW_TF32" in said


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("configs/quickstart.yaml") == ROOT / "configs/quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.yaml").touch()
    assert shipped.find("configs/quickstart.yaml") == Path("configs/quickstart.yaml")
    assert shipped.find("configs/none.yaml") == Path("configs/none.yaml")
    assert shipped.shipped_path("mmdit/config.py") is None  # code is not data


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_samples_with_what_it_ships(tmp_path):
    """The wheel holds configs, weights and the tokenizer; the clone is nowhere on the path."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    site = tmp_path / "site"
    wheel = next(tmp_path.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), wheel]
    subprocess.run(install, check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["--checkpoint", "assets/moving_shapes_64.safetensors", "--prompts", "a red star"]
    words += ["--frames", "1", "--steps", "2", "--device", "cpu", "--out", "drawn"]
    done = mmdit("sample", *words, folder=empty, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert list(empty.glob("drawn/*.png"))
    done = mmdit("doctor", folder=empty, PYTHONPATH=str(site))
    assert str(site) in done.stdout and "all there" in done.stdout
