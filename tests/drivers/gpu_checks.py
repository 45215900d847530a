"""Measure on the GPUs of this machine what a CPU cannot show; print one JSON object.

    python -m tests.drivers.gpu_checks [--only scaling,reduced,...] [--minutes 6]
    python -m tests.drivers.gpu_checks --tiny   # the same on a CPU with gloo: does the script work?

The checks, each of which `--only` can name:

- `scaling`: DDP on 1, 2 and 4 GPUs with the same global batch of 1024: samples a second, the
  efficiency against one GPU, and how far the loss curves lie apart.
- `reduced`: the same on the most GPUs, with gradients that travel as bfloat16, against float32.
- `sharded`: the same model under FSDP on 2 GPUs: its curve against that of DDP, then continued from
  its parts by one GPU.
- `resume`: one GPU: 2n steps equal n steps, a stop, and n steps: bit for bit with deterministic
  kernels, and within 1e-6 as usual (compiled).
- `memory`: a batch that does not fit: the message, the exit code, and the file to repeat it.
- `fast`: one GPU, model S, 200 steps: the loss with compiled blocks and fused kernels against that
  of the plain path, and against the plain path with its batch in two halves.
- `replayed`: model S on two GPUs, if there are so many: steps replayed as CUDA graphs against steps
  that the CPU launches: the same weights, and the samples a second of both.
- `offloaded`: one GPU, deterministic kernels: activations in the memory of the CPU against those on
  the GPU, recomputed or not: the same weights, and the speed and memory of each.
- `lean`: one GPU, 1.2 B parameters: memory and seconds a step of each option that saves memory.
- `large`: 3 B parameters under FSDP on 2 GPUs: seconds a step, memory of a GPU, TFLOP/s.

A check that fails, or that has no time left, says so in its place, and the others go on. The exit
code is 1 if any failed.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mmdit.config import decode
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.nn import kernels
from mmdit.scripts import train_t2v
from mmdit.tokenizers import build_tokenizer
from mmdit.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    "scaling",
    "reduced",
    "sharded",
    "resume",
    "memory",
    "fast",
    "replayed",
    "offloaded",
    "lean",
    "large",
)
SIZES = {  # of --tiny and of the real thing
    "cells": (2, 16),
    "channels": (4, 64),
    "items": (48, 2048),
    "micro": (2, 256),
    "micros": (4, 4),
    "steps": (8, 60),
    "log": (2, 10),
    "model": ({"dim": 16, "depth": 2, "num_heads": 2}, {"size": "B"}),
    "large": ({"dim": 32, "depth": 2, "num_heads": 2}, {"dim": 2560, "depth": 24, "num_heads": 40}),
    "large_micro": (2, 16),
    "lean": ({"dim": 32, "depth": 2, "num_heads": 2}, {"dim": 2048, "depth": 16, "num_heads": 16}),
    "compile": (False, True),
}

LEAN = {
    "plain": [{}],
    "checkpointing": [{"checkpointing": True}],
    "every_other_block": [{"checkpointing": True, "checkpoint_every": 2}],
    "pure_bf16": [{}, "train.precision=pure_bf16"],
    "offload_optimizer": [{}, "train.offload_optimizer=true"],
}
ACTIVATIONS = {
    "kept": [],
    "recomputed": ["model.checkpointing=true"],
}


class Checks:
    """`folder` holds a config, a cache of noise, and the runs."""

    def __init__(self, folder: Path, tiny: bool, deadline: float):
        self.folder, self.tiny, self.deadline = folder, tiny, deadline
        self.so_far: dict = {}  # of the check in work
        self.size = {name: values[0 if tiny else 1] for name, values in SIZES.items()}
        self.gpus = 2 if tiny else torch.cuda.device_count()
        side, channels = self.size["cells"], self.size["channels"]
        raw = {
            "experiment_name": "run",
            "output_dir": str(folder / "runs"),
            "num_workers": 2,
            "video": {"width": 16 * side, "height": 16 * side},
            "tokenizer": {"type": "dummy", "latent_d": channels},
            "text_encoder": {
                "type": "byte_level",
                "dim": 16 if tiny else 256,
                "depth": 1 if tiny else 2,
            },
            "model": self.size["model"],
            # Small steps, for large ones drive any two runs apart: noise of 1e-6 in the gradients
            # moves the loss of a model of this kind, 192 wide, by 4e-3 in 160 steps at lr 1e-3, by
            # 5e-8 in 200 at 1e-4.
            "train": {
                "precision": "bf16",
                "lr": 2e-5,
                "warmup_steps": 100,
                "max_steps": self.size["steps"],
                "save_every_steps": 100_000,
                "log_every_steps": self.size["log"],
                "compile": self.size["compile"],
                "batch_size": self.size["micro"],
            },
        }
        (folder / "config.yaml").write_text(json.dumps(raw))
        config = decode(ExperimentConfig, raw)
        manifest = CacheManifest.of(
            build_tokenizer(config.tokenizer), config.video, config.bucketing, config.preprocess
        )
        generator = torch.Generator().manual_seed(0)
        with CacheWriter(folder / "cache", manifest) as writer:
            for i in range(self.size["items"]):
                latents = torch.randn(1, side, side, channels, generator=generator) * (0.5 + i % 3)
                writer.add(f"item{i}", latents, "a red ball " * (1 + i % 4))

    def launch(
        self, name: str, processes: int, *words: str, part: str = "train"
    ) -> subprocess.CompletedProcess:
        """`part` of this file on so many processes, ended at the deadline."""
        words = [
            "--config",
            str(self.folder / "config.yaml"),
            "--train_cache_dir",
            str(self.folder / "cache"),
            "--device",
            "cpu" if self.tiny else "cuda",
            f"experiment_name={name}",
            *words,
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        command = (command if processes > 1 else [sys.executable]) + [
            __file__,
            "--part",
            part,
            json.dumps(words),
        ]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "VTP"))),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
        }
        if part in ("exact", "deterministic"):
            env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic products ask for
        with (self.folder / f"{name}.log").open("w+") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = child.wait(max(1.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # torchrun ends its processes, which are in sessions of their own, after 30 s at the
                # latest
                child.terminate()
                try:
                    child.wait(45)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                code = "none, its time was over"
            log.seek(0)
            return subprocess.CompletedProcess(command, code, log.read())

    def train(self, name: str, processes: int, *words: str, part: str = "train") -> list[dict]:
        """The records of a run that must succeed."""
        done = self.launch(name, processes, *words, part=part)
        assert done.returncode == 0, f"{name}: exit code {done.returncode}: {done.stdout[-1500:]}"
        return [
            json.loads(line)
            for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]

    def speed(self, records: list[dict]) -> dict:
        steady = records[len(records) // 3 :]  # the first ones compile
        middle = lambda name: round(statistics.median(record[name] for record in steady), 4)
        names = ("samples_per_second", "tflops", "tflops_share", "data_wait", "memory_gb")
        return {name: middle(name) for name in names if name in steady[-1]}

    @staticmethod
    def apart(a: list[dict], b: list[dict]) -> float:
        """The largest relative difference of two loss curves."""
        return max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True))

    def ddp(self, processes: int) -> list[dict]:
        """The records of a run with the global batch of all."""
        path = self.folder / f"runs/ddp{processes}/metrics.jsonl"
        if not path.exists():
            return self.train(
                f"ddp{processes}",
                processes,
                f"train.grad_accum_steps={self.size['micros'] // processes}",
            )
        return [json.loads(line) for line in path.read_text().splitlines()]

    def scaling(self) -> dict:
        result = self.so_far
        for processes in (n for n in (1, 2, 4) if n <= self.gpus):
            records = self.ddp(processes)
            row = self.speed(records)
            row["efficiency"] = round(
                row["samples_per_second"] / processes / result.get("1", row)["samples_per_second"],
                4,
            )
            result[str(processes)] = row | {"loss_apart": self.apart(records, self.ddp(1))}
            print(processes, result[str(processes)], file=sys.stderr, flush=True)
        log = (self.folder / "ddp1.log").read_text()
        result["model"] = next(line for line in log.splitlines() if line.startswith("model "))
        assert all(row["loss_apart"] < 1e-3 for row in result.values() if isinstance(row, dict)), (
            result
        )
        return result

    def reduced(self) -> dict:
        most = max(n for n in (1, 2, 4) if n <= self.gpus)
        words = [
            f"train.grad_accum_steps={self.size['micros'] // most}",
            "parallel.reduce=bfloat16",
        ]
        result = {}
        for name, records in (
            ("float32", self.ddp(most)),
            ("bfloat16", self.train("reduced", most, *words)),
        ):
            result[name] = self.speed(records) | {"loss_apart": self.apart(records, self.ddp(most))}
        assert result["bfloat16"]["loss_apart"] < 1e-3, result
        return result

    def sharded(self) -> dict:
        words = [f"train.grad_accum_steps={self.size['micros'] // 2}"]
        records = self.train("fsdp2", 2, *words, "parallel.type=fsdp")
        result = self.speed(records) | {"loss_apart": self.apart(records, self.ddp(2))}
        more = self.size["steps"] + self.size["log"]
        words = [
            f"train.grad_accum_steps={self.size['micros']}",
            f"train.max_steps={more}",
            "train.compile=false",
            "--resume",
        ]
        records = self.train("fsdp2", 1, *words)
        result["loss_before_and_after_going_on_alone"] = [record["loss"] for record in records[-2:]]
        assert result["loss_apart"] < 0.02 and records[-1]["step"] == more, result
        return result

    def resume(self) -> dict:
        result = self.so_far
        for kind, bound in (("exact", 0.0), ("usual", 1e-6)):
            self.train(f"{kind}_whole", 1, part=kind)
            paths = [
                checkpoint.latest(self.folder / "runs" / f"{kind}_{name}")
                for name in ("whole", "parts")
            ]
            assert paths[0].name == paths[1].name, paths
            apart = {}
            for file in ("model", "ema", "optimizer"):
                a, b = (checkpoint.read_tensors(path / f"{file}.safetensors") for path in paths)
                apart |= {
                    f"{file} {name}": float((a[name] - b[name]).norm() / a[name].norm())
                    for name in a
                    if not torch.equal(a[name], b[name])
                }
            result[kind] = {
                "steps": checkpoint.step_of(paths[0]),
                "different_tensors": len(apart),
                "largest_relative": max(apart.values(), default=0.0),
            }
            assert all(value <= bound for value in apart.values()), (
                f"{kind}: {len(apart)} tensors differ, first {next(iter(apart))}"
            )
        return result

    def memory(self) -> dict:
        if self.tiny:
            return {"skipped": "a CPU has no such error"}
        done = self.launch("memory", 1, "train.batch_size=4096", "train.compile=false")
        message = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        files = [path.name for path in (self.folder / "runs/memory/failures").glob("*.json")]
        assert (
            done.returncode == 2
            and message
            and "the memory is full in step 1" in message[0]
            and files
        ), done.stdout[-1500:]
        return {"message": message[0], "files": files}

    def fast(self) -> dict:
        """They differ by rounding alone, and any two runs part once rounding grows (see above):
        `reordered` is the plain path, too, its batch as two halves. All run beside each other."""
        steps = (
            [] if self.tiny else ["train.max_steps=200", "train.log_every_steps=10", "model.size=S"]
        )
        batch = max(2, self.size["micro"] // 8)
        halves = [
            "train.compile=false",
            f"train.batch_size={batch // 2}",
            "train.grad_accum_steps=2",
        ]
        kinds = {
            "plain": ("plain", ["train.compile=false"]),
            "fast": ("train", []),
            "reordered": ("plain", halves),
        }
        result = self.so_far
        with ThreadPoolExecutor() as pool:
            runs = {
                (kind, precision): pool.submit(
                    self.train,
                    f"{kind}_{precision}",
                    1,
                    *steps,
                    f"train.precision={precision}",
                    f"train.batch_size={batch}",
                    *words,
                    part=part,
                )
                for kind, (part, words) in kinds.items()
                for precision in ("fp32", "bf16")
            }
            for (kind, precision), run in runs.items():
                plain = runs["plain", precision].result()
                if kind != "plain":
                    result[f"{kind}_{precision}"] = {
                        "loss_apart": self.apart(run.result(), plain),
                        "steps": plain[-1]["step"],
                    }
        assert all(row["loss_apart"] < 1e-3 for row in result.values()), result
        return result

    def replayed(self) -> dict:
        batch, processes, result, saved = (
            max(2, self.size["micro"] // 8),
            min(2, self.gpus),
            self.so_far,
            [],
        )
        words = (
            [] if self.tiny else ["train.max_steps=60", "train.log_every_steps=5", "model.size=S"]
        )
        words += ["train.compile=auto"]
        for name in ("launched", "replayed"):
            more = [
                f"train.batch_size={batch}",
                "train.grad_accum_steps=2",
                f"train.replays={name == 'replayed'}",
            ]
            records = self.train(name, processes, *words, *more)
            result[name] = self.speed(records) | {"loss": records[-1]["loss"]}
            saved.append(
                checkpoint.read_tensors(
                    checkpoint.latest(self.folder / "runs" / name) / "model.safetensors"
                )
            )
        told = [
            line
            for line in (self.folder / f"{name}.log").read_text().splitlines()
            if "without CUDA graphs" in line or "without a CUDA graph" in line
        ]
        result |= {
            "gpus": processes,
            "different_tensors": sum(
                not torch.equal(value, saved[1][name]) for name, value in saved[0].items()
            ),
        }
        assert not told and result["different_tensors"] == 0, f"{told} {result}"
        return result

    def offloaded(self) -> dict:
        """Compare weights. No run is compiled, so that all three call the same kernels."""
        result, steps = self.so_far, 8
        words = [f"train.max_steps={steps}", "train.log_every_steps=1", "train.compile=false"]
        words.append(f"train.batch_size={max(2, self.size['micro'] // 4)}")
        for name, more in ACTIVATIONS.items():
            saved = []
            for run, setting in ((name, "false"), (f"{name}_offloaded", "true")):
                offload = f"model.offload_activations={setting}"
                records = self.train(run, 1, *words, *more, offload, part="deterministic")
                folder = checkpoint.latest(self.folder / "runs" / run)
                saved.append(checkpoint.read_tensors(folder / "model.safetensors"))
                different = [
                    key for key in saved[0] if not torch.equal(saved[0][key], saved[-1][key])
                ]
                result[run] = self.speed(records) | {"different_tensors": len(different)}
        assert all(row["different_tensors"] == 0 for row in result.values()), result
        return result

    def lean(self) -> dict:
        result = self.so_far
        for name, (model, *words) in LEAN.items():
            model = json.dumps({"size": None, **self.size["lean"], **model})
            words += [
                f"model={model}",
                f"train.batch_size={self.size['large_micro']}",
                "train.log_every_steps=1",
                "train.max_steps=8",
                "train.compile=false",
            ]
            records = self.train(f"lean_{name}", 1, *words, part="unsaved")
            row = self.speed(records)
            result[name] = {
                "seconds_a_step": round(
                    self.size["large_micro"] / row.pop("samples_per_second"), 4
                ),
                **row,
                "loss": records[-1]["loss"],
            }
        return result

    def large(self) -> dict:
        model = json.dumps({"size": None, **self.size["large"]})
        steps = 6
        words = [
            f"model={model}",
            "parallel.type=fsdp",
            f"train.batch_size={self.size['large_micro']}",
            "train.log_every_steps=1",
            f"train.max_steps={steps}",
            "train.compile=false",
        ]
        begin = time.monotonic()
        records = self.train("large", 2, *words, part="unsaved")
        log = (self.folder / "large.log").read_text()
        batch = 2 * self.size["large_micro"]
        result = self.speed(records)
        model = next(line for line in log.splitlines() if line.startswith("model "))
        seconds = round(batch / result["samples_per_second"], 3)
        return {
            "model": model,
            "samples_a_step": batch,
            "seconds_a_step": seconds,
            **result,
            "losses": [round(record["loss"], 4) for record in records],
            "seconds_in_all": round(time.monotonic() - begin),
        }

    def run(self, names: list[str]) -> tuple[dict, bool]:
        result, good = {"gpus": self.gpus, "torch": torch.__version__}, True
        for name in names:
            if name in ("sharded", "large") and self.gpus < 2:
                result[name] = {"skipped": "needs 2 GPUs"}
                continue
            begin, self.so_far = time.monotonic(), {}
            try:
                assert begin < self.deadline - 5, "no time left"
                result[name] = getattr(self, name)()
            except Exception as error:
                result[name], good = (
                    {"failed": f"{type(error).__name__}: {error}", "so_far": self.so_far},
                    False,
                )
            print(
                f"{name}: {json.dumps(result[name])} ({time.monotonic() - begin:.0f} s)", flush=True
            )
        return result, good


def one_process(part: str, words: list[str]) -> None:
    """What a process of `launch` does."""
    if part in ("exact", "usual"):
        torch.use_deterministic_algorithms(part == "exact", warn_only=True)
        half = ["train.max_steps=10", "train.log_every_steps=5", "train.grad_accum_steps=2"]
        half += ["train.compile=false"] * (part == "exact")
        whole, parts = ["train.max_steps=20"], [f"experiment_name={part}_parts"]
        for more in (whole, parts, [*parts, *whole, "--resume"]):
            train_t2v.main([*words, *half, *more])
        return
    if part == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
    if part == "plain":
        kernels.can_run = lambda x: False
    if part == "unsaved":  # tens of gigabytes that nobody will read
        checkpoint.save = lambda *arguments, **options: None
    train_t2v.main(words)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CHECKS), help="comma-separated")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        one_process(args.part, json.loads(args.words))
        return 0
    names = args.only.split(",")
    if unknown := set(names) - set(CHECKS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(CHECKS)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --tiny runs the same on a CPU")
    deadline = time.monotonic() + 60 * args.minutes - 25
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result, good = Checks(Path(folder), args.tiny, deadline).run(names)
    text = json.dumps(result)
    print(text)
    if args.out:
        Path(args.out).write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
