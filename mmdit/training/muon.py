"""Muon (Jordan et al. 2024) for many matrices at once, and for sharded matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmdit.training.memory.shards import local, place, whole

AT_ONCE = 2**26  # elements of the matrices that are updated together, which bounds the memory


class StackedMuon(torch.optim.Muon):
    """Updates all matrices of one shape together.

    The updates are those of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Liu et al.
    2025, 2502.16982, eq. 4), up to rounding. Torch launches some thirty kernels for each matrix,
    and a block has over ten matrices, each too small for a GPU. As in torch's fused AdamW,
    `found_inf` (1 or 0, on the device; None: 0) leaves weights and momenta unchanged in a step, and
    `grad_scale` divides the gradients.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                count = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(matrices), count):
                    self._step_equal(matrices[first : first + count], group)

    def _step_equal(self, matrices: list[Tensor], group: dict) -> None:
        """Update matrices of one shape with the settings of `group`."""
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        gradients = [p.grad for p in matrices if p.grad is not None]
        gradient = torch.stack(gradients)  # (matrices, rows, columns)
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        before = torch.stack(momenta)
        momentum = before.lerp(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp_(momentum, group["momentum"]), group["ns_steps"])
        # A replayed graph reads a rate on the device anew; a Python number would be fixed in it.
        lr = group["lr"]
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, device=gradient.device)
        update = update.to(gradient.dtype) * (lr * (0.2 * math.sqrt(max(gradient.shape[1:]))))
        decay = 1 - lr * group["weight_decay"]
        if self.found_inf is not None:
            skip = self.found_inf > 0
            momentum = torch.where(skip, before, momentum)
            update.masked_fill_(skip, 0)
            decay = torch.where(skip, torch.ones_like(decay), decay)
        torch._foreach_copy_(momenta, momentum.unbind())
        torch._foreach_mul_(matrices, decay)
        torch._foreach_sub_(matrices, update.unbind())


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Return `matrices (n, rows, columns)` with all singular values near 1 (0.7 … 1.2), by `steps`
    of the Newton-Schulz iteration of Jordan et al. (2024), whose three coefficients raise small
    singular values fastest. It computes in bfloat16; on a CPU in float32, because many CPUs have no
    instructions for bfloat16 and take twenty times as long."""
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if tall else x


class GatheredMuon(StackedMuon):
    """Muon for sharded matrices. An update needs the whole matrix: each matrix is gathered in turn,
    with its gradient and momentum, every process computes the same update, and keeps its part."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                matrix = nn.Parameter(whole(p.detach()))
                matrix.grad = whole(p.grad)
                alone = StackedMuon([{**group, "params": [matrix]}])
                alone.found_inf, alone.grad_scale = self.found_inf, self.grad_scale
                if state := self.state[p]:
                    alone.state[matrix]["momentum_buffer"] = whole(state["momentum_buffer"])
                alone.step()
                local(p).copy_(local(place(matrix.detach(), p)))
                state["momentum_buffer"] = place(alone.state[matrix]["momentum_buffer"], p)
