"""Which colour belongs to which shape, and where one shape is from another: how soon a text encoder
that is trained from nothing says it, with and without a convolution over neighbouring words.

    python -m tests.test_binding 5 300 --task position  # the share of the prompts that are right
"""

import argparse

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.data.moving_shapes.drawing import draw
from mmdit.data.moving_shapes.facts import COLORS, RELATIONS, SHAPES, Facts
from mmdit.data.moving_shapes.sentences import OPPOSITE, caption, prompts
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder

DIM, HEADS, BATCH, SCENES, MOST = 64, 4, 64, 4096, 4


class Reader(nn.Module):
    """Answers what a caption says of two shapes, or twice the same one, by a layer of attention."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Embedding(len(SHAPES), DIM) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.answers = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, 8))

    def forward(self, shapes, text):
        asked = self.first(shapes[..., 0]) + self.second(shapes[..., 1])
        parts = self.q(asked), self.k(text.embeddings), self.v(text.embeddings)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=HEADS) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v, text.valid[:, None, None])
        return self.answers(asked + rearrange(read, "b h n d -> b n (h d)"))


def answers(scene: Facts) -> list[tuple[str, str, int]]:
    """Return the pairs of shapes that may be asked about, and what the caption says: the number of
    the relation, either way round, or for a shape beside itself of its colour."""
    shapes = [item.shape for item in scene.objects]
    if scene.task == "position":
        said = list(zip(shapes, scene.relations, shapes[1:], strict=False))
        said += [(b, OPPOSITE[relation], a) for a, relation, b in said]
        return [(a, b, list(RELATIONS).index(relation)) for a, relation, b in said]
    colors = [list(COLORS).index(item.color) for item in scene.objects]
    return list(zip(shapes, shapes, colors, strict=True))


def numbered(scenes: list[Facts]) -> tuple[Tensor, Tensor]:
    """Return the numbers of the shapes `(n, MOST, 2)` and of the answers `(n, MOST)` of scenes; an
    answer that a scene does not have is -1."""
    shapes, numbers = torch.zeros(len(scenes), MOST, 2).long(), torch.full((len(scenes), MOST), -1)
    for row, scene in enumerate(scenes):
        for place, (first, second, number) in enumerate(answers(scene)):
            shapes[row, place, 0] = SHAPES.index(first)
            shapes[row, place, 1] = SHAPES.index(second)
            numbers[row, place] = number
    return shapes, numbers


def bound(task: str, convolution: int, steps: int, seed: int = 0, lr: float = 2e-3) -> float:
    """Return the share of a task's prompts of held-out pairs of which all answers are right after
    some steps."""
    torch.manual_seed(seed)
    encoder = build_text_encoder(ByteLevelConfig(dim=DIM, depth=2, convolution=convolution))
    reader = Reader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95))
    scenes = draw(0, range(SCENES), video=False, width=128, height=128, variant="many", task=task)
    captions = [caption(scene, 0, i, complete=True) for i, scene in enumerate(scenes)]
    shapes, numbers = numbered(scenes)
    for _ in range(steps):
        rows = torch.randint(SCENES, (BATCH,))
        guess = reader(shapes[rows], encoder([captions[i] for i in rows]))
        loss = F.cross_entropy(guess.flatten(0, 1), numbers[rows].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    asked = prompts("held_out", False, 128, 128, task)
    shapes, numbers = numbered([prompt.facts for prompt in asked])
    with torch.no_grad():
        guess = reader(shapes, encoder([prompt.caption for prompt in asked])).argmax(-1)
    return ((guess == numbers) | (numbers < 0)).all(dim=1).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("task, steps", [("attribution", 150), ("position", 600)])
def test_neighbouring_words_side_by_side_bind_words_to_shapes_sooner(task, steps):
    results = {convolution: bound(task, convolution, steps) for convolution in (1, 5)}
    print(results)
    assert results[5] > 0.8 and results[1] < 0.3, results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("convolution", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--task", default="attribution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(vars(args), bound(args.task, args.convolution, args.steps, args.seed))
