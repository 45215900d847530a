"""The difference of two models as a LoRA: laid over the base it gives the tuned model again."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.adapters import adapters
from mmdit.adapters.lora import differences
from mmdit.commands.extract_lora import nearest
from mmdit.experiment.load import load_pipeline
from mmdit.interop.lora_formats import load_lora
from mmdit.interop.wan_weights import load_dit, save_dit
from mmdit.scripts import export, extract_lora
from tests.helpers.tiny import Workshop, refused
from tests.helpers.wan_release import DIT, random_dit
from tests.test_wan_training import Shop

Q, FFN, NORM = "blocks.1.self_attn.q.weight", "blocks.0.ffn.0.weight", "blocks.0.norm3.weight"


def change(rows: int, columns: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator) / columns


@pytest.fixture
def pair(tmp_path):
    """Return the folders of a Wan transformer, and of what became of it: a change of rank 3 in
    two layers, and one of a norm. The second is in the layout of Diffusers."""
    model = random_dit(DIT)
    save_dit(model, tmp_path / "base")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for seed, name in enumerate((Q, FFN)):
            parameters[name] += change(*parameters[name].shape, 3, seed)
        parameters[NORM] += 0.1
    save_dit(model, tmp_path / "tuned", "diffusers")
    return tmp_path / "base", tmp_path / "tuned"


def extracted(pair, out, *words):
    base, tuned = map(str, pair)
    words = ["--base", base, "--tuned", tuned, "--out", str(out), "--device", "cpu", *words]
    assert extract_lora.main(words) == 0


def apart(pair, lora):
    """Return the distance of each parameter of the base under the LoRA from the tuned one's."""
    model, tuned = (load_dit(path) for path in pair)
    load_lora(model, lora)
    layers = {f"{name}.weight": layer for name, layer in adapters(model).items()}
    result = {}
    for name, parameter in tuned.named_parameters():
        now = layers[name].merged_weight() if name in layers else model.get_parameter(name)
        result[name] = float((now - parameter).norm().detach())
    return model, result


@pytest.mark.parametrize("form", ["comfy", "diffusers", "kohya", "peft"])
def test_a_lora_of_sufficient_rank_gives_the_tuned_layers_again(pair, tmp_path, capsys, form):
    out = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    extracted(pair, out, "--rank", "3", "--format", form)
    model, rest = apart(pair, out)
    assert set(adapters(model)) == {Q.removesuffix(".weight"), FFN.removesuffix(".weight")}
    assert rest.pop(NORM) > 0.1 and max(rest.values()) < 1e-5
    said = capsys.readouterr().out
    assert "blocks.*.self_attn.q" in said and "100.0%" in said
    assert f"not in it: the changes of further parameters (1, first {NORM})" in said


def test_whole_differences_hold_what_is_no_layer(pair, tmp_path, capsys):
    extracted(pair, tmp_path / "lora.safetensors", "--whole", "--targets", "self_attn.q")
    model, rest = apart(pair, tmp_path / "lora.safetensors")
    assert max(rest.values()) < 1e-5 and set(differences(model)) == {FFN, NORM}
    assert "not in it" not in capsys.readouterr().out


def test_a_lower_rank_holds_the_largest_singular_values(pair, tmp_path, capsys):
    extracted(pair, tmp_path / "lora.safetensors", "--rank", "2", "--targets", "ffn.0")
    values = torch.linalg.svdvals(change(*random_dit(DIT).get_parameter(FFN).shape, 3, 1).double())
    _, rest = apart(pair, tmp_path / "lora.safetensors")
    assert rest[FFN] == pytest.approx(values[2].item(), rel=1e-4)
    held = 1 - (values[2] / values.norm()) ** 2
    assert f"{held:.1%}" in capsys.readouterr().out


