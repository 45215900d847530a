"""Wan at its released sizes on one GPU, with random weights made there: how far bfloat16 is from
float32, and what a LoRA step costs, beside diffusers with peft where they are installed. A JSON
line for each result.

    python -m tests.drivers.gpu_wan  # all, what has no time left (--seconds 230) is said
    python -m tests.drivers.gpu_wan --only 5b_kv  # or 1.3b, or 5b_attention
    python -m tests.drivers.gpu_wan --tiny                   # on a CPU, to see that it runs

Steps: batch 1, rank 16, bfloat16 base, autocast, fused AdamW on float32 adapters, 100 words of a
padded text; median of 5 after one that warms up (and compiles). `tflops`: the work of one forward
and backward pass, recomputation not counted; `share`: of the rate of an 8192³ bfloat16 product in
the same call. Memory: what tensors take at most, of 120 GB that are allowed. Compiling may take a
minute for each shape and kind of stream.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmdit.adapters import LoRAConfig, inject
from mmdit.models.wan import WanConfig, WanDiT
from mmdit.models.wan_denoiser import WanDenoiser
from mmdit.training.learner import GRAPHS

RANK, WORDS, GIGABYTES = 16, 100, 120
ATTENTION = (
    ("*.self_attn.[qkvo]", "*.cross_attn.[qkvo]"),
    r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
)
WORDS_ALONE = ("cross_attn.k", "cross_attn.v"), r".*\.attn2\.(to_k|to_v)"
SMALL, LARGE = WanConfig(1536, 8960, 12, 30), WanConfig(3072, 14336, 24, 30, 48, 48)
# config, latent (frames, rows, columns), those of the float32 reference, ours and their targets,
# aims (seconds, GB)
SHAPES = {
    "5b_kv": (LARGE, (31, 44, 80), (5, 44, 80), WORDS_ALONE, [(2.8, 120), (3.8, 19)]),
    "5b_attention": (LARGE, (31, 44, 80), (5, 44, 80), ATTENTION, []),
    "1.3b": (SMALL, (21, 60, 104), (6, 60, 104), ATTENTION, []),
}
PEERS = {
    "1.3b": (2.60, 9.0),
    "5b_kv": (4.00, 18.9),
    "5b_attention": (4.22, 19.3),
}  # measured before, another call


@dataclass(frozen=True)
class Way:
    """How our step is taken."""

    name: str
    checkpointing: bool = False
    every: int = 1
    residual: str = "float32"
    compiled: bool = True
    collapse: bool = True
    offload: bool = False


WAYS = [  # the likely best first, what is compiled anew last; None: the peer
    Way("plain"),
    Way("checkpointing, bf16 stream", checkpointing=True, residual="autocast"),
    None,
    Way("checkpointing", checkpointing=True),
    Way("plain, bf16 stream", residual="autocast"),
    Way("bf16 stream, activations on the CPU", residual="autocast", offload=True),
    Way(
        "bf16 stream, every second block, activations on the CPU",
        checkpointing=True,
        every=2,
        residual="autocast",
        offload=True,
    ),
    Way("every second block", checkpointing=True, every=2),
    Way("plain, padding not collapsed", collapse=False),
    Way("checkpointing, not compiled", checkpointing=True, compiled=False),
]


def say(**values) -> None:
    rounded = {
        key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()
    }
    print(json.dumps(rounded), flush=True)


def build(config: WanConfig, device: str, dtype: torch.dtype) -> WanDiT:
    """Random weights that bfloat16 can hold, whatever `dtype` is, so that models of two types are
    the same function."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanDiT(config)
    for name, meta in list(model.named_parameters()):
        value = torch.randn(meta.shape, device=device) * (
            0.05 if meta.ndim < 2 else 1 / math.sqrt(meta[0].numel())
        )
        value = value + 1 if "norm" in name and name.endswith("weight") else value
        module, _, leaf = name.rpartition(".")
        weight = nn.Parameter(
            value.bfloat16().to(WanDiT.stored_dtype(name, dtype)), requires_grad=False
        )
        setattr(model.get_submodule(module), leaf, weight)
    return model


