"""The loop: exact resume, accumulation and world size change nothing, EMA, non-finite steps,
previews touch no randomness."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmdit.config import ConfigError
from mmdit.diffusion import FlowMatchingConfig, build_objective
from mmdit.interfaces import Batch, LatentSpec
from mmdit.models import VideoMMDiTConfig, build_model
from mmdit.rng import Draws
from mmdit.text_encoders import ByteLevelConfig, build_text_encoder
from mmdit.training import checkpoint
from mmdit.training.distributed import World
from mmdit.training.ema import EMAConfig
from mmdit.training.errors import RunError
from mmdit.training.exporting import export
from mmdit.training.learner import Learner
from mmdit.training.memory.assigning import assign
from mmdit.training.memory.shards import Stored
from mmdit.training.optim import LearningRate
from mmdit.training.parallel import shard
from mmdit.training.previews import Previews
from mmdit.training.train_config import TrainConfig
from mmdit.training.train_state import TrainState
from mmdit.training.trainer import Trainer
from tests.helpers import warm
from tests.helpers.thorough import thorough

SPEC = LatentSpec(channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5))
WORDS = ["a red ball", "", "two blue boxes to the left", "ein grüner Würfel"]


def learner(dropout=0.0, depth=2) -> Learner:
    torch.manual_seed(1)
    encoder = build_text_encoder(ByteLevelConfig(dim=16, depth=1, num_heads=2))
    model = build_model(
        VideoMMDiTConfig(dim=16, depth=depth, num_heads=2, window_size=2, dropout=dropout),
        3,
        encoder.dim,
    )
    return Learner(
        model,
        encoder,
        build_objective("flow_matching", flow_matching=FlowMatchingConfig()),
        SPEC,
        caption_dropout=0.3,
    )


def batches(rank=0, world=1, accum=1, size=8, poison=()):
    """A global batch of 8 that is a function of the step, cut as the data layer cuts it."""

    def stream(first, last):
        for step in range(first, last):
            latents = Draws.of(9, step, size).normal("data", 2, 2, 4, 3)
            if step in poison:
                latents[0] = float("nan")
            mine = torch.arange(size)[rank::world]
            yield [
                Batch(
                    latents[i],
                    [WORDS[j % 4] for j in i.tolist()],
                    [f"id{j}" for j in i.tolist()],
                    i,
                )
                for i in mine.chunk(accum)
            ]

    return stream


def trained(
    tmp_path,
    steps=6,
    world=World(),
    resume_at=None,
    accum=1,
    dropout=0.0,
    poison=(),
    preview=None,
    ema=True,
    fsdp=False,
    size=8,
    depth=2,
    average=EMAConfig(decay=0.9),
    **options,
):
    config = TrainConfig(
        **{
            "precision": "fp32",
            "batch_size": 8,
            "lr": 3e-3,
            "warmup_steps": 2,
            "max_steps": steps,
            "log_every_steps": 2,
            "save_every_steps": 3,
            "lr_schedule": "cosine",
            "weight_decay": 0.1,
            **options,
        }
    )
    model = learner(dropout, depth)
    if fsdp:
        shard(model, world)
    state = TrainState.create(model, config, replace(average, enabled=ema))
    if resume_at is not None:
        state.restore(checkpoint.folder_of(tmp_path, resume_at))

    def save(state):
        meta = checkpoint.Meta(state.step, {}, SPEC, "test")
        checkpoint.save(
            tmp_path, meta, state.files(), config.keep_last, config.keep_every_steps, world
        )

    Trainer(
        config,
        5,
        state,
        batches(world.rank, world.size, accum, size, poison),
        world,
        tmp_path,
        save,
        preview,
    ).run()
    return state


def assert_same(a: TrainState, b: TrainState, tolerance=0.0):
    other = b.learner.state_dict()
    for name, value in a.learner.state_dict().items():
        torch.testing.assert_close(
            other[name],
            value,
            rtol=0,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, value in a.ema.shadow.items():
        torch.testing.assert_close(b.ema.shadow[name], value, rtol=0, atol=tolerance)


def test_resume_is_exact_bit_for_bit(tmp_path):
    """6 steps equal 3 + stop + 3, with dropout, caption dropout, EMA, AdamW, warm-up and cosine,
    resumed twice."""
    whole = trained(tmp_path / "whole", dropout=0.2)
    trained(tmp_path / "parts", steps=6, dropout=0.2, save_every_steps=1, keep_last=0)
    for step in (4, 5, 6):
        import shutil

        shutil.rmtree(checkpoint.folder_of(tmp_path / "parts", step))
    resumed = trained(tmp_path / "parts", dropout=0.2, resume_at=3)
    assert_same(whole, resumed)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[-1] == 6


def test_muon_resumes_exactly_and_skips_bad_steps(tmp_path):
    """With AdamW for all but the matrices of the blocks; both follow the same rate."""
    options = {"optimizer": "muon", "save_every_steps": 2, "keep_last": 0}
    whole = trained(tmp_path, **options)
    assert_same(whole, trained(tmp_path, resume_at=2, **options))
    kinds = {
        name: part
        for part in whole.optimizer.parts
        for name, p in whole.learner.named_parameters()
        if p in part.state
    }
    muon = {name for name, part in kinds.items() if isinstance(part, torch.optim.Muon)}
    assert muon == {
        n
        for n, p in whole.learner.named_parameters()
        if ".blocks." in n and n.endswith(".weight") and p.ndim == 2
    }
    assert len({group["lr"] for group in whole.optimizer.param_groups}) == 1
    options |= {"lr_schedule": "constant"}
    trained(tmp_path / "two", steps=2, **options)
    trained(tmp_path / "poisoned", steps=3, poison=(2,), **options)
    for kind in ("model", "optimizer"):
        two = Stored(checkpoint.folder_of(tmp_path / "two", 2) / f"{kind}.safetensors")
        poisoned = Stored(checkpoint.folder_of(tmp_path / "poisoned", 3) / f"{kind}.safetensors")
        assert all(torch.equal(two[name], poisoned[name]) for name in two), kind
    step = (
        whole.learner.state_dict()["model.blocks.0.mlp.up.weight"]
        - learner().state_dict()["model.blocks.0.mlp.up.weight"]
    )
    spread = torch.linalg.svdvals(step)
    assert spread[-1] > 0.1 * spread[0], "an orthogonal update moves all directions alike"
    frozen = learner().requires_grad_(False)
    frozen.model.output.requires_grad_(True)
    with pytest.raises(ConfigError, match="no matrix of the denoiser"):
        TrainState.create(frozen, TrainConfig(optimizer="muon"), EMAConfig())


def test_rates_and_decay_are_those_said_where_the_parameters_are_made(tmp_path, monkeypatch):
    """Adam's first step moves a weight by its rate, whatever the gradient."""
    model = learner()
    model.text_encoder.lr_scale = 0.25
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # at its start the model has few gradients
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(sys.modules[__name__], "learner", lambda *words: model)
    trained(tmp_path, steps=1, lr=1e-3, weight_decay=0.5, warmup_steps=0, lr_schedule="constant")
    for name, weight in model.named_parameters():
        rate = 2.5e-4 if name.startswith("text_encoder.") else 1e-3
        decay = 0.0 if weight.ndim < 2 or name.endswith(".table") else 0.5
        moved = (weight - before[name] * (1 - rate * decay)).abs().max().item()
        assert 0.5 * rate < moved < 1.002 * rate, (
            name,
            moved,
        )  # less where the gradient is as small as Adam's epsilon


