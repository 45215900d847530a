"""Linear layers with a small trainable update beside a frozen weight: LoRA, DoRA and LoKr.

An adapted layer is still a `Linear` under its old name: the base parameters keep their keys
(`blocks.0.q.weight`), and those of the adapter are added beside them (`blocks.0.q.lora_A`). So a
base checkpoint loads strictly before or after injection, and the state of an injected model without
these tensors loads strictly into a plain one. An adapter is float32 whatever the dtype of the base,
and computes in the precision of its input. A call changes no Python state, so adapters are safe
under DDP and torch.compile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2].startswith(("lora_", "lokr_"))


class Adapter(nn.Linear):
    """A linear layer with an update beside its weight. `alpha` may change during training; `scale`,
    which is made of it, is the one place that decides the strength: forward, merge and export all
    use it. `rank_dropout`: the probability with which a part of the update (a rank of LoRA, an
    output row of LoKr) is left out."""

    def __init__(
        self, base: nn.Linear, alpha: float, dropout: float = 0.0, rank_dropout: float = 0.0
    ):
        nn.Module.__init__(self)  # Linear.__init__ would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.alpha, self.dropout, self.rank_dropout = alpha, dropout, rank_dropout
        self.train(base.training)

    @classmethod
    def of(cls, base: nn.Linear, parts: dict[str, Tensor], alpha: float) -> Adapter:
        """Return an adapter of `base` with the given `alpha` and tensors, `parts` by name."""
        layer = cls.__new__(cls)
        Adapter.__init__(layer, base, alpha)
        for name, tensor in parts.items():
            setattr(layer, name, nn.Parameter(tensor.detach().float().to(base.weight.device)))
        return layer

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter, without those of the base layer."""
        return {
            name: parameter
            for name, parameter in self.named_parameters(recurse=False)
            if is_adapter(name)
        }

    @property
    def precise(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def rank(self) -> int:
        """Return the number by which alpha is divided."""
        raise NotImplementedError

    @property
    def outer(self) -> nn.Parameter:
        """Return the factor that starts at zero. The update is proportional to it, so `set_alpha`
        rescales it to keep the strength when alpha changes."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a file holds: those of the adapter, and as `alpha` the scale
        times the rank, for readers divide it by the rank."""
        alpha = torch.tensor(float(self.scale * self.rank))
        return {
            name: parameter.detach() for name, parameter in self.adapter_parameters().items()
        } | {"alpha": alpha}

    def delta(self) -> Tensor:
        """Return the change of the weight, `(out, in)`, at least in float32."""
        raise NotImplementedError

    def update(self, x: Tensor) -> Tensor:
        """Return the update's output `(…, out)` for `x (…, in)`, which is `delta` applied to `x`,
        without forming `delta`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight, self.bias)
        return base + self.update(F.dropout(x, self.dropout, self.training)).to(base.dtype)

    def mask(self, size: int, like: Tensor) -> Tensor:
        """Return ones; in training, each is 0 with probability `rank_dropout`, and the others are
        scaled up to keep the mean."""
        return F.dropout(
            torch.ones(size, device=like.device, dtype=like.dtype), self.rank_dropout, self.training
        )

    def merged_weight(self) -> Tensor:
        return self.weight.detach().to(self.precise) + self.delta()

    def plain(self) -> nn.Linear:
        """Return the base layer as a plain one with the same parameters, without the adapter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> nn.Linear:
        """Return a plain layer with the update merged into a copy of the weight: another layer may
        share the weight itself. `weight`: the layer's `merged_weight`, if it is known already."""
        linear, weight = self.plain(), self.merged_weight() if weight is None else weight
        linear.weight = nn.Parameter(
            weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad
        )
        return linear

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *rest
    ):
        """Load a checkpoint. One without any tensor of the adapter counts as complete: then none is
        reported missing. One with a part of them is incomplete."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        keys = {prefix + part for part in self.adapter_parameters()}
        if not keys & state_dict.keys():
            missing_keys[:] = [key for key in missing_keys if key not in keys]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


def _uniform(
    rows: int, columns: int, fan_in: int, base: nn.Linear, generator: torch.Generator | None
) -> nn.Parameter:
    """Return a parameter with Kaiming-uniform values, a = √5, as in LoRA's code."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(
        torch.empty(rows, columns)
        .uniform_(-bound, bound, generator=generator)
        .to(base.weight.device)
    )


