"""The fused kernels compute what the plain path does: interpreted on a CPU, whole models, outputs
and all gradients."""

import json
import warnings

import pytest
import torch

from mmdit.nn import kernels
from tests.helpers.interpreter import interpreted
from tests.helpers.thorough import thorough

ROUNDING = """
import torch
from mmdit.nn import kernels, products
generator = torch.Generator().manual_seed(0)
def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)
whole = integers(-8, 9, 37, 96) * 2.0 ** integers(-3, 5, 37, 96)
# So codes are these numbers; what lies between them Triton's interpreter rounds in its own way.
whole[:, 0] = 448
whole[3] = 0
x = whole * torch.logspace(-20, 20, 37, base=2).log2().round().exp2()[:, None]
kernels.rounding.PROGRAMS = 5
for columns in (None, 2.0 ** integers(-2, 3, 96)):
    found, scale = products.codes(x if columns is None else (x / columns).bfloat16(), columns)
    assert torch.equal(found.float(), whole), (found.float() - whole).abs().max()
    assert torch.equal(scale[4:] * 448, x[4:, :1].abs())
    assert scale[3] > 0
kernels.can_run = lambda x: False
found, scale = products.codes(x)
assert torch.equal(found.float(), whole)
"""


def apart(*cases: int, further: str = "") -> dict[str, float]:
    """Return how far results of kernels are from those of the plain path, by case."""
    words = ["--cases", *map(str, cases)]
    code = f"from tests.drivers import fused_kernels; fused_kernels.main({words})\n{further}"
    rows = map(json.loads, interpreted(code).splitlines())
    return {row["case"]: row["fused_to_plain"] for row in rows}


def test_a_small_block_agrees_with_the_plain_path_and_rounding_does_exactly():
    distances = apart(9, further=ROUNDING)
    assert len(distances) == 3 and max(distances.values()) < 2e-5, distances


# The other cases: tests/drivers/fused_kernels.py, also for GPUs.
@pytest.mark.parametrize(
    "case",
    [
        *thorough(1),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 7, 8)),
    ],
)
def test_whole_models_and_attention_to_text_agree_with_the_plain_path(case):
    """Attention to text by one program and by several."""
    distances = apart(case)
    assert len(distances) == 3 and max(distances.values()) < 2e-5, distances


OWN = {
    "index": "*i32",
    "names": "*i32",
    "valid": "*u8",
    **dict.fromkeys(("gain_grads", "sums", "grad_stream", "grad_x"), "*fp32"),
    **dict.fromkeys(
        ("summed", "x", "q_gain", "k_gain", "cosine", "sine", "gate", "shift", "grad_kv"), "*fp32"
    ),
}
NUMBERS = (
    "groups",
    "block",
    "length",
    "chunk",
    "keys",
    "tokens",
    "steps",
    "apart",
    "run",
    "width",
    "gate_step",
    "shift_step",
    "scale_step",
)


