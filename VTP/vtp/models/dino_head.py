"""The prototype head of DINO and iBOT (Caron et al. 2021; Oquab et al. 2023); used in pre-training
only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp.models.layers import init_linear


class DINOHead(nn.Module):
    """Maps features (…, in_dim) to logits (…, out_dim): an MLP in_dim → hidden → hidden →
    bottleneck, L2 normalisation, then cosine similarity to each of `out_dim` prototypes times its
    gain.

    The gains start at 1 and are trainable.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.apply(init_linear)
        self.prototypes = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.gain = nn.Parameter(torch.ones(out_dim, 1))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return F.linear(x, self.gain * F.normalize(self.prototypes, dim=-1))