def _zeros(rows: int, columns: int, base: nn.Linear) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, device=base.weight.device))


class LoRALinear(Adapter):
    """`y = W x + b + (alpha / rank) B A x`; `A (rank, in)`, `B (out, rank)` (Hu et al. 2021,
    "LoRA", eq. 3). With `rslora` the scale is alpha / √rank (Kalajdzievski 2023, 2312.03732, eq.
    9)."""

    rslora = False

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, alpha, dropout, rank_dropout)
        self.rslora = rslora
        self.lora_A = _uniform(rank, base.in_features, base.in_features, base, generator)
        self.lora_B = _zeros(base.out_features, rank, base)

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def outer(self) -> nn.Parameter:
        return self.lora_B

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        return self.scale * (
            self.lora_B.detach().to(self.precise) @ self.lora_A.detach().to(self.precise)
        )

    def update(self, x: Tensor) -> Tensor:
        """Return the update as two thin products, which cost rank·(in + out) a token."""
        h = F.linear(x, self.lora_A.to(x.dtype)) * self.scale
        if self.rank_dropout:
            h = h * self.mask(self.rank, h)
        return F.linear(h, self.lora_B.to(h.dtype))


class DoRALinear(LoRALinear):
    """LoRA for the direction of each row of the weight, and a trained length for it: `W' = m (W +
    ΔW) / ‖W + ΔW‖` (Liu et al. 2024, 2402.09353, eq. 5); the norm gets no gradient (section
    4.3)."""

    def __init__(self, base: nn.Linear, *arguments, **options):
        super().__init__(base, *arguments, **options)
        self.lora_magnitude = nn.Parameter(self._norm())

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Return the lengths `(out,)` of the rows of W + s B A, computed from W, A and B without
        forming the sum."""
        weight, a, b = (
            tensor.to(self.precise) for tensor in (self.weight, self.lora_A, self.lora_B)
        )
        crossed, gram = weight @ a.T, a @ a.T
        square = (
            weight.square().sum(1)
            + (2 * self.scale * crossed * b).sum(1)
            + self.scale**2 * ((b @ gram) * b).sum(1)
        )
        return square.clamp(min=1e-30).sqrt().to(self.lora_A.dtype)

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight)
        stretch = (self.lora_magnitude / self._norm()).to(base.dtype)
        y = (base + self.update(F.dropout(x, self.dropout, self.training)).to(base.dtype)) * stretch
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged_weight(self) -> Tensor:
        return (
            super().merged_weight() * (self.lora_magnitude / self._norm()).to(self.precise)[:, None]
        )


def factorise(size: int, factor: int) -> tuple[int, int]:
    """Return a and b of `size = a · b`, the smaller first. One of them is `factor` if that divides
    `size`, else the largest divisor below it; with -1 they are as close to each other as can be."""
    limit = math.isqrt(size) if factor < 0 else min(factor, size)
    a = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return min(a, size // a), max(a, size // a)


class LoKrLinear(Adapter):
    """`ΔW = scale · W1 ⊗ W2` (Yeh et al. 2023, "LyCORIS", 2309.14859, section 4.2), `W1 (l, m)`,
    `W2 (k, n)`, out = l·k, in = m·n. Each factor is a whole matrix, or a product of two of rank
    `rank`. If both are whole, there is no rank to divide by, and the scale is 1."""

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        factor: int = 8,
        full_second: bool = False,
        decompose_first: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, alpha, dropout, rank_dropout)
        rows, inner_rows = factorise(base.out_features, factor)
        columns, inner_columns = factorise(base.in_features, factor)
        if decompose_first and rank < max(rows, columns) / 2:
            self.lokr_w1_a = _uniform(rows, rank, columns, base, generator)
            self.lokr_w1_b = _uniform(rank, columns, columns, base, generator)
        else:
            self.lokr_w1 = _uniform(rows, columns, columns, base, generator)
        if full_second or rank >= max(inner_rows, inner_columns) / 2:
            self.lokr_w2 = _zeros(inner_rows, inner_columns, base)
        else:
            self.lokr_w2_a = _zeros(inner_rows, rank, base)
            self.lokr_w2_b = _uniform(rank, inner_columns, inner_columns, base, generator)

    @property
    def rank(self) -> int:
        """Return the rank of the second factor if it is a product, else that of the first; 1 where
        both are whole."""
        parameters = self.adapter_parameters()
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in parameters:
                return len(parameters[name])
        return 1

    @property
    def outer(self) -> nn.Parameter:
        parameters = self.adapter_parameters()
        return parameters["lokr_w2"] if "lokr_w2" in parameters else parameters["lokr_w2_a"]

    @property
    def scale(self) -> float:
        return 1.0 if len(self.adapter_parameters()) == 2 else self.alpha / self.rank

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return W1 and W2, without the scale."""
        parts = {name: part.to(dtype) for name, part in self.adapter_parameters().items()}
        for name in ("lokr_w1", "lokr_w2"):
            if name not in parts:
                parts[name] = parts[f"{name}_a"] @ parts[f"{name}_b"]
        return parts["lokr_w1"], parts["lokr_w2"]

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.scale * torch.kron(*self.factors(self.precise))

    def update(self, x: Tensor) -> Tensor:
        """Return W1 X W2ᵀ, where X is the (m, n) view of x: the Kronecker product is never
        formed."""
        first, second = self.factors(x.dtype)
        square = x.unflatten(-1, (first.shape[1], second.shape[1]))
        h = torch.matmul(self.scale * first, square @ second.T).flatten(-2)
        return h * self.mask(self.out_features, h) if self.rank_dropout else h


