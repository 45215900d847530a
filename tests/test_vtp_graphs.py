"""Tokenizer pre-training whose losses are replayed as graphs is the training it was, bit for bit.
Tapes of torch's operations stand in for CUDA graphs."""

import pytest
import torch

from mmdit import rng
from mmdit.rng import Draws
from mmdit.vtp_training.pretrain_config import PretrainConfig
from mmdit.vtp_training.pretrain_graphs import StepKeys
from mmdit.vtp_training.pretrain_trainer import TokenizerTrainer
from mmdit.vtp_training.self_supervision import SelfSupervision, hidden_patches
from tests.helpers.thorough import thorough
from tests.test_replays import with_tapes
from tests.test_vtp_train import CPU, configured

STEPS = 10  # of two sizes, the last four with a discriminator where there is one


def trained(config: PretrainConfig, replayed: bool) -> tuple[dict, list[dict]]:
    """Return weights, averages and moments after `STEPS`, and what each step reported."""
    trainer = TokenizerTrainer(config, CPU)
    if replayed:
        trainer.replay()
    reports = [trainer.advance() for _ in range(STEPS)]
    state = trainer.learner.state_dict() | {f"ema {n}": v for n, v in trainer.ema.shadow.items()}
    for number, moments in enumerate(trainer.optimizer.state.values()):
        state |= {f"moment {number} {name}": value for name, value in moments.items()}
    return state, reports


@pytest.mark.parametrize("semantic", [True, *thorough(False)])
def test_replayed_pre_training_gives_the_same_bits(monkeypatch, semantic):
    config = configured("unused", semantic=semantic, max_steps=STEPS)
    tapes = with_tapes(monkeypatch)
    plain, reports = trained(config, replayed=False)
    assert not tapes
    replayed, same = trained(config, replayed=True)
    assert len(tapes) == 4, "forward and backward of two sizes"
    assert plain.keys() == replayed.keys()
    assert [name for name in plain if not torch.equal(plain[name], replayed[name])] == []
    for report, other in zip(reports, same, strict=True):
        assert report.keys() == other.keys()
        for name in report:
            torch.testing.assert_close(report[name], other[name], rtol=0, atol=0)


def test_draws_by_keys_are_those_of_the_step():
    step, keys, places = Draws.of(7, 3, 5), StepKeys(7, 3), torch.arange(5)
    given, chosen = Draws(0, 0, places, keys=keys), torch.tensor([4, 1])
    assert torch.equal(given.normal("a", 2), step.normal("a", 2))
    assert torch.equal(given[chosen].uniform("b"), step[chosen].uniform("b"))
    assert dict(keys) == {name: rng.key(7, name, 3) for name in ("a", "b")}
    on_a_device = Draws(0, 0, places, keys={"a": torch.tensor(keys["a"])})
    assert torch.equal(on_a_device.normal("a", 2), step.normal("a", 2))
    with pytest.raises(KeyError):
        on_a_device.uniform("b")  # a graph would repeat it at every step


def test_every_step_hides_as_many_patches_in_shares_from_the_least_to_the_most(tmp_path):
    config = configured(tmp_path, semantic=True).self_supervision
    trainer = TokenizerTrainer(configured(tmp_path, semantic=True), CPU)
    supervision = trainer.learner.self_supervision
    assert isinstance(supervision, SelfSupervision)
    low, high = config.mask_ratio
    counts, total = hidden_patches(12, 100, low, high, CPU)
    assert total == counts.sum()
    assert counts.min() >= 100 * low and counts.max() <= 100 * high
    assert abs(float(counts.double().mean()) - 50 * (low + high)) <= 0.5
    assert hidden_patches(3, 2, low, low, CPU)[0].tolist() == [1, 1, 1]
    seen = set()
    for step in range(4):
        masks, places = supervision._masks(Draws.of(0, step, 6), 100)
        assert masks.sum(1).sort().values.tolist() == counts.sort().values.tolist()
        assert torch.equal(places, masks.flatten().nonzero()[:, 0])
        seen.add(tuple(masks.sum(1).tolist()))
    assert len(seen) == 4, "which view hides how many is drawn"