def inputs(
    config: WanConfig, grid: tuple[int, int, int], device: str, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.zeros(1, length, config.text_dim, device=device)
    words = min(WORDS, length - 1)
    text[:, :words] = torch.randn(1, words, config.text_dim, device=device) * 0.2
    return (
        torch.randn(1, config.in_dim, *grid, device=device),
        torch.tensor([417.3], device=device),
        text,
    )


class Bench:
    def __init__(self, device: str, tiny: bool, steps: int, deadline: float):
        self.device, self.tiny, self.steps, self.deadline = device, tiny, steps, deadline
        self.cuda, self.known = device == "cuda", set()
        torch._dynamo.config.recompile_limit = GRAPHS
        if self.cuda:
            share = GIGABYTES * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        self.rate = self.matmul_rate()
        say(what="matmul", tflops=self.rate / 1e12, torch=torch.__version__)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def matmul_rate(self) -> float:
        side, count = (64, 3) if self.tiny else (8192, 30)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            a @ b
        self.wait()
        begin = time.perf_counter()
        for _ in range(count):
            a @ b
        self.wait()
        return 2 * side**3 * count / (time.perf_counter() - begin)

    @torch.no_grad()
    def precision(
        self, shape: str, config: WanConfig, grid: tuple[int, int, int], whole: tuple[int, int, int]
    ) -> None:
        """Both with the same weights; the reference's products are float32 throughout (no TF32)."""
        results = {}
        torch.backends.cudnn.allow_tf32 = False  # of the patch embedding
        for name, dtype in (
            ("float32", torch.float32),
            ("bfloat16", torch.bfloat16),
            ("autocast", torch.float32),
        ):
            model = build(config, self.device, dtype).eval()
            with torch.autocast(self.device, torch.bfloat16, enabled=name == "autocast"):
                results[name] = model(*inputs(config, grid, self.device, config.text_len)).float()
            if name == "bfloat16":
                model.residual = "autocast"
                results["bfloat16, bf16 stream"] = model(
                    *inputs(config, grid, self.device, config.text_len)
                ).float()
            del model
            self.free()
        tokens, all_tokens = math.prod(grid) // 4, math.prod(whole) // 4
        for name in ("bfloat16", "bfloat16, bf16 stream", "autocast"):
            error = (results[name] - results["float32"]).norm() / results["float32"].norm()
            say(
                what="forward error",
                shape=shape,
                arithmetic=name,
                relative_l2=error.item(),
                tokens=tokens,
                note=f"of {all_tokens}: attention in float32 takes long",
            )

    def step(
        self, shape: str, who: str, forward, parameters: list, flops: float, **facts
    ) -> float | None:
        """Median seconds, None where it does not run (and why is said)."""
        optimizer, seconds = torch.optim.AdamW(parameters, 1e-4, fused=self.cuda), []
        self.free()
        try:
            for number in range(1 + self.steps):
                self.wait()
                begin = time.perf_counter()
                with torch.autocast(self.device, torch.bfloat16):
                    loss = forward().float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                self.wait()
                seconds.append(time.perf_counter() - begin)
                if number and time.monotonic() > self.deadline:
                    break
        except Exception as error:
            optimizer.zero_grad()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            say(what="step", shape=shape, who=who, **facts, failed=reason)
            return None
        median = statistics.median(seconds[1:])
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
        say(
            what="step",
            shape=shape,
            who=who,
            **facts,
            ms=1000 * median,
            peak_gb=peak,
            tflops=flops / median / 1e12,
            share=flops / median / self.rate,
            warm_up_s=seconds[0],
            steps=len(seconds) - 1,
            loss=loss.item(),
        )
        return median

    def ours(
        self,
        shape: str,
        model: WanDiT,
        way: Way,
        grid: tuple[int, int, int],
        targets: tuple[str, ...],
    ) -> float | None:
        model.checkpointing, model.checkpoint_every, model.residual = (
            way.checkpointing,
            way.every,
            way.residual,
        )
        model.collapse_padding, model.offload_activations = way.collapse, way.offload
        for block in model.blocks:
            block._compiled_call_impl = None
            if way.compiled:
                block.compile(dynamic=False, backend="aot_eager" if self.tiny else "inductor")
        parameters = [p for p in model.parameters() if p.requires_grad]
        x, t, text = inputs(model.config, grid, self.device, min(112, model.config.text_len) - 1)
        flops = WanDenoiser.train_flops(model, grid, text.shape[1])
        return self.step(
            shape,
            "ours",
            lambda: model(x, t, text),
            parameters,
            flops,
            way=way.name,
            compiled=way.compiled,
            checkpointing=way.checkpointing,
            trained=sum(p.numel() for p in parameters),
            targets=list(targets),
        )

    def peer(
        self, shape: str, config: WanConfig, grid: tuple[int, int, int], targets: str, flops: float
    ) -> float | None:
        try:
            import diffusers
            import peft
        except ImportError as error:
            say(
                what="step",
                shape=shape,
                who="diffusers + peft",
                failed=f"not installed: {error.name}",
            )
            return None
        torch.manual_seed(0)
        with torch.device(self.device):
            model = diffusers.WanTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=config.dim // config.num_heads,
                ffn_dim=config.ffn_dim,
                in_channels=config.in_dim,
                out_channels=config.out_dim,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                num_layers=config.num_layers,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
            )
        kept = tuple(model._keep_in_fp32_modules)
        for name, weight in model.named_parameters():
            weight.data = (
                weight.data if any(word in name for word in kept) else weight.data.bfloat16()
            )
        model.requires_grad_(False)
        model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        model.enable_gradient_checkpointing()
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        x, t, text = inputs(config, grid, self.device, 512)
        x, text = x.bfloat16(), text.bfloat16()
        forward = lambda: model(x, t, text, return_dict=False)[0]
        versions = f"{diffusers.__version__} + {peft.__version__}"
        return self.step(
            shape,
            "diffusers + peft",
            forward,
            parameters,
            flops,
            versions=versions,
            checkpointing=True,
            trained=sum(p.numel() for p in parameters),
        )

    def shape(self, shape: str) -> None:
        config, grid, fewer, (targets, theirs), aims = SHAPES[shape]
        if self.tiny:
            config = replace(
                config, dim=256, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, freq_dim=16
            )
            grid, fewer = (3, 4, 6), (2, 4, 6)
        if config not in self.known:
            self.precision(shape, config, fewer, grid)
        self.known.add(config)
        flops = WanDenoiser.train_flops(build(config, "meta", torch.bfloat16), grid, 512)
        medians: dict[str, float] = {}
        model = None
        for way in WAYS:
            if time.monotonic() > self.deadline - (
                0 if self.tiny else 30 if medians else 80
            ):  # the first one compiles
                name = way.name if way else "diffusers + peft"
                say(
                    what="skipped",
                    shape=shape,
                    way=name,
                    why="no time left: raise --seconds or use --only",
                )
                continue
            if way is None:
                model = None  # so that it does not count in the peer's memory
                self.free()
                median = self.peer(shape, config, grid, theirs, flops)
            else:
                if model is None:
                    model = build(config, self.device, torch.bfloat16)
                    inject(
                        model,
                        LoRAConfig(
                            enabled=True, rank=RANK, alpha=float(RANK), target_modules=targets
                        ),
                        seed=0,
                    )
                    model.train()
                median = self.ours(shape, model, way, grid, targets)
            if median:
                medians[way.name if way else "peer"] = median
            self.free()
        mine = {name: median for name, median in medians.items() if name != "peer"}
        if mine:
            best = min(mine, key=mine.get)
            peer = medians.get("peer")
            faster = (
                {name: round(peer / median, 3) for name, median in mine.items()} if peer else None
            )
            say(
                what="summary",
                shape=shape,
                best=best,
                seconds=mine[best],
                aims=[f"{s} s within {gb} GB" for s, gb in aims],
                peer_here=peer,
                peer_before=PEERS[shape][0],
                peer_before_gb=PEERS[shape][1],
                times_faster=faster,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--seconds", type=float, default=230.0, help="begin nothing that would end later [230]"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    args = parser.parse_args()
    begin = time.monotonic()
    bench = Bench(
        "cpu" if args.tiny else "cuda",
        args.tiny,
        2 if args.tiny else args.steps,
        begin + args.seconds,
    )
    for shape in args.only:
        bench.shape(shape)
    say(what="done", seconds=time.monotonic() - begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