def test_what_the_tuned_model_is_rounded_by_is_no_change(pair, tmp_path, capsys):
    base, tuned = pair
    save_dit(load_dit(tuned), tmp_path / "rounded", dtype=torch.bfloat16)
    extracted((base, tmp_path / "rounded"), tmp_path / "lora.safetensors", "--rank", "24")
    model, rest = apart((base, tmp_path / "rounded"), tmp_path / "lora.safetensors")
    assert set(adapters(model)) == {Q.removesuffix(".weight"), FFN.removesuffix(".weight")}
    assert f"(1, first {NORM})" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [None, 0.013])
def test_nor_are_the_codes_of_float8(pair, tmp_path, scale):
    """Store them as ComfyUI does: plain, or with a scale for each matrix."""
    base, tuned = pair
    stored = {}
    for name, weight in load_dit(tuned).named_parameters():
        is_coded = name.startswith("blocks.") and weight.ndim == 2
        stored[name] = weight.detach()
        if is_coded:
            stored[name] = (weight.detach() / (scale or 1)).to(torch.float8_e4m3fn)
        if is_coded and scale:
            stored[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(scale)
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(stored, folder / "diffusion_pytorch_model.safetensors")
    extracted((base, folder), tmp_path / "lora.safetensors", "--rank", "24")
    model = load_dit(base)
    load_lora(model, tmp_path / "lora.safetensors")
    layers = adapters(model)
    assert set(layers) == {Q.removesuffix(".weight"), FFN.removesuffix(".weight")}
    wanted = load_dit(tuned).get_parameter(Q) - load_dit(base).get_parameter(Q)
    assert (layers[Q.removesuffix(".weight")].delta() - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.parametrize("shape", [(1100, 1300), (1300, 1100)])
def test_of_large_matrices_the_factors_are_near_to_the_best(shape):
    torch.manual_seed(0)
    decay = 0.8 ** torch.arange(min(shape))
    left, right = (torch.linalg.qr(torch.randn(side, min(shape))).Q for side in shape)
    matrix = (left * decay) @ right.mT
    state = torch.random.get_rng_state()
    factors = nearest(matrix, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    rest = (matrix - factors["lora_B"] @ factors["lora_A"]).norm()
    assert rest == pytest.approx(decay[8:].norm().item(), rel=1e-3)
    assert factors["lora_A"].norm() == pytest.approx(factors["lora_B"].norm().item(), rel=1e-3)


def test_a_run_of_ours_and_what_became_of_it(tmp_path, capsys):
    """The tuned one is an export, in bfloat16; that of the base is no change of it."""
    shop, files = Workshop(tmp_path), []
    base = shop.train("base", "train.max_steps=1", "ema.enabled=false")
    tuned = shop.train("tuned", f"train.init_from={base}", "train.max_steps=2", "ema.enabled=false")
    for run in (base, tuned):
        files.append(tmp_path / f"{run.name}.safetensors")
        export.main(["--checkpoint", str(run), "--out", str(files[-1])])
    words = ["--base", base, "--tuned", files[0], "--out", tmp_path / "none.safetensors"]
    refused(capsys, extract_lora.main, words, "do not differ in a linear layer")
    out = tmp_path / "lora.safetensors"
    extracted((base, files[1]), out, "--rank", "999")
    assert (
        "the text encoder of --tuned, which is another one (14 parameters)"
        in capsys.readouterr().out
    )
    pipeline, _ = load_pipeline(files[0], "cpu")
    wanted, _ = load_pipeline(files[1], "cpu")
    load_lora(pipeline.model, out)
    layers = adapters(pipeline.model)
    assert len(layers) > 8
    for name, layer in layers.items():
        weight = wanted.model.get_parameter(f"{name}.weight")
        assert torch.allclose(layer.merged_weight(), weight, atol=1e-6)


def test_either_expert_of_a_pair_of_ours_is_compared_with_the_network_that_both_came_of(
    tmp_path, capsys
):
    shop = Workshop(tmp_path)
    base = shop.train("base", "train.max_steps=2", "ema.enabled=false")
    lora = "lora={enabled: true, rank: 2, target_modules: [cross.k]}"
    words = [f"train.init_from={base}", "train.max_steps=2", "ema.enabled=false", lora]
    run = shop.train("pair", *words, "experts={enabled: true, train: low}")
    out = tmp_path / "low.safetensors"
    extracted((base, run), out)
    said = capsys.readouterr().out
    assert "low.safetensors (0.0 MB): of two experts the low-noise one" in said
    assert "text encoder of --tuned" not in said
    pipeline, _ = load_pipeline(base, "cpu")
    load_lora(pipeline.model, out)
    wanted = load_pipeline(run, "cpu", lora=None)[0].model.networks()["low"]
    layers, before = adapters(pipeline.model), adapters(wanted)
    assert layers.keys() == before.keys() and len(layers) == 2
    for name, layer in layers.items():
        assert torch.allclose(layer.delta(), before[name].delta(), atol=1e-7)
    words = ["--base", base, "--tuned", run, "--out", tmp_path / "none.safetensors"]
    refused(capsys, extract_lora.main, [*words, "--expert", "high"], "do not differ")


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lokr_of_one_expert_becomes_a_lora_digit_by_digit(tmp_path, capsys, dtype):
    """Merged weights would be rounded to the type of the tuned model's base, and int8 has errors
    of its own; the base itself is float32."""
    shop = Shop(tmp_path, pair=True)
    lokr = "lora={enabled: true, type: lokr, factor: 4, rank: 2, target_modules: [cross_attn.k]}"
    run = shop.train("lokr", lokr, f"model.dtype={dtype}", "model.expert=low", "ema.enabled=false")
    out = tmp_path / "lora.safetensors"
    extracted((shop.release, run), out, "--expert", "low", "--rank", "24")
    wanted = load_dit(shop.release, torch.bfloat16, expert="low")
    network = load_pipeline(run, "cpu", lora=None)[0].model.networks()["low"]
    load_lora(wanted, out)
    layers, before = adapters(wanted), adapters(network)
    assert layers.keys() == before.keys() and len(layers) == 2
    for name, layer in layers.items():
        assert torch.allclose(layer.delta(), before[name].delta(), atol=1e-7)
        assert before[name].delta().any()
    extracted((run, shop.release), tmp_path / "back.safetensors", "--expert", "high")
    assert "the high-noise one (as --expert says)" in capsys.readouterr().out


def test_what_cannot_be_extracted_is_refused(pair, tmp_path, capsys):
    base, tuned = pair
    words = ["--base", base, "--tuned", tuned, "--out", tmp_path / "x.safetensors"]
    main = extract_lora.main
    refused(capsys, main, [*words, "--targets", "cross_attn.k"], "do not differ in a linear layer")
    refused(capsys, main, [*words, "--targets", "cross.k"], "matches no linear layer")
    refused(capsys, main, [*words, "--format", "peft", "--whole"], "which peft files do not hold")
    refused(capsys, main, [*words[:-1], tmp_path / "x"], "must end in .safetensors")
    save_dit(random_dit(replace(DIT, ffn_dim=48)), tmp_path / "other")
    unlike = [*words[:3], tmp_path / "other", *words[4:]]
    refused(capsys, main, unlike, "not of one kind: blocks.0.ffn.0.weight is (32, 24) in --base")
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    weights[NORM] = weights[NORM] * float("nan")
    save_file(weights, base / "diffusion_pytorch_model.safetensors")
    refused(capsys, main, [*words, "--whole"], f"{NORM} holds nan or infinity")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "main, words",
    [
        (extract_lora.main, ["--base", "absent", "--tuned", "absent"]),
        (export.main, ["--checkpoint", "absent", "--lora", "comfy"]),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path, capsys, main, words
):
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(SystemExit):
        main([*words, "--out", str(file / "lora.safetensors")])
    assert f"{file} is no folder that you may write to" in capsys.readouterr().err
