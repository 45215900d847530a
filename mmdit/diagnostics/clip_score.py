"""Measure how well pictures and clips fit their captions, as cosines of CLIP features (Hessel et
al. 2021, 2104.08718), with other captions as a control."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.diagnostics.frame_scores import consistency
from mmdit.files import expanded
from mmdit.interop.clip_similarity import Similarity
from mmdit.interop.encoders import digest
from mmdit.weights import Checkpoint

BATCH = 64  # captions
SHIFTS = 8  # captions of other samples with which each is compared


class ClipScore:
    """Collects cosines between samples and captions, by the CLIP in a folder of transformers. Every
    frame of a clip counts. `similarity`: this CLIP, if it is loaded already."""

    def __init__(
        self, folder: str, device: torch.device | str, similarity: Similarity | None = None
    ):
        self.folder, self.device = folder, device
        self.similarity = similarity or Similarity(expanded(folder)).to(device)
        self.seen: list[Tensor] = []
        self.steady: list[Tensor] = []
        self.captions: list[str] = []

    def anew(self) -> ClipScore:
        """Return an empty score for other samples, with the same CLIP."""
        return ClipScore(self.folder, self.device, self.similarity)

    @torch.no_grad()
    def add(self, pixels: Tensor, captions: list[str]) -> None:
        """Add samples `(B, F, 3, H, W)` in [0, 1] and the captions of what they should show."""
        frames = self.similarity.picture_features(pixels.to(self.device).flatten(0, 1))
        frames = F.normalize(frames, dim=-1).unflatten(0, pixels.shape[:2]).cpu()
        # the mean of the frames' cosines is the cosine with their mean, as long as that is not
        # normalised
        self.seen.append(frames.mean(1).double())
        if pixels.shape[1] > 1:
            self.steady.append(consistency(frames))
        self.captions += captions

    @torch.no_grad()
    def cosines(self) -> tuple[Tensor, Tensor]:
        """Return the cosines `(N,)` of samples with their own captions, and cosines with captions
        of other samples that differ from theirs, up to 8 for each (none if all captions are the
        same)."""
        seen = torch.cat(self.seen)
        unique = list(dict.fromkeys(self.captions))
        place = {caption: number for number, caption in enumerate(unique)}
        rows = torch.tensor([place[caption] for caption in self.captions])
        encode = self.similarity.text_features
        parts = [encode(unique[i : i + BATCH]) for i in range(0, len(unique), BATCH)]
        texts = F.normalize(torch.cat(parts), dim=-1).cpu().double()
        count = min(SHIFTS, len(rows) - 1)
        others = []
        for number in range(1, count + 1):
            moved = rows.roll(round(len(rows) * number / (count + 1)))
            others.append((seen * texts[moved]).sum(1)[moved != rows])
        return (seen * texts[rows]).sum(1), torch.cat(others) if others else seen.new_zeros(0)

    def report(self) -> dict:
        """Return the scores and everything on which they depend, ready for JSON. ValueError if no
        sample was added."""
        if not self.captions:
            raise ValueError("a CLIP score needs one sample with a caption or more")
        cosines, others = self.cosines()
        weights = Checkpoint(expanded(self.folder))
        report = {
            "clip_score": float(100 * cosines.clamp(min=0).mean()),
            "clip_score_hessel": float(2.5 * cosines.clamp(min=0).mean()),
            "cosine": float(cosines.mean()),
            "standard_error": None,
            "control": float(100 * others.clamp(min=0).mean()) if len(others) else None,
            "samples": len(cosines),
            "weights": str(weights.path),
            "weights_sha256": digest(weights.files),
            "size": self.similarity.size,
            "resize": "crop",
            "definition": "clip_score: 100 max(cosine, 0), clip_score_hessel: 2.5 max(cosine, 0),"
            " mean over samples; captions as they are, without a prefix; cosines of a clip are"
            " means over all frames; control: other captions",
        }
        if len(cosines) > 1:
            report["standard_error"] = float(100 * cosines.std() / len(cosines) ** 0.5)
        if self.steady:
            report["frame_consistency"] = float(torch.cat(self.steady).mean())
        return report


class PreviewScore:
    """`score(pixels, captions)` returns the CLIP score of the samples of a preview, and the score
    of the same samples with other captions, if there are any. Between previews the network stays in
    CPU memory. ValueError if `folder` holds no CLIP."""

    def __init__(self, folder: str, device: torch.device):
        self.folder, self.device = folder, device
        self.similarity = Similarity(expanded(folder))

    def __call__(self, pixels: Tensor, captions: list[str]) -> dict[str, float]:
        try:
            score = ClipScore(self.folder, self.device, self.similarity.to(self.device))
            for start in range(0, len(captions), BATCH):
                end = start + BATCH
                score.add(pixels[start:end], captions[start:end])
            cosines, others = score.cosines()
        finally:
            self.similarity.to("cpu")
        values = {"preview_clip_score": float(100 * cosines.clamp(min=0).mean())}
        if len(others):
            values["preview_clip_control"] = float(100 * others.clamp(min=0).mean())
        return values


def format_clip_score(report: dict) -> str:
    """Return the report as a line for people."""
    line = f"CLIP score {report['clip_score']:.2f} (100 max(cos, 0)) of {report['samples']} samples"
    if report["control"] is not None:
        line += f", {report['control']:.2f} with other captions"
    if "frame_consistency" in report:
        line += f"; consistency of frames {report['frame_consistency']:.4f}"
    return line
