"""Adapter files by the libraries that others write them with, and what those libraries themselves
merge of them.

    python -m tests.helpers.lora_writers     # records tests/golden/lora_writers anew

A case is a folder: the files as they were saved, and `seen.safetensors`, what the changes of
weights make of two inputs, by our names.
"""

import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mmdit.interop.wan_weights import save_dit
from tests.helpers.wan_release import DIT, random_dit

RECORDED = Path(__file__).parents[1] / "golden" / "lora_writers"
LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.0")  # square and not
# Every form in which PEFT takes the names of layers; of several that fit, the first counts
PATTERNS = {
    "word": {"q": 6},
    "end": {"self_attn.q": 6},
    "whole": {"blocks.1.ffn.0": 6},
    "expression": {r"blocks\.\d+\.ffn.*": 6},
    "anchored": {r"^blocks\.0\..*": 6, r"^self_attn\.q": 7},
    "first": {r".*\.q": 6, "q": 7, "self_attn.q": 8},
    "inside": {"attn.q": 6, "ffn": 7},  # fit nothing: parts of words, and no layer's end
}


def base() -> nn.Module:
    return random_dit(DIT)


def shake(parameters) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 + torch.randn(parameter.shape, generator=generator))


def peft(folder: Path, kind: str = "Lora", **options) -> dict[str, torch.Tensor]:
    import peft

    model = base()
    before = {name: model.get_submodule(name).weight.clone() for name in LAYERS}
    bias = {f"{name}.bias": model.get_submodule(name).bias.clone() for name in LAYERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, f"{kind}Config")(**{"target_modules": list(LAYERS)} | options)
        wrapped = peft.get_peft_model(model, config)
        shake(p for name, p in wrapped.named_parameters() if p.requires_grad)
        wrapped.save_pretrained(folder)
        merged = wrapped.merge_and_unload()
    (folder / "README.md").unlink(missing_ok=True)
    result = {
        name: merged.get_submodule(name).weight.detach() - weight for name, weight in before.items()
    }
    if options.get("lora_bias"):
        result |= {
            name: merged.get_parameter(name).detach() - value for name, value in bias.items()
        }
    return result


DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
}


def diffusers(folder: Path, **options) -> dict[str, torch.Tensor]:
    """As its pipelines save a LoRA: the config is in the header."""
    import peft
    from diffusers import WanPipeline, WanTransformer3DModel

    with tempfile.TemporaryDirectory() as place:
        save_dit(base(), Path(place) / "base", "diffusers")
        model = WanTransformer3DModel.from_pretrained(Path(place) / "base")
    model.add_adapter(peft.LoraConfig(**{"target_modules": list(DIFFUSERS.values())} | options))
    shake(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    told = model.peft_config["default"].to_dict()
    told["target_modules"] = sorted(told["target_modules"])
    layers = peft.get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=told)
    model.fuse_lora()
    before = base()
    return {
        name: model.get_submodule(own).weight.detach() - before.get_submodule(name).weight.detach()
        for name, own in DIFFUSERS.items()
    }


def lycoris(
    folder: Path, module: str = "locon", prefix: str = "lora_unet_", twice: bool = False, **options
) -> dict[str, torch.Tensor]:
    """`twice`: its merging of decomposed LoKr multiplies with the scale twice; once is what it
    trains with, and what all read."""
    from lycoris.modules import locon, lokr

    kind, model, tensors, merged = (
        {"locon": locon.LoConModule, "lokr": lokr.LokrModule}[module],
        base(),
        {},
        {},
    )
    for name in LAYERS:
        layer = model.get_submodule(name)
        key = prefix + name.replace(".", "_")
        own = kind(key, layer, **options)
        shake(own.parameters())
        tensors |= {
            f"{key}.{part}": tensor.detach().clone().contiguous()
            for part, tensor in own.custom_state_dict().items()
        }
        merged[name] = (own.get_merged_weight()[0].detach() - layer.weight.detach()) / (
            own.scale if twice else 1
        )
    save_file(tensors, folder / "lycoris.safetensors")
    return merged


