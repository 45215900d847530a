"""The nodes in `integrations/comfyui` under the real ComfyUI, end to end, on a CPU.

    python -m tests.drivers.comfyui CHECKOUT [--checkpoint FILE] [--seed 7]

Starts the server of a ComfyUI checkout with our folder among its custom nodes, in a folder of its
own (`--base-directory`; the checkout is only read), queues `workflow_api.json` through its HTTP
API, and compares the pixels with those of `mmdit sample`. Then it interrupts a long drawing. Run it
with a Python that has the requirements of ComfyUI and mmdit. Ends with 1 if anything differs.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "integrations" / "comfyui"
# SaveImage cuts pixels to 8 bits: this node keeps what ours gave.
KEEP = """
import numpy as np
import folder_paths


class KeepTensor:
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {})}}

    def keep(self, images, name):
        np.save(f"{folder_paths.get_output_directory()}/{name}.npy", images.numpy())
        return ()


NODE_CLASS_MAPPINGS = {"KeepTensor": KeepTensor}
"""


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare(base: Path, checkpoint: Path) -> None:
    """Lay out what a user would: our nodes, the file, and the node that keeps tensors."""
    for name in ("custom_nodes", "models/mmdit", "input", "output"):
        (base / name).mkdir(parents=True)
    shutil.copytree(NODES, base / "custom_nodes" / "mmdit")
    (base / "custom_nodes" / "keep_tensor.py").write_text(KEEP, encoding="utf-8")
    shutil.copy(checkpoint, base / "models" / "mmdit" / checkpoint.name)


class Server:
    """A running ComfyUI, by its HTTP API."""

    def __init__(self, session: aiohttp.ClientSession, address: str):
        self.session, self.address = session, address

    async def get(self, path: str) -> dict:
        async with self.session.get(f"{self.address}/{path}") as answer:
            return await answer.json()

    async def started(self, process: subprocess.Popen) -> dict:
        """Wait until it answers; return what it says of our nodes."""
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"ComfyUI ended with {process.returncode}")
            try:
                return await self.get("object_info/MMDiTSampler")
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)
        raise SystemExit("ComfyUI does not answer")

    async def run(self, prompt: dict, interrupt_at: int = 0) -> tuple[dict, dict[str, list]]:
        """Queue a workflow; return its record in the history, and the progress `[value, most]` that
        each node has told. `interrupt_at`: ask it to stop at so many steps."""
        progress: dict[str, list] = {}
        async with self.session.ws_connect(f"{self.address}/ws?clientId=driver") as socket:
            body = {"prompt": prompt, "client_id": "driver"}
            async with self.session.post(f"{self.address}/prompt", json=body) as answer:
                said = await answer.json()
                assert answer.status == 200, json.dumps(said, indent=1)
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                data = event["data"]
                if event["type"] == "progress":
                    progress.setdefault(data["node"], []).append([data["value"], data["max"]])
                    if data["value"] == interrupt_at:
                        await self.session.post(f"{self.address}/interrupt", json={})
                if event["type"] in (
                    "execution_success",
                    "execution_error",
                    "execution_interrupted",
                ):
                    break
        for _ in range(50):  # the record is written just after the message
            history = await self.get(f"history/{said['prompt_id']}")
            if history:
                break
            await asyncio.sleep(0.1)
        return history[said["prompt_id"]], progress


def sampled(checkpoint: Path, node: dict, out: Path) -> list[Path]:
    """Draw the samples of a node with `mmdit sample`; return its files."""
    words = ["--checkpoint", checkpoint, "--out", out, "--seed", node["seed"], "--device", "cpu"]
    for name in ("width", "height", "frames", "steps", "guidance"):
        words += [f"--{name}", node[name]]
    words += ["--prompts", *[node["prompt"]] * node["count"]]
    command = [sys.executable, "-m", "mmdit", "sample", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    names = json.loads((out / "samples.json").read_text(encoding="utf-8"))["samples"]
    return [out / row["file"] for row in names]


def drawn(checkpoint: Path, node: dict) -> np.ndarray:
    """Return the pixels of a node's samples before they are rounded for a file, `(images, height,
    width, 3)`: those that `mmdit sample` writes."""
    from dataclasses import replace

    from mmdit.experiment.load import load_pipeline
    from mmdit.training.pipeline import SampleSettings

    pipeline, config = load_pipeline(checkpoint, "cpu")
    settings = SampleSettings.of(config.train)
    sampler = replace(settings.sampler, steps=node["steps"])
    settings = replace(settings, sampler=sampler, seed=node["seed"], cfg_scale=node["guidance"])
    size = node["width"], node["height"], node["frames"]
    pixels = pipeline([node["prompt"]] * node["count"], *size, settings)
    return pixels.permute(0, 1, 3, 4, 2).flatten(0, 1).numpy()


def compare(title: str, got: np.ndarray, expected: np.ndarray, most: float) -> bool:
    """Print how far two arrays of pixels in [0, 1] lie apart; return whether that is too far."""
    assert got.shape == expected.shape, (title, got.shape, expected.shape)
    apart = np.abs(got.astype(np.float64) - expected)
    same = "equal bit for bit" if np.array_equal(got, expected) else "not equal"
    print(f"{title}: {got.shape}, {same}, at most {apart.max():.6f} apart, mean {apart.mean():.7f}")
    return bool(apart.max() > most)


async def check(args: argparse.Namespace, base: Path, port: int, process: subprocess.Popen) -> int:
    workflow = json.loads((NODES / "workflow_api.json").read_text(encoding="utf-8"))
    workflow["1"]["inputs"]["file"] = args.checkpoint.name
    samplers = {"picture": "2", "clip": "4"}
    for name, number in samplers.items():
        workflow[number]["inputs"]["seed"] = args.seed
        inputs = {"images": [number, 0], "name": name}
        workflow[f"keep {name}"] = {"class_type": "KeepTensor", "inputs": inputs}
    wrong = 0
    async with aiohttp.ClientSession() as session:
        server = Server(session, f"http://127.0.0.1:{port}")
        info = await server.started(process)
        print("nodes:", info["MMDiTSampler"]["display_name"], info["MMDiTSampler"]["output"])
        start = time.time()
        record, progress = await server.run(workflow)
        print(f"workflow: {record['status']['status_str']} in {time.time() - start:.1f} s")
        wrong += record["status"]["status_str"] != "success"
        for name, number in samplers.items():
            node = workflow[number]["inputs"]
            kept = np.load(base / "output" / f"{name}.npy")
            wrong += compare(f"{name}, as tensors", kept, drawn(args.checkpoint, node), 1e-3)
            steps = progress[number]
            print(f"{name}, progress: {len(steps)} messages, the last {steps[-1]}")
            wrong += steps[-1] != [node["steps"], node["steps"]]
        files = sampled(args.checkpoint, workflow["2"]["inputs"], base / "ours")
        ours = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]) / 255
        theirs = sorted((base / "output").glob("mmdit_picture_*.png"))
        saved = np.stack([np.asarray(Image.open(file)) for file in theirs]) / 255
        kept = np.load(base / "output" / "picture.npy")
        wrong += compare("picture, SaveImage against mmdit sample's PNG", saved, ours, 1.001 / 255)
        cut = np.floor(255 * kept.astype(np.float64)) / 255
        wrong += compare("picture, SaveImage against cut pixels", saved, cut, 1e-9)
        rounded = np.round(255 * kept.astype(np.float64)) / 255
        wrong += compare("picture, mmdit sample's PNG against rounded pixels", ours, rounded, 1e-9)
        videos = [file.name for file in (base / "output").glob("mmdit_clip_*.mp4")]
        print("clip, SaveVideo wrote", videos)
        wrong += len(videos) != 1
        workflow["4"]["inputs"].update(steps=1000, count=8)
        start = time.time()
        record, progress = await server.run(workflow, interrupt_at=3)
        said = record["status"]["messages"][-1][0]
        print(f"interrupted at step 3: {said} at {progress['4'][-1]}, {time.time() - start:.1f} s")
        wrong += said != "execution_interrupted"
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a ComfyUI checkout")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "assets" / "moving_shapes_64.safetensors"
    )
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    port, env = free_port(), dict(os.environ)
    paths = [str(ROOT), str(ROOT / "VTP"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base, args.checkpoint)
        command = [sys.executable, "main.py", "--cpu", "--port", port, "--base-directory", base]
        with (base / "log.txt").open("w") as log:
            process = subprocess.Popen(
                list(map(str, command)), cwd=args.checkout, env=env, stdout=log, stderr=log
            )
            try:
                wrong = asyncio.run(check(args, base, port, process))
            except BaseException:
                print((base / "log.txt").read_text(errors="replace")[-4000:])
                raise
            finally:
                process.terminate()
                process.wait(30)
    print("differences:" if wrong else "all as it should be", wrong or "")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