@pytest.mark.parametrize(
    "which, sizes",
    [
        (
            "attention._group_kernel",
            {"HEADS": 18, "ROWS": 64, "D": 64, "NORM": True, "ROTATE": True, "BACKWARD": True},
        ),
        (
            "attention._text_kernel",
            {"HEADS": 18, "ROWS": 64, "KEYS": 32, "D": 64, "NORM": True, "BACKWARD": True},
        ),
        *(("swiglu._swiglu", {"BACKWARD": backward, "D": 1024}) for backward in (False, True)),
        *(("rounding._rows", {"COLUMNS": columns, "D": 8192}) for columns in (False, True)),
        *(
            (f"residual.{name}", {"D": d, "ROWS": rows, "STAGES": stages})
            for name in ("_forward", "_backward")
            for d, rows, stages in ((512, 4, 3), (2048, 1, 4), (4096, 1, 2))
        ),
        *(
            (
                "heads._heads_kernel",
                {
                    "HEADS": 5,
                    "ROWS": 64,
                    "D": 64,
                    "NORM": True,
                    "ROTATE": True,
                    "BACKWARD": backward,
                },
            )
            for backward in (False, True)
        ),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_here(which, sizes):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmdit.nn.fused import attention_kernels as fused_attention
    from mmdit.nn.fused import heads as fused_heads
    from mmdit.nn.fused import residual as fused_residual
    from mmdit.nn.fused import rounding as fused_rounding
    from mmdit.nn.fused import swiglu as fused_swiglu

    module, name = which.split(".")
    modules = {
        "attention": fused_attention,
        "heads": fused_heads,
        "swiglu": fused_swiglu,
        "residual": fused_residual,
        "rounding": fused_rounding,
    }
    kernel = getattr(modules[module], name)
    types = {
        arg: "constexpr" if arg in sizes else "i32" if arg in NUMBERS else OWN.get(arg, "*bf16")
        for arg in kernel.arg_names
    }
    if module == "residual":
        types["scale"] = "*fp32"
    if module == "rounding":
        types |= {"result": "*fp8e4nv", "columns": "*fp32", "scales": "*fp32"}
    constants = {(kernel.arg_names.index(arg),): value for arg, value in sizes.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert (
        made.asm["cubin"] and made.metadata.shared <= 99 * 1024
    )  # what a program may have on any GPU since the A100


def test_a_compiled_block_launches_the_kernels_itself(monkeypatch):
    """Called as operators written in Python they would take a GPU's time on the CPU, some 0.1 ms
    each."""
    triton = pytest.importorskip("triton")
    from torch._functorch.aot_autograd import aot_function
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    from mmdit.nn.fused.attention_kernels import group_attention, text_attention
    from mmdit.nn.fused.residual import add_norm
    from mmdit.nn.fused.rounding import float8_rows
    from mmdit.nn.fused.swiglu import swiglu

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    launched = []

    def compiler(graph, inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        assert not [node for node in calls if "mmdit" in str(node.target)]
        for node in (node for node in calls if "triton" in str(node.target)):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernel = (
                kernel if isinstance(kernel, triton.JITFunction) else kernel.fn
            )  # of an autotuner, which is how options come
            assert "stream" not in kernel.arg_names, "Inductor has an argument of this name itself"
            numbers = [
                node.kwargs["kwargs"][argument.name]
                for argument in kernel.params
                if not argument.is_constexpr
            ]
            assert not [number for number in numbers if isinstance(number, float)], (
                "which Inductor makes float64"
            )
            launched.append((kernel.__name__, *node.kwargs["tensors_to_clone"]))
        return graph

    def work(x, change, gate, shift, scale, qkv, gain, keys, values, index, names, valid):
        stream, y = add_norm(x, change, gate, shift, scale, torch.bfloat16)
        y = y + group_attention(qkv, [gain, gain], index, names, [], 2)
        y = text_attention(y, keys, values, valid, [gain], 2)
        return stream, swiglu(y), float8_rows(y.detach().flatten(0, 1), None)[1]

    bf16 = {"requires_grad": True, "dtype": torch.bfloat16}
    with FakeTensorMode():
        vectors = [torch.randn(2, 64, requires_grad=True) for _ in range(3)]
        tables = [
            torch.zeros(5, 64, dtype=torch.int32),
            torch.zeros(5, 64, dtype=torch.int32),
            torch.ones(2, 7, dtype=torch.bool),
        ]
        outputs = aot_function(work, compiler)(
            torch.randn(2, 320, 64, requires_grad=True),
            torch.randn(2, 320, 64, **bf16),
            *vectors,
            torch.randn(2, 320, 192, **bf16),
            torch.randn(32, requires_grad=True),
            torch.randn(2, 7, 64, **bf16),
            torch.randn(2, 7, 64, **bf16),
            *tables,
        )
        sum(output.float().sum() for output in outputs if output.requires_grad).backward()
    assert sorted(launched) == sorted(
        [
            ("_forward", "summed", "y"),
            ("_group_kernel", "out"),
            ("_text_kernel", "out"),
            ("_swiglu", "result"),
            ("_rows", "result", "scales"),
            ("_swiglu", "result"),
            ("_text_kernel", "grad_q", "grad_kv", "gain_grads"),
            ("_group_kernel", "grad_qkv", "gain_grads"),
            ("_backward", "grad_x", "grad_change", "sums"),
        ]
    ), launched


@pytest.mark.parametrize("capability, told", [((9, 0), False), ((7, 5), True)])
def test_older_gpus_take_the_plain_path_and_are_told_once(monkeypatch, capability, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_able", True)
    monkeypatch.setattr(kernels, "residual", kernels)  # there
    with warnings.catch_warnings(record=True) as heard:
        kernels.check_device(torch.device("cpu"))
        kernels.check_device(torch.device("cuda", 0))
    assert (
        kernels._able is not told
        and [("(7, 5)" in str(line.message)) for line in heard] == [True] * told
    )
