"""Text as further keys (MM-DiT, Esser et al. 2024, 2403.03206, with text that stays as it is):
tokens of a picture attend to each other and to the caption in one softmax, without
cross-attention."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.models import VideoMMDiT
from mmdit.models.video_mmdit import Block
from mmdit.nn.attention import attend
from mmdit.nn.norm import Modulation, add_norm
from mmdit.nn.tiles import Frames
from mmdit.nn.window import Places


class JointBlock(nn.Module):
    """Space and text together, then the MLP. Of `block.cross` keys and values are left."""

    def __init__(self, block: Block):
        super().__init__()
        self.spatial, self.cross, self.mlp = block.spatial, block.cross, block.mlp
        self.table = block.table
        self.cross.q, self.cross.q_norm, self.cross.proj = (nn.Identity() for _ in range(3))

    def forward(
        self,
        x: Tensor,
        change: Tensor | None,
        gate: Tensor | None,
        modulation: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        valid: Tensor,
        places: Places,
        frames: Frames,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = rearrange(modulation + self.table, "b m d -> m b 1 1 1 d").unbind()
        space, mlp = Modulation(*parts[:3]), Modulation(*parts[-3:])
        x, seen = add_norm(x, change, gate, space)
        x, seen = add_norm(x, self.read(seen, text, valid, places), space.gate, mlp)
        return x, self.mlp(seen), mlp.gate

    def read(self, x: Tensor, text, valid: Tensor, places: Places) -> Tensor:
        texts = text if isinstance(text, tuple) else self.cross.keys_values(text)
        parts = self.spatial.self_attention_heads(x, places.rotary, 3)
        q, *pictures = (rearrange(part, "b 1 1 k h d -> b h k d") for part in parts)
        texts = [rearrange(part, "b t (h d) -> b h t d", h=q.shape[1]) for part in texts]
        k, v = (torch.cat(pair, 2) for pair in zip(pictures, texts))
        seen = attend(q, k, v, F.pad(valid, (q.shape[2], 0), value=True)[:, None, None])
        return self.spatial.output(rearrange(seen, "b h k d -> b 1 1 k (h d)"))


def joint_text(model: VideoMMDiT) -> None:
    """Change `model` in place."""
    model.blocks = nn.ModuleList(JointBlock(block) for block in model.blocks)
