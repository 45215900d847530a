"""A workshop whose tiny model is post-trained by the command."""

from pathlib import Path

from tests.helpers.tiny import Workshop

SECTION = """
posttrain:
  prompt_count: 8
  prompts_per_epoch: 2
  group_size: 2
  micro_batch: 2
  rollout: {steps: 3}
  rewards: [{type: brightness}, {type: prompt_accuracy, partial: 0.5}]
  eval_prompts: 2
"""
# the section with SRPO, where nothing is compared within groups
SRPO_WORDS = [
    "posttrain.algorithm=srpo",
    "posttrain.group_size=16",
    "posttrain.rewards=[{type: prompt_accuracy}]",
]


class PosttrainShop(Workshop):
    """Hold a trained base, and in `section` a config that post-trains it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        base = self.train("base")
        text = self.config.read_text(encoding="utf-8")
        text = text.replace("train:", f"train:\n  init_from: {base}", 1)
        self.section = self.folder / "post.yaml"
        self.section.write_text(text + SECTION, encoding="utf-8")


def command(shop: PosttrainShop, name: str, *words: str) -> list[str]:
    """Return the arguments of `posttrain` for two updates of the run `name`."""
    named = ["--config", str(shop.section), "--device", "cpu", f"experiment_name={name}"]
    return [*named, "train.max_steps=2", *words]