def adapter_type(parts: dict[str, Tensor]) -> tuple[type[Adapter], int, int]:
    """Return the adapter class to which tensors of these names belong, and the `(in, out)` of the
    layers that they fit. ValueError if they do not make a complete adapter."""
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    names = set(shapes)
    if any(len(shape) != (1 if name == "lora_magnitude" else 2) for name, shape in shapes.items()):
        raise ValueError(f"its tensors have the shapes {shapes}, must be matrices")
    if {"lora_A", "lora_B"} <= names <= {"lora_A", "lora_B", "lora_magnitude"}:
        (rank, columns), (rows, other_rank) = shapes["lora_A"], shapes["lora_B"]
        if not other_rank == rank > 0:
            raise ValueError(
                f"lora_A {shapes['lora_A']} and lora_B {shapes['lora_B']} do not share a rank"
            )
        if shapes.get("lora_magnitude", (rows,)) != (rows,):
            raise ValueError(
                f"lora_magnitude {shapes['lora_magnitude']} and lora_B {shapes['lora_B']} are of"
                " different layers"
            )
        return DoRALinear if "lora_magnitude" in names else LoRALinear, columns, rows
    known = {f"{factor}{end}" for factor in ("lokr_w1", "lokr_w2") for end in ("", "_a", "_b")}
    rows, columns = 1, 1
    for factor in ("lokr_w1", "lokr_w2"):
        whole, a, b = (shapes.get(factor + end) for end in ("", "_a", "_b"))
        sizes = whole
        if a and b and a[1] == b[0] and not whole:
            sizes = a[0], b[1]
        if sizes is None or (whole and (a or b)):
            raise ValueError(
                f"it lacks or repeats {factor}, of the tensors {', '.join(sorted(names))}: the file"
                " is incomplete"
            )
        rows, columns = rows * sizes[0], columns * sizes[1]
    if names - known:
        raise ValueError(
            f"its tensors are {', '.join(sorted(names))}, which is no LoRA, DoRA or LoKr"
        )
    return LoKrLinear, columns, rows