def test_accumulation_changes_nothing(tmp_path):
    assert_same(trained(tmp_path / "a"), trained(tmp_path / "b", accum=4), tolerance=2e-6)


def test_training_learns_and_text_encoder_is_trained(tmp_path):
    before = learner().state_dict()
    state = trained(tmp_path, steps=40)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.93 * losses[0]
    after = state.learner.state_dict()
    assert any(
        name.startswith("text_encoder") and not torch.equal(value, before[name])
        for name, value in after.items()
    )


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    clean = trained(tmp_path / "clean", steps=2)
    poisoned = trained(
        tmp_path / "poisoned", steps=3, poison=(2,), lr_schedule="constant", log_every_steps=4
    )
    reference = trained(tmp_path / "reference", steps=2, lr_schedule="constant")
    for name, value in poisoned.learner.state_dict().items():
        assert torch.equal(value, reference.learner.state_dict()[name]), name
    record = json.loads((tmp_path / "poisoned" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["skipped"] == 1 and record["loss"] == record["loss"]
    report = (tmp_path / "poisoned" / "skipped.jsonl").read_text()
    line = json.loads(report)
    assert (line["step"], line["seed"], line["non_finite_loss"]) == (2, 5, ["id0"]) and len(
        line["ids"]
    ) == 8
    assert line["non_finite_latents"] == ["id0"]
    assert line["config"] == str(tmp_path / "poisoned" / "config.yaml")
    assert clean.step == 2


def test_only_non_finite_steps_stop_the_run_and_save_nothing_bad(tmp_path):
    with pytest.raises(RuntimeError, match="non-finite.*those of id0 are not finite in the cache"):
        trained(tmp_path, steps=6, poison=range(2, 6), save_every_steps=100)
    with pytest.raises(RuntimeError, match="3 of the last|1 of the last"):
        trained(tmp_path / "none", steps=3, poison=range(3), log_every_steps=1)
    assert checkpoint.latest(tmp_path) is None
    trained(tmp_path / "all", steps=1, poison=(0,), size=1)
    assert json.loads((tmp_path / "all" / "metrics.jsonl").read_text())["loss"] is None, (
        "no loss is not a loss of zero"
    )


def test_previews_do_not_touch_the_training(tmp_path):
    def preview(state):
        torch.manual_seed(123)
        state.learner.eval()
        with state.ema.applied():
            torch.rand(7)

    assert_same(
        trained(tmp_path / "a", dropout=0.2),
        trained(
            tmp_path / "b",
            dropout=0.2,
            preview=preview,
            sample_every_steps=1,
            sample_prompts=("x",),
        ),
    )


def test_a_failing_preview_is_written_down_and_changes_nothing(tmp_path):
    settings = TrainConfig(sample_prompts=("a red ball",), sample_every_steps=1)

    def pipeline(*arguments, **options):
        torch.rand(3)
        raise ZeroDivisionError("no picture")

    previews = Previews(pipeline, settings, tmp_path / "b", 64, 32, 1, 8, use_ema=True)
    assert_same(
        trained(tmp_path / "a", dropout=0.2),
        trained(
            tmp_path / "b",
            dropout=0.2,
            preview=previews,
            sample_every_steps=3,
            sample_prompts=("x",),
        ),
    )
    assert [path.name for path in sorted((tmp_path / "b" / "failures").iterdir())] == [
        "preview_00000003_0.json",
        "preview_00000006_0.json",
    ]
    failure = json.loads((tmp_path / "b" / "failures" / "preview_00000003_0.json").read_text())
    assert (
        failure["prompts"] == ["a red ball"]
        and failure["settings"]["seed"] == 0
        and "ZeroDivisionError" in failure["trace"]
    )


@pytest.mark.parametrize("graphs", [{}, {"seen twice": "its graphs"}])
def test_full_memory_names_the_batch_the_remedies_and_the_items(tmp_path, monkeypatch, graphs):
    forward = Learner.forward

    def full(self, latents, captions, draws, keep, *further):
        if draws.step == 2:
            self.replays = SimpleNamespace(made={"seen once": None, **graphs})
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return forward(self, latents, captions, draws, keep)

    monkeypatch.setattr(Learner, "forward", full)
    with pytest.raises(
        RunError,
        match=(
            r"step 3 on rank 0 with micro-batches of 4 x 2 frames x 2x4 cells.*2"
            r" GiB.*train.batch_size"
        ),
    ) as told:
        trained(tmp_path, accum=2, save_every_steps=1)
    assert ("train.replays: false" in str(told.value)) == bool(graphs)
    failure = json.loads((tmp_path / "failures" / "memory_00000002_0.json").read_text())
    assert (
        failure["micro_batch"] == [4, 2, 2, 4, 3]
        and failure["ids"] == [f"id{i}" for i in range(8)]
        and failure["seed"] == 5
    )
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 2


def test_a_step_that_never_ends_is_ended_and_told(tmp_path):
    """One process; several are in test_processes.py."""
    code = (
        "import sys, time; from mmdit.training.watch import Watch; from mmdit.training.distributed"
        " import World\n"
    )
    code += (
        "with Watch(World(), 0.005).running() as watch: watch.at(7, 'waiting for data');"
        " time.sleep(30)"
    )
    done = warm.run("-c", code, timeout=60)
    assert (
        done.returncode == 2
        and "rank 0 stood still for 0 s in step 7 (waiting for data)" in done.stderr
    )
    assert "time.sleep" in done.stderr or 'File "<string>", line 2' in done.stderr  # where it stood


def test_milestones_are_kept_besides_the_last(tmp_path):
    trained(tmp_path, steps=7, save_every_steps=1, keep_last=2, keep_every_steps=3)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [3, 5, 6, 7]
    with pytest.raises(ConfigError, match="multiple of save_every_steps"):
        TrainConfig(save_every_steps=2, keep_every_steps=3)


def test_ema_is_the_average_it_claims_to_be(tmp_path):
    state = trained(tmp_path, steps=3, save_every_steps=1, keep_last=0)
    weights = [
        checkpoint.read_tensors(checkpoint.folder_of(tmp_path, i) / "model.safetensors")
        for i in (1, 2, 3)
    ]
    name = "model.output.weight"
    average = learner().state_dict()[name].double()
    for n, w in enumerate(weights, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * w[name].double()
    torch.testing.assert_close(state.ema.shadow[name].double(), average, rtol=1e-5, atol=1e-7)
    raw = state.learner.state_dict()[name].clone()
    with state.ema.applied():
        assert torch.equal(state.learner.state_dict()[name], state.ema.shadow[name])
    assert torch.equal(state.learner.state_dict()[name], raw)


@pytest.mark.parametrize(
    "start, every",
    [*thorough((0, 1), (0, 3)), (2, 1), (3, 2), *thorough((4, 4), (1000, 1)), (0, 1000)],
)
def test_the_average_is_the_weights_until_it_begins_and_then_of_every_nth_step(
    tmp_path, start, every
):
    """In memory and in every checkpoint: whoever asks for the average before it exists gets what
    was trained."""
    state = trained(
        tmp_path,
        steps=6,
        save_every_steps=1,
        keep_last=0,
        average=EMAConfig(True, 0.9, every, start),
    )
    name, average, updates = "model.output.weight", None, 0
    for step in range(1, 7):
        folder = checkpoint.folder_of(tmp_path, step)
        weights = checkpoint.read_tensors(folder / "model.safetensors")[name]
        due = step > start and step % every == 0
        if due:
            updates += 1
            decay = min(0.9, (1 + updates) / (10 + updates))
            before = learner().state_dict()[name] if average is None else average
            average = decay * before + (1 - decay) * weights
        elif not updates:
            average = weights
        stored = checkpoint.read_tensors(folder / "ema.safetensors")[name]
        torch.testing.assert_close(stored, average, rtol=1e-5, atol=1e-7)
        assert torch.equal(checkpoint.load_weights(folder).tensors[name], stored)
    assert torch.equal(state.ema.shadow[name], stored) and stored.any()


def test_a_checkpoint_from_before_whole_frames_attends_to_windows_alone(tmp_path):
    old, new, wan = {}, {"spatial": ["frame"]}, {"type": "wan"}
    for step, (stored, read) in enumerate(
        [(old, {"spatial": ["window", "shifted"]}), (new, new), (wan, wan)]
    ):
        meta = checkpoint.Meta(step, {"model": dict(stored)}, SPEC, "test")
        folder = checkpoint.save(tmp_path, meta, {"model": {"model.w": torch.ones(2)}}, keep_last=0)
        assert checkpoint.Meta.read(folder).config["model"] == read


def test_a_checkpoint_that_kept_initial_weights_as_its_average_gives_what_was_trained(tmp_path):
    """As an older version wrote them before `start_step`."""
    files = {"model": {"model.w": torch.ones(2)}, "ema": {"model.w": torch.zeros(2)}}
    for step, expected in ((7, 1.0), (8, 0.0)):
        meta = checkpoint.Meta(step, {"ema": {"start_step": 7}}, SPEC, "test")
        folder = checkpoint.save(tmp_path, meta, files, keep_last=0)
        assert checkpoint.load_weights(folder).tensors["model.w"].tolist() == [expected] * 2
    with pytest.raises(ConfigError, match="start_step"):
        EMAConfig(start_step=-1)


def test_learning_rate_is_a_function_of_the_step():
    rate = LearningRate(1.0, 10, "cosine", 0.1, 110)
    assert rate.at(1) == 0.1 and rate.at(10) == 1.0
    assert rate.at(60) == pytest.approx(0.55) and rate.at(110) == pytest.approx(0.1)
    assert LearningRate(1.0, 0, "constant", 0.1, 110).at(110) == 1.0


def test_checkpoints_are_pruned_whole_and_checked(tmp_path):
    trained(tmp_path, steps=6, save_every_steps=1, keep_last=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000005", "step_00000006"]
    (tmp_path / "checkpoints" / "step_00000006" / "model.safetensors").write_bytes(b"torn")
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    weights = checkpoint.load_weights(tmp_path)
    assert weights.meta.step == 5 and weights.meta.spec == SPEC
    export(weights, tmp_path / "out.safetensors", torch.float32)
    again = checkpoint.load_weights(tmp_path / "out.safetensors")
    assert again.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(again.tensors[n], weights.tensors[n]) for n in weights.tensors)
    with pytest.raises(ValueError, match="one set of weights"):
        checkpoint.load_weights(tmp_path / "out.safetensors", use_ema=False)


def test_weights_of_another_model_are_refused_with_names_and_shapes(tmp_path):
    trained(tmp_path, steps=3)
    other = Learner(
        build_model(VideoMMDiTConfig(dim=24, depth=2, num_heads=2), 3, 16),
        learner().text_encoder,
        None,
        SPEC,
    )
    weights = checkpoint.load_weights(tmp_path)
    with pytest.raises(ValueError, match=r"of another shape.*\(16"):
        assign(other.state_dict(), weights.tensors, "run")
    with pytest.raises(ValueError, match="cannot be read"):
        bad = tmp_path / "x.safetensors"
        bad.write_bytes(b"\x80\x04pickle")
        checkpoint.load_weights(bad)


def run_ranks(folder: Path, size: int, script: str, *words: str, options: tuple | list = ()):
    """Run `script FOLDER WORDS` on `size` processes of torchrun, to which `options` are given."""
    ranks = ["-m", "tests.drivers.forked_torchrun", f"--nproc_per_node={size}", *options]
    done = warm.run(*ranks, str(script), str(folder), *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.thorough
def test_compiled_blocks_serve_captions_of_any_length_with_few_graphs(opaque_einops):
    """Text is padded to a few lengths, which changes nothing: else every length of the longest
    caption would be compiled, and after the limit the blocks would run uncompiled without a
    word."""
    plain, compiled = learner(), learner()
    plain.caption_dropout = 0.0
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # at its start the model is nothing
    compiled.load_state_dict(plain.state_dict())
    compiled.caption_dropout = 0.0
    counter = CompileCounter()
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    try:
        compiled.compile_model(counter)
        latents, draws = torch.randn(2, 1, 2, 2, SPEC.channels), Draws.of(0, 0, 2)
        with torch.no_grad():
            for words in range(1, 16):
                captions = ["red " * words, "a blue ring"]
                torch.testing.assert_close(
                    compiled(latents, captions, draws)[0],
                    plain(latents, captions, draws)[0],
                    rtol=0,
                    atol=1e-6,
                )
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2  # a kind of graph, not one for each length


@pytest.mark.thorough
def test_the_first_block_is_compiled_with_the_others(opaque_einops):
    """One graph for each pattern: the blocks get inputs of the same kinds, sizes and strides."""
    counter, limit = CompileCounter(), torch._dynamo.config.recompile_limit
    compiled = learner(depth=4)
    torch._dynamo.reset()
    try:
        compiled.compile_model(counter)
        latents = torch.randn(2, 1, 4, 4, SPEC.channels)
        losses, _ = compiled(latents, ["red", "blue"], Draws.of(0, 0, 2))
        losses.sum().backward()
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert counter.frame_count == len({*compiled.model.config.spatial}) == 3