CASES = {
    **{
        f"peft_{name}": partial(peft, **options)
        for name, options in {
            "plain": {"r": 2, "lora_alpha": 5},
            "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
            "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
            "dora_rslora": {"r": 2, "lora_alpha": 5, "use_dora": True, "use_rslora": True},
            "bias": {"r": 2, "lora_alpha": 5, "lora_bias": True},
            "fan": {"r": 2, "lora_alpha": 5, "fan_in_fan_out": True},
            "dropout": {
                "r": 2,
                "lora_alpha": 5,
                "lora_dropout": 0.5,
                "init_lora_weights": "gaussian",
            },
            "some_blocks": {
                "r": 2,
                "lora_alpha": 5,
                "target_modules": ["q", "ffn.0"],
                "layers_to_transform": [0],
                "layers_pattern": "blocks",
                "exclude_modules": r".*cross_attn.*",
            },
        }.items()
    },
    **{
        f"peft_alpha_{name}": partial(peft, r=2, lora_alpha=5, alpha_pattern=pattern)
        for name, pattern in PATTERNS.items()
    },
    **{
        f"diffusers_{name}": partial(diffusers, **options)
        for name, options in {
            "plain": {"r": 2, "lora_alpha": 5},
            "rslora": {"r": 2, "lora_alpha": 5, "use_rslora": True},
            "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
            "patterns": {
                "r": 2,
                "lora_alpha": 5,
                "rank_pattern": {"to_q": 3},
                "alpha_pattern": {r"blocks\.1\..*": 7},
            },
        }.items()
    },
    "peft_ranks": partial(
        peft, r=2, lora_alpha=5, rank_pattern={"ffn.0": 3}, alpha_pattern={"q": 4}
    ),
    "peft_ranks_rslora": partial(
        peft, r=2, lora_alpha=5, use_rslora=True, rank_pattern={"ffn.0": 3}
    ),
    **{
        f"peft_lokr_{name}": partial(peft, kind="LoKr", **options)
        for name, options in {
            "plain": {"r": 2, "alpha": 5, "decompose_factor": 4},
            "whole": {"r": 64, "alpha": 32},
            "both": {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
            "ranks": {
                "r": 2,
                "alpha": 5,
                "decompose_factor": 4,
                "rank_pattern": {"ffn.0": 16},
                "alpha_pattern": {"q": 7},
            },
            "options": {
                "r": 2,
                "alpha": 5,
                "rank_dropout": 0.5,
                "module_dropout": 0.1,
                "use_effective_conv2d": True,
                "init_weights": False,
            },
        }.items()
    },
    **{
        f"lycoris_{name}": partial(lycoris, lora_dim=2, alpha=5, **options)
        for name, options in {
            "plain": {},
            "dora": {"weight_decompose": True},
            "rs": {"rs_lora": True},
            "scalar": {"use_scalar": True},
            "own_prefix": {"prefix": "lycoris_"},
            "double_underscore": {"prefix": "lora_unet__"},
        }.items()
    },
    "lycoris_lokr": partial(lycoris, module="lokr", twice=True, lora_dim=2, alpha=5, factor=4),
    "lycoris_lokr_whole": partial(
        lycoris, module="lokr", lora_dim=2, alpha=5, factor=4, full_matrix=True
    ),
    "lycoris_lokr_both": partial(
        lycoris, module="lokr", twice=True, lora_dim=1, alpha=3, factor=4, decompose_both=True
    ),
}


def seen(changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `changes` of weights, times two fixed inputs: all of a row counts, in few bytes; those
    of biases as they are."""
    inputs = torch.randn(DIT.dim, 2, generator=torch.Generator().manual_seed(4))
    return {
        name: (change @ inputs if change.ndim == 2 else change).contiguous()
        for name, change in changes.items()
    }


def place(folder: Path) -> Path:
    """Return what a person would name: a folder of PEFT, or the file."""
    if (folder / "adapter_config.json").is_file():
        return folder
    return next(file for file in folder.glob("*.safetensors") if file.name != "seen.safetensors")


def record() -> None:
    shutil.rmtree(RECORDED)
    for name, write in CASES.items():
        (RECORDED / name).mkdir(parents=True)
        save_file(seen(write(RECORDED / name)), RECORDED / name / "seen.safetensors")
        print(name, sum(file.stat().st_size for file in (RECORDED / name).iterdir()), "bytes")


if __name__ == "__main__":
    record()
