"""Which colour belongs to which shape: how soon a text encoder that is trained from nothing says
it, with and without a convolution over neighbouring words."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from mmdit.data.moving_shapes.drawing import draw
from mmdit.data.moving_shapes.facts import COLORS, SHAPES, Facts
from mmdit.data.moving_shapes.sentences import caption, prompts
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder

DIM, HEADS, BATCH, SCENES, MOST = 64, 4, 64, 4096, 3


class Reader(nn.Module):
    """Names the colours of shapes, by one layer of attention from each shape to a caption."""

    def __init__(self):
        super().__init__()
        self.shapes = nn.Embedding(len(SHAPES), DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.colors = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, 8))

    def forward(self, shapes, text):
        parts = self.q(self.shapes(shapes)), self.k(text.embeddings), self.v(text.embeddings)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=HEADS) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v, text.valid[:, None, None])
        return self.colors(rearrange(read, "b h n d -> b n (h d)"))


def named(scenes: list[Facts]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the shapes and of the colours `(n, MOST)` of scenes; the colour of a
    place that a scene leaves empty is -1."""
    shapes, colors = torch.zeros(len(scenes), MOST).long(), torch.full((len(scenes), MOST), -1)
    for row, scene in enumerate(scenes):
        for place, item in enumerate(scene.objects):
            shapes[row, place] = SHAPES.index(item.shape)
            colors[row, place] = list(COLORS).index(item.color)
    return shapes, colors


def bound(convolution: int, steps: int, seed: int = 0, lr: float = 2e-3) -> float:
    """Return the share of the prompts of held-out pairs whose colours are all right after some
    steps."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(ByteLevelConfig(dim=DIM, depth=2, convolution=convolution))
    reader = Reader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95))
    scenes = draw(
        0, range(SCENES), video=False, width=128, height=128, variant="many", task="attribution"
    )
    captions = [caption(scene, 0, i, complete=True) for i, scene in enumerate(scenes)]
    shapes, colors = named(scenes)
    for _ in range(steps):
        rows = torch.randint(SCENES, (BATCH,))
        guess = reader(shapes[rows], encoder([captions[i] for i in rows]))
        loss = F.cross_entropy(guess.flatten(0, 1), colors[rows].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    asked = prompts("held_out", False, 128, 128, "attribution")
    shapes, colors = named([prompt.facts for prompt in asked])
    with torch.no_grad():
        guess = reader(shapes, encoder([prompt.caption for prompt in asked])).argmax(-1)
    return ((guess == colors) | (colors < 0)).all(dim=1).float().mean().item()


@pytest.mark.slow
def test_neighbouring_words_side_by_side_bind_colours_to_shapes_sooner():
    results = {convolution: bound(convolution, 150) for convolution in (1, 5)}
    print(results)
    assert results[5] > 0.95 and results[1] < 0.3, results
